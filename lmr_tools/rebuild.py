"""A dataset again from its tables and the photos alone: the tables say what to cut where.

`dataset.json` and `tables/` are all that is needed of the old dataset. Imports `dataset`, whose tables it reads,
`groups` and `sharding`, whose plans it makes from tables, and `shards`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lmr_tools.dataset import MANIFEST, TABLES, read_manifest, table_path, versions
from lmr_tools.groups import PlannedGroup, PlannedReference
from lmr_tools.schema import GroupRow, ImageRow, LmrError, Split
from lmr_tools.sharding import NamedGroup, ShardPlan
from lmr_tools.shards import WrittenShard
from lmr_tools.tables import read_table, rows_of, sha256_file

# What every manifest holds; anything else (removed, imported, merged) is carried on.
STANDARD = {
    *("format", "version", "seed", "recipe", "sources", "versions", "embedder", "index", "counts", "tables"),
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """A dataset without its pixels: the folder, the manifest, the tables, all checked against the manifest."""

    folder: Path
    manifest: Mapping[str, Any]
    tables: Mapping[str, pa.Table]

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe of the build."""
        recipe: Mapping[str, Any] = self.manifest["recipe"]
        return recipe

    @property
    def more(self) -> dict[str, Any]:
        """What the manifest holds beyond what every manifest does."""
        return {name: value for name, value in self.manifest.items() if name not in STANDARD}


def read_published(path: Path) -> Published:
    """Read `dataset.json` (or the folder that holds it) and all tables; LmrError when one is not as published."""
    folder = path.parent if path.name == MANIFEST else path
    manifest = read_manifest(folder)
    tables = {}
    for name in TABLES:
        file = table_path(folder, name)
        if not file.is_file():
            raise LmrError(f"{file}: is missing; {MANIFEST} and all of tables/ are needed")
        entry = manifest.get("tables", {}).get(name)
        if not isinstance(entry, dict) or entry.get("sha256") != sha256_file(file):
            raise LmrError(f"{file}: is not the table that {MANIFEST} names (sha256); get both of one publication")
        tables[name] = read_table(file)
    if not isinstance(manifest.get("recipe"), dict):
        raise LmrError(f"{folder / MANIFEST}: holds no recipe")
    return Published(folder=folder, manifest=manifest, tables=tables)


def image_rows(tables: Mapping[str, pa.Table]) -> dict[str, ImageRow]:
    """The photos by image id."""
    return {row.image_id: row for row in rows_of(tables["images"], ImageRow)}


def used_photos(tables: Mapping[str, pa.Table], images: Mapping[str, ImageRow]) -> list[ImageRow]:
    """The photos that the groups are cut from, in the order of the `images` table."""
    groups = tables["groups"]
    used = {*groups["target_image"].to_pylist(), *groups["ref_image"].to_pylist()}
    if strange := sorted(used - images.keys()):
        raise LmrError(f"tables/groups.parquet: {strange[0]} is not a photo of images; run lmr verify on the original")
    return [row for row in images.values() if row.image_id in used]


def plans_of(
    groups: Iterable[GroupRow], images: Mapping[str, ImageRow], places: Mapping[str, ImageRow]
) -> list[ShardPlan]:
    """The plan of every shard, from the rows of `groups`; `places` says where the photos lie now."""
    shards: dict[str, dict[str, list[GroupRow]]] = {}
    for row in groups:
        shards.setdefault(row.shard, {}).setdefault(row.group_id, []).append(row)
    plans = []
    for shard, own in shards.items():
        first = next(iter(own.values()))[0]
        needed = sorted({i for rows in own.values() for row in rows for i in (row.target_image, row.ref_image)})
        plans.append(
            ShardPlan(
                name=Path(shard).name.removesuffix(".tar"),
                split=Split(first.split),
                size=first.size,
                groups=tuple(_named(rows) for rows in own.values()),
                photos=tuple(images[image_id] for image_id in needed),
                moved=tuple(places[image_id] for image_id in needed if image_id in places),
            )
        )
    return plans


def _named(rows: Sequence[GroupRow]) -> NamedGroup:
    first = rows[0]
    references = tuple(
        PlannedReference(
            image_id=row.ref_image,
            slot=row.slot,
            tier=row.tier,
            overlap=row.overlap,
            scale_ratio=row.scale_ratio,
            clip_score=row.clip_score,
            x=row.ref_x,
            y=row.ref_y,
            landing=row.landing,
        )
        for row in rows
    )
    plan = PlannedGroup(target_image=first.target_image, x=first.target_x, y=first.target_y, references=references)
    return NamedGroup(group_id=first.group_id, scene=first.scene, plan=plan)


def unlike(published: Published, groups: pa.Table, written: Iterable[WrittenShard]) -> list[str]:
    """Names of rebuilt shards whose bytes are not those published, among those that hold the same groups.

    `groups` is the table of the new dataset. A shard is recognised by its groups and references, not by its name; one
    that lost some has nothing to be compared with.
    """
    hashes = dict(zip(*(published.tables["shards"][c].to_pylist() for c in ("shard", "sha256")), strict=True))
    old = {content: hashes.get(shard) for shard, content in _contents(published.tables["groups"]).items()}
    new = _contents(groups)
    return [s.row.shard for s in written if old.get(new[s.row.shard], s.row.sha256) != s.row.sha256]


def _contents(groups: pa.Table) -> dict[str, tuple[tuple[str, str], ...]]:
    held: dict[str, list[tuple[str, str]]] = {}
    columns = (groups[name].to_pylist() for name in ("shard", "group_id", "ref_image"))
    for shard, group_id, reference in zip(*columns, strict=True):
        held.setdefault(shard, []).append((group_id, reference))
    return {shard: tuple(content) for shard, content in held.items()}


def other_versions(manifest: Mapping[str, Any]) -> str:
    """Which packages differ from those of the build, in words; empty when none does."""
    then, now = manifest.get("versions") or {}, versions()
    changed = [
        f"{name} {then.get(name) or 'absent'} then, {now.get(name) or 'absent'} now"
        for name in ("lmr-tools", "pillow", "numpy")
        if then.get(name) != now.get(name)
    ]
    return "; ".join(changed)
