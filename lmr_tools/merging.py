"""Several datasets as one: photos by content, places that are one, groups that may stay, and the tars they come from.

Nothing is measured or cut again. What can not be in one dataset with what came before it is left out and counted:
places that another part holds out, groups that are there already, pairs that two parts measured differently. Imports
`dropping`, `holdout`, `places`, `rebuild` (whose published tables it joins), `removal` and `transplant`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lmr_tools.dropping import shard_names
from lmr_tools.holdout import Claim, settle
from lmr_tools.places import shared_places
from lmr_tools.rebuild import Published
from lmr_tools.removal import NEAR_BITS
from lmr_tools.schema import (
    CandidateRow,
    GroupRow,
    ImageRow,
    LmrError,
    PairRow,
    RejectRow,
    Split,
    arrow_schema,
)
from lmr_tools.tables import fingerprint, rows_of
from lmr_tools.transplant import Graft

ANNOTATION = "annotation"


@dataclass(frozen=True, kw_only=True)
class Part:
    """One dataset to merge. `tables` are its tables without photos on the removal list."""

    published: Published
    tables: Mapping[str, pa.Table]

    @property
    def name(self) -> str:
        """Its folder's name."""
        return self.published.folder.absolute().name


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A group that stays: its part, its id and its shard there, and its rows as they are in the merged dataset."""

    part: int
    old_id: str
    old_shard: str
    rows: tuple[GroupRow, ...]


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What a merge gives: photos and rejects, groups with their tars, and what was left out, by reason."""

    images: tuple[ImageRow, ...]
    rejects: tuple[RejectRow, ...]
    groups: tuple[Taken, ...]
    left_out: Mapping[str, int]
    close: int  # pairs of photos in two parts that differ by a few bits of their hash


def check_parts(parts: Sequence[Published]) -> None:
    """LmrError when the datasets can not be one."""
    seen: dict[str, Published] = {}
    for part in parts:
        first = parts[0]
        if part.recipe.get("size") != first.recipe.get("size"):
            raise LmrError(
                f"{part.folder}: crops of {part.recipe.get('size')} pixels, but {first.recipe.get('size')} in "
                f"{first.folder}; only datasets with one crop size can be merged"
            )
        key = fingerprint(part.manifest["tables"])
        if key in seen:
            raise LmrError(f"{part.folder}: is the same dataset as {seen[key].folder}; name each once")
        seen[key] = part


def near_bits(parts: Iterable[Published]) -> int:
    """How far the hashes of copies may differ: the most that a part's recipe says."""
    given = (part.recipe.get("near_hash_bits") for part in parts)
    return max((bits for bits in given if isinstance(bits, int)), default=NEAR_BITS)


def merge_parts(parts: Sequence[Part], *, max_bits: int) -> Merged:
    """Plan the merged dataset; of equal things the earlier part's stays."""
    images, rejects = _photos(parts)
    own_groups = [_groups(part) for part in parts]
    flat = [(number, rows) for number, groups in enumerate(own_groups) for rows in groups]
    claims = [
        Claim(
            scene=f"{number}:{rows[0].scene}",
            split=Split(rows[0].split),
            photos=(rows[0].target_image, *(row.ref_image for row in rows)),
        )
        for number, rows in flat
    ]
    links, close = shared_places([part.tables for part in parts], max_bits=max_bits)
    place, reasons = settle(claims, links)
    left_out: Counter[str] = Counter()
    taken: list[Taken] = []
    ids: set[str] = set()
    contents: set[tuple[Any, ...]] = set()
    numbers: dict[tuple[str, str], tuple[Any, ...]] = {}
    old_shard = [_shards_of(part.published) for part in parts]
    for (number, rows), claim, reason in zip(flat, claims, reasons, strict=True):
        why = "place is held out by another part" if reason else _refusal(rows, contents, numbers)
        if why:
            left_out[f"{parts[number].name}: {why}"] += 1
            continue
        contents.add(_content(rows))
        numbers |= {(row.target_image, row.ref_image): _numbers(row) for row in rows}
        new_id = _free_id(rows[0], ids)
        ids.add(new_id)
        scene = place[claim.scene].split(":", 1)[1]
        taken.append(
            Taken(
                part=number,
                old_id=rows[0].group_id,
                old_shard=old_shard[number][rows[0].group_id],
                rows=tuple(replace(row, group_id=new_id, scene=scene) for row in rows),
            )
        )
    return Merged(
        images=tuple(images),
        rejects=tuple(rejects),
        groups=tuple(_in_shards(taken)),
        left_out=dict(sorted(left_out.items())),
        close=close,
    )


def _photos(parts: Sequence[Part]) -> tuple[list[ImageRow], list[RejectRow]]:
    """Every photo once: good if it is good in any part. Sources are counted through all parts."""
    images: dict[str, ImageRow] = {}
    rejects: dict[str, RejectRow] = {}
    lines: list[RejectRow] = []
    offset = 0
    for part in parts:
        why = {row.image_id: row for row in rows_of(part.tables["rejects"], RejectRow)}
        lines += [row for row in why.values() if row.stage == ANNOTATION]
        for row in rows_of(part.tables["images"], ImageRow):
            # Without readable bytes the id comes from the place, which has a new number here.
            place = fingerprint(row.source + offset, row.path, row.offset)
            name = row.image_id if row.sha256 else f"path-{place}"
            moved = replace(row, image_id=name, source=row.source + offset)
            known = images.get(name)
            if known is not None and known.sha256 != moved.sha256:
                raise LmrError(f"{part.published.folder}: photo {name} is another one in a dataset before it")
            if known is None or (known.status == "rejected" and moved.status != "rejected"):
                images[name] = moved
                rejects.pop(name, None)
                if moved.status == "rejected":
                    rejects[name] = replace(why[row.image_id], image_id=name)
            elif known.no_target and not moved.no_target and moved.status != "rejected":
                images[name] = replace(known, no_target=None)
        offset += len(part.published.manifest["sources"])
    return list(images.values()), [*rejects.values(), *lines]


def _groups(part: Part) -> list[list[GroupRow]]:
    groups: dict[str, list[GroupRow]] = {}
    for row in rows_of(part.tables["groups"], GroupRow):
        groups.setdefault(row.group_id, []).append(row)
    return list(groups.values())


def _shards_of(published: Published) -> dict[str, str]:
    groups = published.tables["groups"]
    return dict(zip(groups["group_id"].to_pylist(), groups["shard"].to_pylist(), strict=True))


def _content(rows: Sequence[GroupRow]) -> tuple[Any, ...]:
    first = rows[0]
    return (
        first.target_image,
        first.target_x,
        first.target_y,
        *((r.ref_image, r.ref_x, r.ref_y, r.slot) for r in rows),
    )


def _numbers(row: GroupRow) -> tuple[Any, ...]:
    return row.tier, row.overlap, row.scale_ratio, row.clip_score


def _refusal(
    rows: Sequence[GroupRow], contents: set[tuple[Any, ...]], numbers: Mapping[tuple[str, str], tuple[Any, ...]]
) -> str:
    if _content(rows) in contents:
        return "the same group is there already"
    for row in rows:
        known = numbers.get((row.target_image, row.ref_image))
        if known is not None and known != _numbers(row):
            return "another part measured one of its pairs differently"
    return ""


def _free_id(row: GroupRow, ids: set[str]) -> str:
    name, number = row.group_id, 0
    while name in ids:
        name = f"{row.target_image}-{number}"
        number += 1
    return name


def _in_shards(taken: Sequence[Taken]) -> list[Taken]:
    """The groups ordered by shard, with the names of the new shards: one for every old one that keeps a group."""
    old: dict[str, list[Taken]] = {}
    for group in taken:
        old.setdefault(f"{group.part}/{group.old_shard}", []).append(group)
    names = shard_names({key: members[0].rows[0].split for key, members in old.items()})
    return [
        replace(group, rows=tuple(replace(row, shard=names[key]) for row in group.rows))
        for key in names
        for group in old[key]
    ]


def grafts(parts: Sequence[Part], merged: Merged) -> list[Graft]:
    """How each tar of the merged dataset comes from a tar of a part."""
    paths = {row.image_id: row.path for row in merged.images}
    before = [{rows[0].group_id: tuple(rows) for rows in _groups_before(part.published)} for part in parts]
    old_paths = [
        dict(zip(*(part.published.tables["images"][c].to_pylist() for c in ("image_id", "path")), strict=True))
        for part in parts
    ]
    held = [Counter(_shards_of(part.published).values()) for part in parts]
    hashes = [
        dict(zip(*(part.published.tables["shards"][c].to_pylist() for c in ("shard", "sha256")), strict=True))
        for part in parts
    ]
    shards: dict[str, list[Taken]] = {}
    for group in merged.groups:
        shards.setdefault(group.rows[0].shard, []).append(group)
    made = []
    for name, members in shards.items():
        part, shard = members[0].part, members[0].old_shard
        photos = {i for g in members for row in g.rows for i in (row.target_image, row.ref_image)}
        same = all(
            _unnamed(g.rows) == _unnamed(before[part][g.old_id]) and g.rows[0].group_id == g.old_id for g in members
        )
        made.append(
            Graft(
                name=name,
                donor=parts[part].published.folder / "shards" / Path(shard).name,
                donor_sha256=hashes[part].get(shard, ""),
                groups=tuple((g.old_id, g.rows) for g in members),
                paths={i: paths[i] for i in sorted(photos)},
                whole=same
                and len(members) == held[part][shard]
                and all(old_paths[part][i] == paths[i] for i in photos),
            )
        )
    return made


def _groups_before(published: Published) -> list[list[GroupRow]]:
    return _groups(Part(published=published, tables=published.tables))


def _unnamed(rows: Iterable[GroupRow]) -> tuple[GroupRow, ...]:
    """Rows without the name of their shard, which stands in no tar."""
    return tuple(replace(row, shard="") for row in rows)


def pair_tables(parts: Sequence[Part], merged: Merged) -> dict[str, pa.Table]:
    """The `candidates` and `pairs` of all parts, each pair once: as the groups that stay have it, else the earliest."""
    owner = {(r.target_image, r.ref_image): g.part for g in reversed(merged.groups) for r in g.rows}
    tables = {}
    for name, row_type in (("candidates", CandidateRow), ("pairs", PairRow)):
        schema = arrow_schema(row_type)
        frames = [part.tables[name].select(["target_image", "ref_image"]).to_pandas() for part in parts]
        keys = pd.concat([frame.assign(part=number) for number, frame in enumerate(frames)], ignore_index=True)
        again = keys.duplicated(["target_image", "ref_image"], keep=False)
        keep = ~again
        chosen: set[tuple[str, str]] = set()
        # Few pairs are in two parts: only those are looked at one by one, first those that groups use in their part.
        for wanted in (True, False):
            for place, target, reference, number in keys[again].itertuples(name=None):
                key = (str(target), str(reference))
                mine = name == "pairs" and owner.get(key) == number
                if key not in chosen and (mine or not wanted):
                    chosen.add(key)
                    keep[place] = True
        whole = pa.concat_tables([part.tables[name].select(schema.names).cast(schema) for part in parts])
        tables[name] = whole.filter(pa.array(keep.to_numpy()))
    return tables


def embeddings(parts: Sequence[Part]) -> tuple[pa.Table | None, dict[str, Any]]:
    """(the vectors of all photos, the encoder); no vectors when the parts used several encoders, or none."""
    encoders = [dict(part.published.manifest["embedder"]) for part in parts]
    first = encoders[0]
    if any(encoder.get(name) != first.get(name) for encoder in encoders for name in ("key", "dimension", "views")):
        names = sorted({str(encoder.get("model") or "none") for encoder in encoders})
        return None, {"model": f"several: {', '.join(names)}", "key": None, "dimension": None, "views": None}
    if first.get("dimension") is None:
        return None, first
    seen: set[str] = set()
    tables = []
    for part in parts:
        table = part.tables["embeddings"]
        tables.append(
            table.filter(pc.invert(pc.is_in(table["image_id"], value_set=pa.array(sorted(seen), pa.string()))))
        )
        seen |= set(table["image_id"].to_pylist())
    return pa.concat_tables(tables), first


def common_recipe(parts: Sequence[Published]) -> dict[str, Any]:
    """What the recipes agree in; null where they differ. Partial groups are allowed if one part allowed them."""
    names = {name: None for part in parts for name in part.recipe}
    recipe = {
        name: parts[0].recipe.get(name) if len({fingerprint(p.recipe.get(name)) for p in parts}) == 1 else None
        for name in names
    }
    return {"seed": None, **recipe, "allow_partial": any(part.recipe.get("allow_partial") for part in parts)}


def origin(part: Part, number: int, merged: Merged, manifest_sha256: str) -> dict[str, Any]:
    """What dataset.json says of one part."""
    manifest = part.published.manifest
    return {
        "name": part.name,
        "manifest_sha256": manifest_sha256,
        "groups": len(set(part.published.tables["groups"]["group_id"].to_pylist())),
        "taken": sum(group.part == number for group in merged.groups),
        **{name: manifest[name] for name in ("recipe", "versions", "sources", "embedder", "index")},
        **{name: value for name, value in part.published.more.items() if name != "removed"},
    }
