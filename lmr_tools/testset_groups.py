"""The LMR test set as groups of ours: each folder's target with the references that lie beside it, and no others.

Photos go by content, since a photo lies in many folders. Imports `grading`, `groups` and `testset_layouts`, whose
results it joins.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from lmr_tools.grading import Corpus, pair_rows, tasks
from lmr_tools.groups import Plan, Task
from lmr_tools.schema import ImageRow, PairRow, RejectRow
from lmr_tools.testset_layouts import Entry

STAGE = "annotation"
SCENE_DIGITS = 4  # a folder is named `<scene>_<target file>`

Of = TypeVar("Of")


@dataclass(frozen=True, kw_only=True)
class Listed:
    """What the folders say. Row numbers index `photos`, whose `scene` is the scene of the test set.

    references: per target row, the rows beside it in the folder, sorted. `folder_of`: the folder of each target row.
    """

    photos: tuple[ImageRow, ...]
    references: Mapping[int, tuple[int, ...]]
    folder_of: Mapping[int, str]
    rejects: tuple[RejectRow, ...]

    def candidates(self) -> npt.NDArray[np.int32]:
        """(N, k) row numbers of each target's references, -1 for none, as a mined list would be."""
        longest = max((len(rows) for rows in self.references.values()), default=0)
        table = np.full((len(self.photos), max(longest, 1)), -1, np.int32)
        for target, rows in self.references.items():
            table[target, : len(rows)] = rows
        return table


def listed_groups(
    entries: Sequence[Entry], data: Path, found: Sequence[ImageRow], staying: Sequence[ImageRow]
) -> Listed:
    """Join the folders with the photos that were looked at; `staying` are those of `found` that are no copies.

    A folder whose target can not be used, repeats another folder's, or has no usable reference is a reject.
    """
    number = {row.sha256: place for place, row in enumerate(staying)}
    row_of = {row.path: number[row.sha256] for row in found if row.sha256 in number}
    references: dict[int, tuple[int, ...]] = {}
    folder_of: dict[int, str] = {}
    scene_of: dict[int, str] = {}
    rejects = []

    def refuse(entry: Entry, reason: str, detail: str) -> None:
        name = f"folder-{entry.image_id}"
        rejects.append(RejectRow(image_id=name, path=entry.image_id, stage=STAGE, reason=reason, detail=detail))

    for entry in entries:
        target = row_of.get(entry.target.relative_to(data).as_posix())
        paths = [reference.path for reference in entry.references if reference.path is not None]
        beside = {row_of.get(path.relative_to(data).as_posix()) for path in paths}
        rows = tuple(sorted(row for row in beside if row is not None and row != target))
        if target is None:
            refuse(entry, "photo not usable", f"{entry.target.name}: see the rejects of stage scan")
        elif target in references:
            refuse(entry, "repeated target", f"the same photo as the target of {folder_of[target]}")
        elif not rows:
            refuse(entry, "photo not usable", "no reference is left: see the rejects of stage scan")
        else:
            references[target], folder_of[target] = rows, entry.image_id
            for row in (target, *rows):
                scene_of.setdefault(row, entry.image_id[:SCENE_DIGITS])
    photos = tuple(replace(row, scene=scene_of.get(place)) for place, row in enumerate(staying))
    return Listed(photos=photos, references=references, folder_of=folder_of, rejects=tuple(rejects))


def own_tasks(corpus: Corpus, listed: Listed) -> Iterator[Task]:
    """The planning tasks of the targets, with the photos of their own folders only, in row order."""
    for own, task in _of_targets(corpus, listed, tasks(corpus)):
        yield replace(task, options=tuple(option for option in task.options if option.row.image_id in own))


def own_pairs(corpus: Corpus, listed: Listed, duplicates: Mapping[str, Sequence[str]]) -> Iterator[PairRow]:
    """The `pairs` rows of each target with the photos of its own folder; `duplicates` as for `pair_rows`."""
    for own, rows in _of_targets(corpus, listed, pair_rows(corpus, duplicates)):
        yield from (row for row in rows if row.ref_image in own)


def _of_targets(corpus: Corpus, listed: Listed, of_rows: Iterable[Of]) -> Iterator[tuple[set[str], Of]]:
    """(image ids beside it, what `of_rows` has of it) for each target."""
    for place, value in enumerate(of_rows):
        if place in listed.references:
            yield {corpus.rows[row].image_id for row in listed.references[place]}, value


def without_group(listed: Listed, plans: Sequence[Plan]) -> list[RejectRow]:
    """The folders that gave no group, with why."""
    folder = {listed.photos[row].image_id: name for row, name in listed.folder_of.items()}
    return [
        RejectRow(
            image_id=f"folder-{folder[plan.target_image]}",
            path=folder[plan.target_image],
            stage=STAGE,
            reason="no group",
            detail=plan.reason,
        )
        for plan in plans
        if not plan.groups
    ]
