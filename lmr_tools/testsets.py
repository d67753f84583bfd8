"""Test sets and built datasets as `Item`s: planned from names, read one at a time, prepared by a protocol.

`testset_layouts` knows the folders, `protocol` the preparation; datasets are read through `dataset` and `shards`. A
picture that can not be read is the failure of its item and of no other.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lmr_tools import images
from lmr_tools.dataset import read_manifest, table_path
from lmr_tools.protocol import Item, prepare
from lmr_tools.schema import GroupRow, LmrError, ShardRow, Split
from lmr_tools.shards import read_shard
from lmr_tools.tables import read_rows
from lmr_tools.testset_layouts import LAYOUTS, Entry, Plan, ReferenceEntry

if TYPE_CHECKING:
    from lmr_tools.schema import Image


def plan_testset(benchmark: str, data: Path, split: Split = Split.TEST) -> Plan:
    """The plan of a folder; `split` matters to a built dataset alone.

    LmrError names a missing file, or says what the layout expects and what was found.
    """
    if not data.is_dir():
        raise LmrError(f"{data}: no such folder; --data names the folder of {benchmark}")
    plan = _dataset(data, split) if benchmark == "dataset" else LAYOUTS[benchmark](data)
    if not plan.entries:
        raise LmrError(f"{data}: nothing to evaluate in it")
    return plan


def choose_references(entry: Entry, *, benchmark: str, count: int | None, tiers: Sequence[str]) -> Entry:
    """`entry` with the references of these tiers only (none given: all), and of those the first `count` (None: all).

    On Sun80 they are spread over the 20 instead, as in the published evaluation.
    """
    chosen = [reference for reference in entry.references if not tiers or reference.tier in tiers]
    if count is not None:
        step = max(1, len(chosen) // count) if benchmark == "sun80" and count else 1
        chosen = chosen[::step][:count]
    return dataclasses.replace(entry, references=tuple(chosen))


def read_items(entries: Iterable[Entry], *, benchmark: str, protocol: str) -> Iterator[tuple[Entry, Item | LmrError]]:
    """Each entry with its pictures, or with the reason why it has none; a dataset's entries come shard by shard.

    LmrError only for what concerns more than one entry, such as a shard that is not the one in the dataset's table.
    """

    def item(entry: Entry, target: Image, references: Sequence[Image | None]) -> Item:
        names = [reference.name for reference in entry.references]
        tiers = [reference.tier for reference in entry.references]
        return prepare(
            entry.image_id, target, references, reference_ids=names, tiers=tiers, benchmark=benchmark, protocol=protocol
        )

    by_place = itertools.groupby(entries, key=lambda entry: entry.target if entry.shard else None)
    for shard, members in by_place:
        if shard is not None:
            yield from _read_shard(shard, list(members), item)
            continue
        for entry in members:
            try:
                references = [_decoded(reference.path) if reference.path else None for reference in entry.references]
                yield entry, item(entry, _decoded(entry.target), references)
            except LmrError as error:
                yield entry, error


def _decoded(path: Path) -> Image:
    try:
        return images.decode(path.read_bytes())
    except OSError as error:
        raise LmrError(f"{path}: can not be read ({error.strerror})") from None
    except images.BadImage as error:
        raise LmrError(f"{path}: {error}") from None


def _read_shard(
    path: Path, entries: list[Entry], item: Callable[[Entry, Image, Sequence[Image | None]], Item]
) -> Iterator[tuple[Entry, Item | LmrError]]:
    waiting: dict[str, list[Entry]] = {}
    for entry in entries:
        waiting.setdefault(entry.image_id, []).append(entry)
    try:
        for group in read_shard(path, entries[0].shard, only=set(waiting)):
            pixels = {reference.slot: reference.pixels for reference in group.references}
            for entry in waiting.pop(group.group_id):
                try:
                    yield entry, item(entry, group.target, [pixels[reference.slot] for reference in entry.references])
                except (LmrError, KeyError) as error:
                    yield entry, LmrError(f"{path}: group {entry.image_id} is not as its table says ({error})")
        reason = "is in the dataset's table, but not in the shard"
    except LmrError as error:
        if not waiting:  # all was read before the shard turned out not to be the one that was built
            raise
        reason = str(error).removeprefix(f"{path}: ")
    for entry in itertools.chain.from_iterable(waiting.values()):
        yield entry, LmrError(f"{path}: group {entry.image_id}: {reason}")


def _dataset(data: Path, split: Split) -> Plan:
    read_manifest(data)
    shards = {row.shard: row for row in read_rows(table_path(data, "shards"), ShardRow)}
    rows = [row for row in read_rows(table_path(data, "groups"), GroupRow) if row.split == split]
    if not rows:
        raise LmrError(f"{data}: its {split} split has no groups; name another with --split")
    entries = []
    rows.sort(key=lambda row: (row.shard, row.group_id))  # stable: slots stay in the table's order, H M1 M2 L1 L2
    for (shard, group_id), members in itertools.groupby(rows, key=lambda row: (row.shard, row.group_id)):
        references = tuple(ReferenceEntry(name=row.ref_image, slot=row.slot, tier=row.tier) for row in members)
        path = data / "shards" / shard
        entries.append(Entry(image_id=group_id, target=path, references=references, shard=shards[shard]))
    return Plan(entries=tuple(entries))
