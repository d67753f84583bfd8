"""Annotation lines and looked-at photos -> groups, pairs and rejects: nothing is cropped that leaves its photo.

Every line makes its groups or is a reject of stage `annotation`, so lines add up. Imports `annotations`, `groups`,
`holdout`, `sharding`, `sources` and `turning`, whose results it joins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

from lmr_tools.annotations import Annotation, BadLine
from lmr_tools.groups import PlannedGroup, PlannedReference
from lmr_tools.holdout import Claim, settle
from lmr_tools.schema import ImageRow, PairRow, RejectRow, Split
from lmr_tools.sharding import NamedGroup
from lmr_tools.sources import Found, Listing
from lmr_tools.turning import turned

STAGE = "annotation"


def wanted_files(lines: Iterable[Annotation | BadLine]) -> list[str]:
    """`<scene>/<name>` of every photo that the annotation names, sorted."""
    return sorted(
        {
            f"{line.scene}/{name}"
            for line in lines
            if isinstance(line, Annotation)
            for name in (line.target, *(name for _, name in line.references))
        }
    )


def find_files(wanted: Sequence[str], listing: Listing) -> tuple[Listing, dict[str, str]]:
    """(the wanted part of a listing, {wanted: path in the listing}).

    Files lie at `<scene>/<name>`; where that is not there, the only file of this name anywhere below `<scene>/` is
    taken (MegaDepth keeps them deeper). Wanted files that are missing are refused; other photos count as other files.
    """
    by_path = {found.path: found for found in listing.found}
    deeper: dict[tuple[str, str], list[str]] = {}
    for path in by_path:
        parts = PurePosixPath(path).parts
        for scene in set(parts[:-1]):
            deeper.setdefault((scene, parts[-1]), []).append(path)
    place: dict[str, str] = {}
    refused = []
    for path in wanted:
        scene, name = path.split("/")
        below = [path] if path in by_path else deeper.get((scene, name), [])
        if len(below) == 1:
            place[path] = below[0]
            continue
        reason, detail = "missing", "the annotation names it, the folder does not hold it"
        if below:
            reason, detail = "ambiguous", f"{len(below)} files of this name: {', '.join(sorted(below)[:3])}"
        refused.append((Found(source=0, path=path, offset=None, bytes=0, stamp=""), reason, detail))
    used = set(place.values())
    found = tuple(file for file in listing.found if file.path in used)
    others = listing.other_files + len(listing.found) - len(found)
    return Listing(found=found, refused=tuple(refused), other_files=others), place


@dataclass(frozen=True, kw_only=True)
class Photo:
    """A readable photo with the orientation that its crops must be turned by."""

    row: ImageRow
    orientation: int


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What an annotation gave. `groups` and `split_of` (by scene) are what shards are made of."""

    groups: tuple[NamedGroup, ...]
    split_of: Mapping[str, Split]
    pairs: tuple[PairRow, ...]
    rejects: tuple[RejectRow, ...]
    lines: int


def place_groups(
    lines: Sequence[Annotation | BadLine],
    photos: Mapping[str, Photo],
    *,
    name: str,
    size: int,
    per_line: int,
    test_scenes: Sequence[str],
) -> Imported:
    """Check every line against the photos (by `<scene>/<name>`); `per_line` groups at most come of one.

    Test scenes are test, all others train; a scene that shares a photo with a test scene is left out.
    """
    rejects: list[RejectRow] = []
    made: list[tuple[Annotation, PlannedGroup]] = []
    tiers: dict[tuple[str, str], tuple[str, int]] = {}
    seen: dict[PlannedGroup, int] = {}

    def refuse(line: int, reason: str, detail: str) -> None:
        path = f"{name}:{line}"
        rejects.append(RejectRow(image_id=f"line-{line}", path=path, stage=STAGE, reason=reason, detail=detail))

    for line in lines:
        if isinstance(line, BadLine):
            refuse(line.line, line.reason, line.detail)
            continue
        plans, reason, detail = _plans(line, photos, size, per_line)
        if not reason and (against := _contradiction(line, plans[0], tiers)):
            reason, detail = "contradiction", against
        if not reason and (repeated := [seen[plan] for plan in plans if plan in seen]):
            reason, detail = "repeated line", f"the same group as line {repeated[0]}"
        if reason:
            refuse(line.line, reason, detail)
            continue
        seen |= dict.fromkeys(plans, line.line)
        made += [(line, plan) for plan in plans]
    claims = [
        Claim(
            scene=line.scene,
            split=Split.TEST if line.scene in test_scenes else Split.TRAIN,
            photos=(plan.target_image, *(reference.image_id for reference in plan.references)),
        )
        for line, plan in made
    ]
    place, reasons = settle(claims)
    groups, split_of, numbers = [], {}, Counter[str]()
    left_out: set[int] = set()
    for (line, plan), claim, why in zip(made, claims, reasons, strict=True):
        if why is not None:
            if line.line not in left_out:
                refuse(line.line, "held-out place", why)
            left_out.add(line.line)
            continue
        group_id = f"{plan.target_image}-{numbers[plan.target_image]}"
        numbers[plan.target_image] += 1
        groups.append(NamedGroup(group_id=group_id, scene=place[claim.scene], plan=plan))
        split_of[place[claim.scene]] = claim.split
    rejects.sort(key=lambda row: int(row.image_id.removeprefix("line-")))
    return Imported(
        groups=tuple(groups),
        split_of=split_of,
        pairs=tuple(_pair_rows(groups, tiers, name)),
        rejects=tuple(rejects),
        lines=len(lines),
    )


def _plans(
    line: Annotation, photos: Mapping[str, Photo], size: int, per_line: int
) -> tuple[list[PlannedGroup], str, str]:
    """(groups of a line, "", ""), or ([], reason, detail) when it makes none."""
    paths = [f"{line.scene}/{name}" for name in (line.target, *(name for _, name in line.references))]
    if gone := [path for path in paths if path not in photos]:
        return [], "photo not usable", f"{', '.join(gone)}: see the rejects of stage scan"
    own = [photos[path] for path in paths]
    ids = [photo.row.image_id for photo in own]
    if twice := [path for path, image_id in zip(paths, ids, strict=True) if ids.count(image_id) > 1]:
        return [], "photo twice", f"{', '.join(twice)} are one photo"
    plans: list[PlannedGroup] = []
    outside = ""
    for centres in line.centres:
        corners = [_corner(photo, centre, size) for photo, centre in zip(own, centres, strict=True)]
        bad = [(path, centre) for path, centre, c in zip(paths, centres, corners, strict=True) if c is None]
        if bad:
            (path, centre), row = bad[0], photos[bad[0][0]].row
            outside = outside or f"{size}x{size} around {centre} leaves {path} ({row.width}x{row.height})"
            continue
        (x, y), *others = (corner for corner in corners if corner is not None)
        references = tuple(
            PlannedReference(
                image_id=photo.row.image_id,
                slot=slot,
                tier=slot[0],
                overlap=None,
                scale_ratio=None,
                clip_score=None,
                x=corner[0],
                y=corner[1],
                landing="published",
            )
            for (slot, _), photo, corner in zip(line.references, own[1:], others, strict=True)
        )
        plan = PlannedGroup(target_image=ids[0], x=x, y=y, references=references)
        if plan not in plans:
            plans.append(plan)
        if len(plans) == per_line:
            break
    return (plans, "", "") if plans else ([], "crop outside", outside)


def _corner(photo: Photo, centre: tuple[int, int], size: int) -> tuple[int, int] | None:
    """Corner of the crop in the decoded photo; None when it leaves the photo."""
    row, half = photo.row, size // 2
    x, y = turned(centre[0] - half, centre[1] - half, size, photo.orientation, row.width, row.height)
    return (x, y) if 0 <= x <= row.width - size and 0 <= y <= row.height - size else None


def _contradiction(line: Annotation, plan: PlannedGroup, tiers: dict[tuple[str, str], tuple[str, int]]) -> str:
    """Why a line says another tier of a pair than a line before; empty, and the pairs noted, when it does not."""
    for reference in plan.references:
        tier, first = tiers.get((plan.target_image, reference.image_id), (reference.tier, line.line))
        if tier != reference.tier:
            return f"{reference.image_id} is {reference.tier} here, {tier} in line {first}"
    for reference in plan.references:
        tiers.setdefault((plan.target_image, reference.image_id), (reference.tier, line.line))
    return ""


def _pair_rows(
    groups: Sequence[NamedGroup], tiers: Mapping[tuple[str, str], tuple[str, int]], name: str
) -> Iterator[PairRow]:
    """One row per pair that a group uses: the published tier, and no numbers."""
    used = {(group.plan.target_image, r.image_id) for group in groups for r in group.plan.references}
    for target, reference in sorted(used):
        tier, line = tiers[target, reference]
        yield PairRow(
            target_image=target,
            ref_image=reference,
            overlap=None,
            scale_ratio=None,
            inliers=0,
            tier=tier,
            reason=f"as published ({name}, line {line}); not measured here",
            clip_score=None,
            matches=0,
            consistent=0,
            scale_log2=None,
            hops=0,
            via=None,
        )


def with_status(rows: Iterable[ImageRow], groups: Sequence[NamedGroup], rejected: Iterable[str]) -> Iterator[ImageRow]:
    """The photos with what became of them."""
    targets = {group.plan.target_image for group in groups}
    used = targets | {r.image_id for group in groups for r in group.plan.references}
    gone = set(rejected)
    for row in rows:
        status = "rejected" if row.image_id in gone else "used" if row.image_id in used else "unused"
        reason = None if row.image_id in targets or status == "rejected" else "no usable line has it as target"
        yield replace(row, status=status, no_target=reason)
