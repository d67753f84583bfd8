"""Why a group is what it is: every candidate of its target, what was measured, what decided.

`explain_group` joins the tables; `draw_evidence` makes the picture from the photos, or from the shard's crops when
the photos are gone. Imports `dataset`, `shards`, `preview`; for the picture `features`, `geometry` and `sources`.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lmr_tools.dataset import read_manifest, table_path
from lmr_tools.preview import MatchView, match_sheet
from lmr_tools.schema import (
    CandidateRow,
    Group,
    GroupRow,
    ImageRow,
    LmrError,
    PairRow,
    Tier,
    arrow_schema,
)
from lmr_tools.shards import read_shard
from lmr_tools.tables import read_rows

if TYPE_CHECKING:
    from lmr_tools.schema import Image

TIERS = {str(tier): name for tier, name in zip(Tier, ("High", "Medium", "Low"), strict=True)}


@dataclass(frozen=True, kw_only=True)
class Considered:
    """One photo that was looked at as a reference of the target, and what became of it.

    `rank` and `clip_score` come from mining from the target's side; the pair's row says what geometry found. `slot` is
    None when the photo is not in the group; `why` says in words why it is, or is not.
    """

    image_id: str
    path: str
    rank: int | None
    clip_score: float | None
    pair: PairRow | None
    slot: str | None
    why: str


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """A group, its target photo, and all photos considered: the chosen ones by slot, then the others by rank."""

    group_id: str
    rows: tuple[GroupRow, ...]
    target: ImageRow
    considered: tuple[Considered, ...]
    recipe: Mapping[str, Any]


def _select(dataset: Path, name: str, row_type: type, column: str, values: Sequence[str]) -> list[Any]:
    """The rows of a table whose column holds one of `values`; only matching row groups are read."""
    path = table_path(dataset, name)
    columns = arrow_schema(row_type).names
    try:
        table = pq.read_table(
            path, columns=columns, filters=[(column, "in", list(values))], page_checksum_verification=True
        )
    except FileNotFoundError:
        raise LmrError(f"{path}: no such table; run lmr verify") from None
    except (pa.ArrowException, OSError) as error:
        raise LmrError(f"{path}: not a readable Parquet table ({str(error).splitlines()[0]})") from None
    return [row_type(**row) for row in table.to_pylist()]


def known_group(dataset: Path, group_id: str) -> list[GroupRow]:
    """The `groups` rows of a group; an unknown id is an `LmrError` that names near ones, or why a photo has none."""
    rows: list[GroupRow] = _select(dataset, "groups", GroupRow, "group_id", [group_id])
    if rows:
        return rows
    photos = _select(dataset, "images", ImageRow, "image_id", [group_id])
    photos = photos or _select(dataset, "images", ImageRow, "path", [group_id])
    if photos:
        own = _select(dataset, "groups", GroupRow, "target_image", [photos[0].image_id])
        if own:
            named = ", ".join(sorted({row.group_id for row in own}))
            raise LmrError(f"{group_id} is a photo, not a group; it is the target of {named}")
        why = photos[0].no_target or f"it is {photos[0].status}"
        raise LmrError(f"{group_id} is a photo that is the target of no group: {why}")
    ids = sorted({row.group_id for row in read_rows(table_path(dataset, "groups"), GroupRow)})
    # difflib compares each id with care; among very many, those that share a beginning are enough.
    close = [name for name in ids if name[:3] == group_id[:3]] if len(ids) > 5000 else ids
    near = difflib.get_close_matches(group_id, close[:5000], n=3, cutoff=0.5) or ids[:3]
    raise LmrError(f"{dataset}: no group {group_id!r}; {len(ids)} groups, for example {', '.join(near) or 'none'}")


def read_groups(dataset: Path, places: Mapping[str, str]) -> list[Group]:
    """The groups of `places` (group id -> shard), in that order; LmrError when a shard does not hold one."""
    found: dict[str, Group] = {}
    for shard in dict.fromkeys(places.values()):
        wanted = {group_id for group_id, place in places.items() if place == shard}
        for group in read_shard(dataset / "shards" / Path(shard).name, only=wanted):
            found[group.group_id] = group
            if wanted <= found.keys():
                break
    for group_id, shard in places.items():
        if group_id not in found:
            raise LmrError(f"{dataset / 'shards' / Path(shard).name}: does not hold group {group_id}; run lmr verify")
    return [found[group_id] for group_id in places]


def explain_group(dataset: Path, group_id: str) -> Explanation:
    """Everything the tables know about how the references of `group_id` were chosen."""
    recipe = read_manifest(dataset).get("recipe") or {}
    rows = known_group(dataset, group_id)
    target_id = rows[0].target_image
    candidates: dict[str, CandidateRow] = {
        row.ref_image: row for row in _select(dataset, "candidates", CandidateRow, "target_image", [target_id])
    }
    pairs: dict[str, PairRow] = {
        row.ref_image: row for row in _select(dataset, "pairs", PairRow, "target_image", [target_id])
    }
    slots = {row.ref_image: row.slot for row in rows}
    names = [target_id, *sorted(candidates.keys() | pairs.keys() | slots.keys())]
    photos: dict[str, ImageRow] = {row.image_id: row for row in _select(dataset, "images", ImageRow, "image_id", names)}
    if target_id not in photos:
        raise LmrError(f"{dataset}: photo {target_id} of group {group_id} is not in images; run lmr verify")
    chosen = [pairs[row.ref_image] for row in rows if row.ref_image in pairs]
    considered = []
    for name in names[1:]:
        candidate, pair, photo = candidates.get(name), pairs.get(name), photos.get(name)
        considered.append(
            Considered(
                image_id=name,
                path=photo.path if photo else "?",
                rank=candidate.rank if candidate else None,
                clip_score=candidate.clip_score if candidate else pair.clip_score if pair else None,
                pair=pair,
                slot=slots.get(name),
                why=_why(slots.get(name), pair, chosen, slots, photo, recipe),
            )
        )
    order = [row.slot for row in rows]
    considered.sort(
        key=lambda c: (
            (0, order.index(c.slot), "") if c.slot else (1, c.rank if c.rank is not None else len(names), c.image_id)
        )
    )
    return Explanation(
        group_id=group_id, rows=tuple(rows), target=photos[target_id], considered=tuple(considered), recipe=recipe
    )


def _similarity(pair: PairRow) -> float:
    return (pair.overlap or 0.0) * (pair.scale_ratio or 0.0)


def _preference(pair: PairRow) -> tuple[int, float]:
    """The order in which pairs of a tier take its slots: verified, chained, same label; most similar first."""
    return {1: 0, 2: 1}.get(pair.hops, 2), -_similarity(pair)


def _why(
    slot: str | None,
    pair: PairRow | None,
    chosen: Sequence[PairRow],
    slots: Mapping[str, str],
    photo: ImageRow | None,
    recipe: Mapping[str, Any],
) -> str:
    """Why a photo is in its slot, or in none: as far as the tables show it."""
    if pair is None:
        return "in the group, but not in pairs: run lmr verify" if slot else "mined, but never matched"
    if slot:
        if pair.tier is None or slot.startswith(pair.tier):
            return f"chosen: {TIERS.get(pair.tier or '', 'ungraded')} pair for slot {slot}"
        return f"chosen: {TIERS[pair.tier]} pair, left over; fills slot {slot}, for which no own pair was usable"
    if pair.tier is None:
        return "not usable as a reference"
    size = recipe.get("size")
    if photo and isinstance(size, int) and min(photo.width, photo.height) < size:
        return f"not chosen: the photo is smaller than a crop ({photo.width}x{photo.height})"
    name = TIERS[pair.tier]
    rivals = [p for p in chosen if p.tier == pair.tier and slots[p.ref_image].startswith(pair.tier)]
    if not rivals and not recipe.get(name.lower()):
        return f"not chosen: the recipe asks for no {name} references"
    if rivals and _preference(pair) >= max(_preference(p) for p in rivals):
        return (
            f"not chosen: pairs that come first took the {name} slots (verified first, then by overlap x scale ratio)"
        )
    return (
        f"not chosen: a usable {name} pair, but not for this crop: too few matches inside the target crop, or the "
        "reference crop would leave its photo"
    )


def draw_evidence(dataset: Path, explanation: Explanation, path: Path) -> str:
    """Draw target and references with crop boxes and matches; returns what it was drawn from, one line."""
    group = read_groups(dataset, {explanation.group_id: explanation.rows[0].shard})[0]
    try:
        photos = _photos(dataset, explanation)
        source = "drawn from the source photos, matches computed again"
    except LmrError as error:
        photos = {}
        source = f"the source photos can not be read ({error}): drawn from the crops in the shard"
    pairs = {c.image_id: c for c in explanation.considered}
    target = photos.get(group.target_image, group.target)
    size = explanation.rows[0].size
    views = []
    for reference in group.references:
        image = photos.get(reference.image_id, reference.pixels)
        considered = pairs[reference.image_id]
        target_points, points = _matches(target, image, considered.pair, explanation.recipe)
        views.append(
            MatchView(
                image=image,
                box=(reference.x, reference.y, size) if photos else None,
                tier=reference.tier,
                slot=reference.slot,
                title=reference.path,
                lines=(numbers_line(considered), considered.pair.reason if considered.pair else ""),
                target_points=target_points,
                points=points,
            )
        )
    box = (group.target_x, group.target_y, size) if photos else None
    match_sheet(target, box, f"{group.group_id}: {group.target_path}", views, path)
    return source


def numbers_line(considered: Considered) -> str:
    """The measured numbers of a pair in one line."""
    pair = considered.pair
    rank = "not mined from this side" if considered.rank is None else f"rank {considered.rank}"
    score = "" if considered.clip_score is None else f", embedding {considered.clip_score:.3f}"
    if pair is None:
        return f"{rank}{score}"
    if pair.overlap is None or pair.scale_ratio is None:
        return f"tier {pair.tier} as published, not measured here; {rank}{score}"
    return (
        f"overlap {pair.overlap:.3f}, scale ratio {pair.scale_ratio:.3f}; {pair.matches} matches, "
        f"{pair.inliers} inliers, {pair.consistent} agree; {rank}{score}"
    )


def _photos(dataset: Path, explanation: Explanation) -> dict[str, Image]:
    from lmr_tools.sources import parse_source, read_photo

    sources = [parse_source(str(text)) for text in read_manifest(dataset).get("sources") or []]
    names = [explanation.target.image_id, *(row.ref_image for row in explanation.rows)]
    rows: list[ImageRow] = _select(dataset, "images", ImageRow, "image_id", names)
    if any(row.source >= len(sources) for row in rows):
        raise LmrError("dataset.json names fewer sources than images")
    return {row.image_id: read_photo(sources, row) for row in rows}


def _matches(target: Image, image: Image, pair: PairRow | None, recipe: Mapping[str, Any]) -> tuple[Any, Any]:
    """Matched points (n, 2) of both pictures; none where the pair was not verified by matches of its own."""
    if pair is None or pair.hops != 1:
        return np.zeros((0, 2)), np.zeros((0, 2))
    from lmr_tools.features import extract_features
    from lmr_tools.geometry import match_pair

    limits = {name: recipe[name] for name in ("max_side", "max_features") if isinstance(recipe.get(name), int)}
    geometry = match_pair(extract_features(target, **limits), extract_features(image, **limits))
    return np.asarray(geometry.points_a, np.float64), np.asarray(geometry.points_b, np.float64)
