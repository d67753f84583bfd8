"""Samples of a built dataset -> batches: read by range, decoded in worker processes, in an order the seed sets.

Pictures stay 8-bit until they are where they are needed: a quarter of the bytes to move.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from lmr_tools.schema import LmrError
from lmr_tools.stream import SampleStore, StoredSample, open_samples
from mrefsr.loading import in_order
from mrefsr.sampling import (
    SCALE,
    VALIDATION,
    Draws,
    Plan,
    Sample,
    SceneMap,
    choose_references,
    make_sample,
    plan_sample,
    with_lr,
)
from mrefsr.sampling import SampleRule as SampleRule

if TYPE_CHECKING:
    from lmr_tools.schema import Image


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B samples, RGB in [0, 1], float32; N is the largest number of references of a sample, possibly 0."""

    lr: Tensor  # B,3,h,w
    enlarged: Tensor  # B,3,4h,4w: Pillow bicubic x4 of the 8-bit LR, 8-bit
    target: Tensor  # B,3,4h,4w
    references: Tensor  # B,N,3,H,W; zeros where absent
    mask: Tensor  # bool B,N: which references exist
    group_ids: tuple[str, ...]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Batch:
        """The batch on a device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which a GPU copies without waiting."""
        return self._each(Tensor.pin_memory)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            lr=change(self.lr),
            enlarged=change(self.enlarged),
            target=change(self.target),
            references=change(self.references),
            mask=change(self.mask),
            group_ids=self.group_ids,
        )


def train_batches(
    dataset: str | Path | SampleStore,
    *,
    rule: SampleRule,
    batch_size: int,
    seed: int,
    position: int = 0,
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    split: str = "train",
    device: torch.device | str = "cpu",
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """Training batches without end: each epoch is a seeded order of all samples of the split.

    `position` is the number of samples that all ranks together have consumed since the start of the run: to go on,
    pass that number. Step i of rank r takes the samples position + (i * world_size + r) * batch_size and on, so all
    ranks make equal steps, epochs join inside a batch, and another `world_size` or number of `workers` goes on from
    the same sample. A batch follows from the dataset, `rule`, `seed` and its positions alone.

    dataset: folder or fsspec URL of a built dataset, or an opened split of one.
    workers: processes that read and decode, each `prefetch` batches ahead; 0: this process does it.
    device: where the batches go; to a GPU they are copied from page-locked memory without waiting.

    Raises LmrError at the call: no dataset, a missing or cut shard, a crop larger than the stored ones, too few groups;
    and while reading: an altered shard, by name. Close the iterator to end the workers.
    """
    store = dataset if isinstance(dataset, SampleStore) else open_samples(dataset, split)
    if batch_size < 1 or position < 0 or not 0 <= rank < world_size or workers < 0:
        raise LmrError(
            f"batch_size {batch_size}, position {position}, rank {rank} of {world_size}, workers {workers}: impossible"
        )
    if rule.crop > store.size:
        raise LmrError(f"crop {rule.crop}: larger than the stored {store.size}x{store.size} crops of {store.root}")
    if len(store) < batch_size * world_size:
        ranks = f" on {world_size} ranks" if world_size > 1 else ""
        raise LmrError(
            f"{store.root}: split {store.split} has {len(store)} groups, too few for batches of {batch_size}{ranks}; "
            "take smaller batches or build a larger dataset"
        )
    scenes = SceneMap(store.scenes)
    if rule.wrong_share and not scenes.elsewhere(0):
        raise LmrError(
            f"{store.root}: wrong_share {rule.wrong_share}, but split {store.split} has one scene only; give "
            "wrong_share=0"
        )
    starts = itertools.count(position + rank * batch_size, batch_size * world_size)
    make = partial(_train_batch, store=store, rule=rule, seed=seed, scenes=scenes)
    lists = (range(start, start + batch_size) for start in starts)
    return _batches(make, lists, workers, torch.device(device), prefetch)


def validation_batches(
    dataset: str | Path | SampleStore,
    *,
    split: str = "val",
    batch_size: int = 1,
    limit: int | None = None,
    crop: int | None = None,
    references: int | None = None,
    content: Literal["right", "wrong", "none"] = "right",
    rank: int = 0,
    world_size: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    prefetch: int = 2,
) -> Generator[Batch, None, None]:
    """The groups of a split, once, in the order of its tables, nothing turned: the whole crops (to a multiple of 4).

    limit: only the first groups (they are shuffled among scenes). crop: the middle window of this side instead, of
    target and references. references: at most so many of each, in the order of the slots (H, M1, M2, L1, L2).
    content: "wrong" takes the references of a group of another scene (always the same one), "none" takes none.
    Rank r of w takes every w-th group from the r-th on: ranks may differ by one batch.
    """
    store = dataset if isinstance(dataset, SampleStore) else open_samples(dataset, split)
    side = store.size // SCALE * SCALE if crop is None else crop
    if not 3 * SCALE <= side <= store.size or side % SCALE:
        raise LmrError(f"crop {side}: must be a multiple of {SCALE} from {3 * SCALE} to the stored {store.size}")
    if content not in ("right", "wrong", "none"):
        raise LmrError(f"content {content!r}: must be 'right', 'wrong' or 'none'")
    scenes = SceneMap(store.scenes)
    if content == "wrong" and not scenes.elsewhere(0):
        raise LmrError(f"{store.root}: split {store.split} has one scene only, so no wrong references")
    numbers = range(len(store))[:limit][rank::world_size]
    make = partial(
        _validation_batch,
        store=store,
        side=side,
        corner=0 if crop is None else (store.size - side) // 2,
        references=100 if references is None else references,
        content=content,
        scenes=scenes,
    )
    lists = (numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size))
    return _batches(make, lists, workers, torch.device(device), prefetch)


def _train_batch(
    positions: Sequence[int], *, store: SampleStore, rule: SampleRule, seed: int, scenes: SceneMap
) -> Batch:
    plans = [
        plan_sample(position, rule=rule, seed=seed, size=store.size, scenes=scenes, count=len(store))
        for position in positions
    ]
    numbers = [number for plan in plans for number in (plan.number, plan.wrong) if number is not None]
    stored = dict(zip(numbers, store.read(numbers), strict=True))
    return _stack([_sample(plan, stored, rule) for plan in plans])


def _sample(plan: Plan, stored: dict[int, StoredSample], rule: SampleRule) -> Sample:
    own = stored[plan.number]
    other = None if plan.wrong is None else stored[plan.wrong]
    right, wrong, order = choose_references(plan, own.references, other.references if other else 0)
    group = own.group(decode={"target.png", *(f"ref{number}.png" for number in right)})
    pictures = [group.references[number].pixels for number in right]
    if other is not None:
        pictures += _pictures(other, wrong)
    return make_sample(group, [pictures[place] for place in order], plan, rule)


def _pictures(stored: StoredSample, numbers: Sequence[int]) -> list[Image]:
    group = stored.group(decode={f"ref{number}.png" for number in numbers})
    return [group.references[number].pixels for number in numbers]


def _validation_batch(
    numbers: Sequence[int],
    *,
    store: SampleStore,
    side: int,
    corner: int,
    references: int,
    content: str,
    scenes: SceneMap,
) -> Batch:
    others = [
        scenes.other(number, Draws(0, VALIDATION, number)) if content == "wrong" else number for number in numbers
    ]
    wanted = list(dict.fromkeys([*numbers, *others]))
    stored = dict(zip(wanted, store.read(wanted), strict=True))
    window = (slice(corner, corner + side), slice(corner, corner + side))
    samples = []
    for number, other in zip(numbers, others, strict=True):
        target = stored[number].group(decode={"target.png"})
        count = 0 if content == "none" else min(references, stored[other].references)
        shown = [np.ascontiguousarray(picture[window]) for picture in _pictures(stored[other], range(count))]
        samples.append(with_lr(target.group_id, np.ascontiguousarray(target.target[window]), shown))
    return _stack(samples)


def _stack(samples: Sequence[Sample]) -> Batch:
    """A batch whose pictures are still uint8."""
    most = max(len(sample.references) for sample in samples)
    shape = next((s.references[0].shape[:2] for s in samples if s.references), samples[0].target.shape[:2])
    references = np.zeros((len(samples), most, 3, *shape), np.uint8)
    mask = torch.zeros(len(samples), most, dtype=torch.bool)
    for row, sample in enumerate(samples):
        for slot, picture in enumerate(sample.references):
            if picture.shape[:2] != shape:
                height, width = picture.shape[:2]
                raise LmrError(f"group {sample.group_id}: a reference of {width}x{height} among {shape[1]}x{shape[0]}")
            references[row, slot] = picture.transpose(2, 0, 1)
            mask[row, slot] = True
    return Batch(
        lr=_tensor([sample.lr for sample in samples]),
        enlarged=_tensor([sample.enlarged for sample in samples]),
        target=_tensor([sample.target for sample in samples]),
        references=torch.from_numpy(references),
        mask=mask,
        group_ids=tuple(sample.group_id for sample in samples),
    )


def _tensor(pictures: Sequence[Image]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.stack(pictures).transpose(0, 3, 1, 2)))


def _batches(
    make: Callable[[Sequence[int]], Batch],
    lists: Iterator[Sequence[int]],
    workers: int,
    device: torch.device,
    prefetch: int,
) -> Generator[Batch, None, None]:
    """Batches in order, float32 on the device; made ahead by workers if there are any."""
    pinned = device.type == "cuda"
    with closing(in_order(make, lists, workers=workers, prefetch=prefetch, pin_memory=pinned and workers > 0)) as made:
        for batch in made:
            moved = batch.to(device, non_blocking=pinned)
            yield moved._each(lambda tensor: tensor if tensor.dtype == torch.bool else tensor / 255)
