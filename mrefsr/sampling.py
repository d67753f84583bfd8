"""Which sample stands where in a training run, and what is made of it: pure functions of (seed, position).

`position` counts the samples of all ranks since the start of the run, over all epochs. Nothing depends on workers,
ranks or on what was read before, so a run goes on from any position in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np

from lmr_tools.images import downscale, upscale
from lmr_tools.schema import Group, LmrError

if TYPE_CHECKING:
    import numpy.typing as npt

    from lmr_tools.schema import Image

SCALE = 4
# Streams of random numbers, one for each thing that is drawn.
ORDER, SAMPLE, VALIDATION, PAIR, VALIDATION_PAIR = range(5)


@dataclass(frozen=True, kw_only=True)
class SampleRule:
    """What is made of a stored group. The defaults are the published recipe with 1 to 5 references.

    crop: side of the target's random window, pixels, a multiple of 4.
    augment: flips and transposition, the same for target and references; off: none.
    min_references, max_references: a sample gets a number of its references drawn evenly from this range (or all it
        has, when they are fewer), in random order.
    reference_crop: "same" takes the target's window of every reference crop, as published: a stored reference crop is
        centred where the target's centre lands, so the same window shows about the same place. "whole" keeps all of
        it: whatever the target's window shows is then inside when the whole crops overlap, at the price of matching
        against more pixels (3.5 times for 160 of 300).
    no_reference_share: share of the samples that get no reference at all.
    wrong_share: share of the samples in which some of the references (evenly 1 to all) are replaced by references of a
        group of another scene, among those that get references.
    """

    crop: int = 160
    augment: bool = True
    min_references: int = 1
    max_references: int = 5
    reference_crop: Literal["same", "whole"] = "same"
    no_reference_share: float = 0.0
    wrong_share: float = 0.0

    def __post_init__(self) -> None:
        if self.crop < 3 * SCALE or self.crop % SCALE:
            raise LmrError(f"crop {self.crop}: must be a multiple of {SCALE}, at least {3 * SCALE}")
        if not 0 <= self.min_references <= self.max_references <= 100:
            raise LmrError(
                f"min_references {self.min_references}, max_references {self.max_references}: need "
                "0 <= min_references <= max_references <= 100"
            )
        if self.reference_crop not in ("same", "whole"):
            raise LmrError(f"reference_crop {self.reference_crop!r}: must be 'same' or 'whole'")
        for name in ("no_reference_share", "wrong_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise LmrError(f"{name} {getattr(self, name)}: must be between 0 and 1")


class Draws:
    """Random numbers of one (seed, stream, number).

    Only the raw bits of Philox are used: unlike numpy's distributions they stay the same in every version of numpy, so
    a run may go on under another one.
    """

    def __init__(self, seed: int, stream: int, number: int) -> None:
        key = np.array([seed & (2**64 - 1), 0], np.uint64)
        self._bits = np.random.Philox(key=key, counter=np.array([0, number, stream, 0], np.uint64))

    def raw(self, count: int) -> npt.NDArray[np.uint64]:
        """`count` numbers of 64 random bits."""
        return np.asarray(self._bits.random_raw(count), np.uint64)

    def below(self, limit: int) -> int:
        """An integer from 0 to limit - 1."""
        return int(self.raw(1)[0]) % limit

    def unit(self) -> float:
        """A float in [0, 1)."""
        return (int(self.raw(1)[0]) >> 11) * 2.0**-53

    def order(self, count: int) -> list[int]:
        """0 to count - 1 in random order."""
        return [int(place) for place in np.argsort(self.raw(count), kind="stable")]


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order of `count` samples in one epoch: each once."""
    order = np.argsort(Draws(seed, ORDER, epoch).raw(count), kind="stable").astype(np.int64)
    order.flags.writeable = False
    return order


def sample_at(position: int, count: int, seed: int) -> int:
    """Number of the sample at a position of the run."""
    epoch, place = divmod(position, count)
    return int(epoch_order(count, seed, epoch)[place])


class SceneMap:
    """Samples by scene, to name one of another scene at once. `scenes` int N: the scene of each sample."""

    def __init__(self, scenes: npt.NDArray[np.int64]) -> None:
        self._scenes = scenes
        self._sorted = np.argsort(scenes, kind="stable")
        self._sizes = np.bincount(scenes)
        self._starts = np.cumsum(self._sizes) - self._sizes

    def elsewhere(self, number: int) -> int:
        """How many samples show another scene than sample `number`."""
        return len(self._scenes) - int(self._sizes[self._scenes[number]])

    def other(self, number: int, draws: Draws) -> int:
        """One of those, evenly drawn."""
        scene = self._scenes[number]
        place = draws.below(self.elsewhere(number))
        return int(self._sorted[place + (self._sizes[scene] if place >= self._starts[scene] else 0)])


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is decided of a sample before it is read; `draws` goes on where planning stopped."""

    number: int
    wrong: int | None  # the sample that wrong references come from
    x: int
    y: int
    turns: int  # bit 0: left-right, bit 1: top-bottom, bit 2: transposed
    count: int  # references, at most
    draws: Draws


def plan_sample(position: int, *, rule: SampleRule, seed: int, size: int, scenes: SceneMap, count: int) -> Plan:
    """Decide about the sample at `position` of a split of `count` samples whose crops have `size` pixels a side."""
    number = sample_at(position, count, seed)
    draws = Draws(seed, SAMPLE, position)
    # Every number is drawn for every sample, in this order: an option does not change what the others give.
    x, y = (draws.below(size - rule.crop + 1) for _ in "xy")
    turns = draws.below(8)
    references = rule.min_references + draws.below(rule.max_references - rule.min_references + 1)
    without, wrong = draws.unit() < rule.no_reference_share, draws.unit() < rule.wrong_share
    other = scenes.other(number, draws) if scenes.elsewhere(number) else None
    return Plan(
        number=number,
        wrong=other if wrong and not without and references else None,
        x=x,
        y=y,
        turns=turns if rule.augment else 0,
        count=0 if without else references,
        draws=draws,
    )


def choose_references(plan: Plan, right: int, wrong: int) -> tuple[list[int], list[int], list[int]]:
    """Which of `right` references of the sample and of `wrong` ones of the other sample are taken, and their order.

    The order goes over the right ones taken, then the wrong ones taken.
    """
    own, others = plan.draws.order(right), plan.draws.order(wrong)
    count = min(plan.count, right)
    replaced = min(1 + plan.draws.below(count), wrong) if plan.wrong is not None and count else 0
    order = plan.draws.order(count)
    return own[: count - replaced], others[:replaced], order


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample, RGB uint8: lr h,w,3; enlarged and target 4h,4w,3; references H,W,3 each."""

    group_id: str
    lr: Image
    enlarged: Image
    target: Image
    references: tuple[Image, ...]


def make_sample(group: Group, references: Sequence[Image], plan: Plan, rule: SampleRule) -> Sample:
    """Cut, turn and scale down one group. Raises LmrError when a stored crop is smaller than the window."""
    window = (slice(plan.y, plan.y + rule.crop), slice(plan.x, plan.x + rule.crop))

    def cut(image: Image) -> Image:
        if min(image.shape[0] - plan.y, image.shape[1] - plan.x) < rule.crop:
            height, width = image.shape[:2]
            raise LmrError(f"group {group.group_id}: a crop of {width}x{height} is smaller than the others")
        return turned(image[window], plan.turns)

    shown = [cut(image) if rule.reference_crop == "same" else turned(image, plan.turns) for image in references]
    return with_lr(group.group_id, cut(group.target), shown)


def with_lr(group_id: str, target: Image, references: Sequence[Image]) -> Sample:
    """A sample of a target whose sides are multiples of 4: LR by the protocol's bicubic from its 8 bits, then x4."""
    lr = downscale(target, SCALE)
    return Sample(group_id=group_id, lr=lr, enlarged=upscale(lr, SCALE), target=target, references=tuple(references))


def turned(image: Image, turns: int) -> Image:
    """The picture H,W,3 under one of the eight symmetries of the square (see `Plan.turns`)."""
    if turns & 1:
        image = image[:, ::-1]
    if turns & 2:
        image = image[::-1]
    if turns & 4:
        image = image.transpose(1, 0, 2)
    return np.ascontiguousarray(image)
