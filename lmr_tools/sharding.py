"""Planned groups -> splits, ids and tar files: the plan as data first, then whole shards, each built by one worker.

Imports `crops`, `groups`, `shards`, `sources` and `splits`, whose work it puts together.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from lmr_tools.crops import cut
from lmr_tools.groups import PlannedGroup
from lmr_tools.schema import Group, GroupRow, ImageRow, LmrError, Reference, Split, Tier
from lmr_tools.shards import WrittenShard, index_shard, write_shard
from lmr_tools.sources import Source, read_photo
from lmr_tools.splits import assign_splits, shuffled
from lmr_tools.tables import fingerprint, read_json, write_json
from lmr_tools.workers import Mapper

if TYPE_CHECKING:
    from lmr_tools.schema import Image

SHARDS_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedGroup:
    """A planned group with its id and scene."""

    group_id: str
    scene: str
    plan: PlannedGroup


@dataclass(frozen=True, kw_only=True)
class ShardPlan:
    """One tar file to be: its name, its split, its groups in order, and the photos they need."""

    name: str
    split: Split
    size: int
    groups: tuple[NamedGroup, ...]
    photos: tuple[ImageRow, ...]
    moved: tuple[ImageRow, ...] = ()  # where photos lie now, for those that `photos` does not tell any more


def plan_shards(
    groups: Sequence[PlannedGroup],
    rows: Mapping[str, ImageRow],
    scene_of: Mapping[str, str],
    *,
    size: int,
    val_share: float,
    test_share: float,
    seed: int,
    shard_samples: int,
) -> list[ShardPlan]:
    """Give every group its id, split and shard. Groups are shuffled by the seed; `rows` and `scene_of` go by image id.

    Shards of a split differ by at most one group, so that ranks of a training run get equal work.
    """
    numbers: Counter[str] = Counter()
    named: dict[str, NamedGroup] = {}
    for plan in groups:
        group_id = f"{plan.target_image}-{numbers[plan.target_image]}"
        numbers[plan.target_image] += 1
        named[group_id] = NamedGroup(group_id=group_id, scene=scene_of[plan.target_image], plan=plan)
    per_scene = Counter(group.scene for group in named.values())
    split_of = assign_splits(per_scene, val_share=val_share, test_share=test_share, seed=seed)
    return fill_shards(named.values(), rows, split_of, size=size, seed=seed, shard_samples=shard_samples)


def fill_shards(
    groups: Iterable[NamedGroup],
    rows: Mapping[str, ImageRow],
    split_of: Mapping[str, Split],
    *,
    size: int,
    seed: int,
    shard_samples: int,
) -> list[ShardPlan]:
    """Give named groups to shards, in an order drawn from the seed; `split_of` goes by scene."""
    named = {group.group_id: group for group in groups}
    plans = []
    for split in Split:
        ids = shuffled([group_id for group_id, group in named.items() if split_of[group.scene] == split], seed)
        parts = -(-len(ids) // shard_samples)
        for part in range(parts):
            chosen = tuple(named[i] for i in ids[len(ids) * part // parts : len(ids) * (part + 1) // parts])
            needed = {g.plan.target_image for g in chosen} | {r.image_id for g in chosen for r in g.plan.references}
            photos = tuple(rows[image_id] for image_id in sorted(needed))
            plans.append(ShardPlan(name=f"{split}-{part:06d}", split=split, size=size, groups=chosen, photos=photos))
    return plans


def group_rows(plans: Sequence[ShardPlan]) -> Iterator[GroupRow]:
    """The rows of the `groups` table, one per reference, in the order of the shards."""
    for shard in plans:
        for group in shard.groups:
            for reference in group.plan.references:
                yield GroupRow(
                    group_id=group.group_id,
                    split=str(shard.split),
                    shard=f"{shard.name}.tar",
                    target_image=group.plan.target_image,
                    target_x=group.plan.x,
                    target_y=group.plan.y,
                    ref_image=reference.image_id,
                    slot=reference.slot,
                    tier=reference.tier,
                    overlap=reference.overlap,
                    scale_ratio=reference.scale_ratio,
                    clip_score=reference.clip_score,
                    ref_x=reference.x,
                    ref_y=reference.y,
                    size=shard.size,
                    scene=group.scene,
                    landing=reference.landing,
                )


def build_shards(
    plans: Sequence[ShardPlan], sources: Sequence[Source], folder: Path, work: Path, mapper: Mapper
) -> Iterator[WrittenShard]:
    """Write every shard that is not there yet as planned, in order; tars in `folder` that no plan names are removed."""
    wanted = {f"{plan.name}.tar" for plan in plans}
    for path in sorted(folder.glob("*.tar")) if folder.is_dir() else []:
        if path.name not in wanted:
            path.unlink()
    yield from mapper(partial(_build, sources=tuple(sources), folder=folder, work=work / "shards"), plans)


def _build(plan: ShardPlan, *, sources: tuple[Source, ...], folder: Path, work: Path) -> WrittenShard:
    # The pixels follow from the plan: photos go in by their hash, crops by their corners.
    key = fingerprint(SHARDS_VERSION, dataclasses.asdict(plan))
    path, receipt = folder / f"{plan.name}.tar", work / f"{plan.name}.json"
    if path.is_file() and receipt.is_file():
        try:
            kept, found = read_json(receipt), index_shard(path)
            if kept["key"] == key and kept["row"] == dataclasses.asdict(found.row):
                return found
        except (LmrError, OSError, KeyError, TypeError):
            pass  # a damaged shard or receipt: the shard is built again
    path.unlink(missing_ok=True)
    written = write_shard(path, _groups(plan, sources))
    write_json(receipt, {"key": key, "row": dataclasses.asdict(written.row)})
    return written


def _groups(plan: ShardPlan, sources: tuple[Source, ...]) -> Iterator[Group]:
    rows = {row.image_id: row for row in plan.photos}
    places = rows | {row.image_id: row for row in plan.moved}
    for named in plan.groups:
        group = named.plan
        target = rows[group.target_image]
        references = []
        for reference in group.references:
            row = rows[reference.image_id]
            references.append(
                Reference(
                    pixels=cut(_photo(sources, places[row.image_id]), reference.x, reference.y, plan.size, row.path),
                    image_id=row.image_id,
                    path=row.path,
                    slot=reference.slot,
                    tier=Tier(reference.tier),
                    overlap=reference.overlap,
                    scale_ratio=reference.scale_ratio,
                    clip_score=reference.clip_score,
                    x=reference.x,
                    y=reference.y,
                )
            )
        yield Group(
            group_id=named.group_id,
            scene=named.scene,
            split=plan.split,
            target=cut(_photo(sources, places[target.image_id]), group.x, group.y, plan.size, target.path),
            target_image=target.image_id,
            target_path=target.path,
            target_x=group.x,
            target_y=group.y,
            references=tuple(references),
        )


@lru_cache(maxsize=8)
def _photo(sources: tuple[Source, ...], row: ImageRow) -> Image:
    return read_photo(sources, row)
