"""Result rows -> means with confidence intervals, and paired differences between runs.

Intervals are 95 % percentile bootstraps over pictures: what would the mean be for other pictures of the same sort. Two
runs are compared on the pictures that both have; pairing takes out that some pictures are harder than others, so a
difference can be certain where the two means' own intervals overlap widely. Pictures are the same when name and pixels
of their targets are: runs without a common picture are kept apart, whatever their test set is called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lmr_tools.schema import LmrError, ResultRow

METRICS = ("psnr_rgb", "psnr_y", "ssim_y", "lpips_alex", "lpips_vgg")
RESAMPLES = 10_000
SEED = 0
CHUNK = 1 << 22  # drawn indices held at once
KEPT = 1200  # values; their draws are kept (96 MB) for the next mean of so many

Key = tuple[str, str | None]  # image_id, target_sha256


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over `images` pictures and its 95 % interval; None where two finite values or more are not there."""

    mean: float
    low: float | None
    high: float | None
    images: int


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """One run: what it was, and its means. `images` counts pictures with numbers, `failed` rows without."""

    run_id: str
    label: str
    method: str
    benchmark: str
    protocol: str
    testset: str  # the benchmark; with a number where runs of one benchmark and protocol have no picture in common
    references: str  # how many each picture had: 5, or 2-6
    policy: str
    tiers: str  # those of the references, H,L; empty where the test set has none
    images: int
    failed: int
    means: Mapping[str, Estimate]
    seconds: float | None  # mean
    peak_memory_mb: float | None  # highest


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Mean of `run_id` minus `against`, picture by picture, over the pictures that both have."""

    testset: str
    protocol: str
    run_id: str
    label: str
    against: str
    against_label: str
    metric: str
    estimate: Estimate


def summarise(rows: Sequence[ResultRow]) -> list[RunSummary]:
    """One summary a run, in the order in which the rows come.

    LmrError when a run has two results of one picture, as the folders of two evaluations with equal settings do.
    """
    runs = _by_run(rows)
    for run in runs.values():
        _insist_on_one_result(run)
    names = name_testsets(runs)
    return [_summary(run, names[run_id]) for run_id, run in runs.items()]


def run_names(runs: Sequence[RunSummary]) -> list[str]:
    """A name for each run that no other has: the label, with what tells runs of one label apart."""

    def words(run: RunSummary) -> list[str]:
        policy = "" if run.policy in ("all", "none") else run.policy
        count = f"{run.references} reference{'' if run.references == '1' else 's'}"
        return [word for word in (count, policy, run.tiers.replace(",", "")) if word]

    names = []
    for run in runs:
        twins = [other for other in runs if other.label == run.label and other is not run]
        detail = [] if not twins else words(run)
        name = ", ".join([run.label, *detail])
        if any(detail == words(other) for other in twins):
            name += f", {run.run_id}"
        names.append(name)
    return names


def differences(rows: Sequence[ResultRow], against: str | None = None) -> list[Difference]:
    """Every run against one of the same test set and protocol: the run `against` (label or id), else the first one.

    LmrError when no run is called so.
    """
    runs = _by_run(rows)
    if against and not any(against in (run[0].label, run_id) for run_id, run in runs.items()):
        labels = ", ".join(sorted({run[0].label for run in runs.values()}))
        raise LmrError(f"--against {against}: no run has this label or id; there are {labels}")
    found, names = [], name_testsets(runs)
    for place in dict.fromkeys((names[run_id], run[0].protocol) for run_id, run in runs.items()):
        here = [run for run_id, run in runs.items() if (names[run_id], run[0].protocol) == place]
        base = next((run for run in here if against in (run[0].label, run[0].run_id)), None if against else here[0])
        for run in here:
            if base is not None and run is not base:
                found += _compared(run, base, place[0])
    return found


def name_testsets(runs: Mapping[str, Sequence[ResultRow]]) -> dict[str, str]:
    """{run_id: test set}: the benchmark's name, with (2), (3) ... for runs that share no target with those before."""
    names: dict[str, str] = {}
    known: dict[tuple[str, str], list[set[Key]]] = {}
    for run_id, run in runs.items():
        sets = known.setdefault((run[0].benchmark, run[0].protocol), [])
        targets = {_key(row) for row in run if row.target_sha256 is not None}
        place = next((number for number, other in enumerate(sets) if not targets or targets & other), len(sets))
        if place == len(sets):
            sets.append(set())
        sets[place] |= targets
        names[run_id] = run[0].benchmark + (f" ({place + 1})" if place else "")
    return names


def _key(row: ResultRow) -> Key:
    return row.image_id, row.target_sha256


def _by_run(rows: Iterable[ResultRow]) -> dict[str, list[ResultRow]]:
    runs: dict[str, list[ResultRow]] = {}
    for row in rows:
        runs.setdefault(row.run_id, []).append(row)
    return runs


def _insist_on_one_result(run: Sequence[ResultRow]) -> None:
    found: dict[tuple[str, ...], ResultRow] = {}
    for row in run:
        if row.failure is None:
            references = row.reference_ids if row.reference_policy == "each" else ""
            other = found.setdefault((row.image_id, str(row.target_sha256), references), row)
            values = [(getattr(row, metric), getattr(other, metric)) for metric in METRICS]
            if other is not row and any(a != b and a is not None and b is not None for a, b in values):
                raise LmrError(
                    f"run {row.run_id} ({row.label}): {row.image_id} has two results; give one of the folders that "
                    "hold the run, or evaluate one of them under another --label"
                )


def _summary(run: Sequence[ResultRow], testset: str) -> RunSummary:
    first, done = run[0], [row for row in run if row.failure is None]
    counts = sorted({row.n_references for row in run})
    values = {metric: per_image(run, metric) for metric in METRICS}
    seconds = [row.seconds for row in done if row.seconds is not None]
    peaks = [row.peak_memory_mb for row in done if row.peak_memory_mb is not None]
    tiers = {tier for row in run for tier in row.tiers.split(",") if tier}
    return RunSummary(
        run_id=first.run_id,
        label=first.label,
        method=first.method,
        benchmark=first.benchmark,
        protocol=first.protocol,
        testset=testset,
        references=str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}",
        policy=first.reference_policy,
        tiers=",".join(tier for tier in "HML" if tier in tiers),
        images=len({row.image_id for row in done}),
        failed=len(run) - len(done),
        means={metric: estimate(list(found.values())) for metric, found in values.items() if found},
        seconds=sum(seconds) / len(seconds) if seconds else None,
        peak_memory_mb=max(peaks, default=None),
    )


def per_image(run: Iterable[ResultRow], metric: str) -> dict[Key, float]:
    """{(image_id, target_sha256): value}; the mean where a picture has several rows (one for each reference)."""
    found: dict[Key, list[float]] = {}
    for row in run:
        value = getattr(row, metric)
        if row.failure is None and value is not None:
            found.setdefault(_key(row), []).append(value)
    return {key: sum(found[key]) / len(found[key]) for key in sorted(found, key=str)}


def _compared(run: Sequence[ResultRow], base: Sequence[ResultRow], testset: str) -> list[Difference]:
    found = []
    for metric in METRICS:
        one, other = per_image(run, metric), per_image(base, metric)
        both = [image for image in one if image in other]
        if both:
            found.append(
                Difference(
                    testset=testset,
                    protocol=run[0].protocol,
                    run_id=run[0].run_id,
                    label=run[0].label,
                    against=base[0].run_id,
                    against_label=base[0].label,
                    metric=metric,
                    estimate=estimate([_minus(one[image], other[image]) for image in both]),
                )
            )
    return found


def _minus(a: float, b: float) -> float:
    return 0.0 if a == b else a - b  # two perfect pictures: infinity minus infinity


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and 95 % percentile-bootstrap interval of values, one a picture; always the same for the same values."""
    array = np.asarray(values, np.float64)
    mean = float(array.mean())
    if len(array) < 2 or not math.isfinite(mean):
        return Estimate(mean=mean, low=None, high=None, images=len(array))
    low, high = np.percentile(_resampled_means(array), (2.5, 97.5))
    return Estimate(mean=mean, low=float(low), high=float(high), images=len(array))


def _resampled_means(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    count = len(values)
    if count <= KEPT:
        drawn: npt.NDArray[np.float64] = _kept_draws(count) @ values / count
        return drawn
    return np.concatenate([values[draw].mean(axis=1) for draw in _draws(count)])


def _draws(count: int) -> Iterator[npt.NDArray[np.int64]]:
    random = np.random.default_rng(SEED)
    step = max(1, CHUNK // count)
    for start in range(0, RESAMPLES, step):
        yield random.integers(0, count, (min(step, RESAMPLES - start), count))


@lru_cache(maxsize=1)
def _kept_draws(count: int) -> npt.NDArray[np.float64]:
    """How often each of `count` values is in each resample: the same for every run, metric and pair of that many."""
    rows = [np.bincount(row, minlength=count) for draw in _draws(count) for row in draw]
    return np.array(rows, np.float64)
