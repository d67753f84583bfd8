"""The charts of a report as plain numbers, which its page draws as SVG: quality against references, tiers and cost.

`comparison` gives means and intervals. Every mark has the number of its run in the table of the same test set.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lmr_tools.comparison import Estimate, RunSummary, estimate, per_image
from lmr_tools.schema import ResultRow, Tier

WIDTH, HEIGHT = 560, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 18, 30, 50
COLOURS = 8  # classes c0 to c7 of the page
TIERS = {str(Tier.HIGH): "High", str(Tier.MEDIUM): "Medium", str(Tier.LOW): "Low"}

Scale = Callable[[float], float]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One value: its place, the ends of its interval, the number shown beside it, and what a pointer over it says."""

    x: float
    y: float
    low: float | None
    high: float | None
    tag: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Series:
    """Marks of one colour, joined by a line when `line` is not empty."""

    name: str
    colour: int
    marks: tuple[Mark, ...]
    line: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One drawing; places are in units of its view box. Ticks are (place, text)."""

    title: str
    x_label: str
    y_label: str
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    series: tuple[Series, ...]
    note: str = ""
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of a test set, with its number in the table and the tiers to which its references were restricted."""

    number: int
    summary: RunSummary
    rows: Sequence[ResultRow]
    only_tiers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Point:
    """A value before it has a place."""

    x: float
    value: Estimate
    tag: str
    text: str


def against_references(runs: Sequence[Measured]) -> Chart | None:
    """Mean PSNR on Y against the number of references; None where no method was run with several numbers of them.

    Runs of one label and policy without a choice of tiers make a line; means are over the pictures that all runs of
    the chart have.
    """
    chosen = [run for run in runs if run.summary.policy in ("all", "none", "first") and not run.only_tiers]
    common = _common([run.rows for run in chosen])
    lines: dict[tuple[str, str], list[Point]] = {}
    for run in chosen:
        value, label = _mean(run.rows, common), run.summary.label
        if value is not None:
            used = [row.n_references for row in run.rows if row.failure is None]
            count = sum(used) / len(used)
            text = f"{label}: {count:.3g} references, {value.mean:.2f} dB"
            point = Point(x=count, value=value, tag=str(run.number), text=text)
            lines.setdefault((label, run.summary.policy), []).append(point)
    if not any(len({round(point.x, 6) for point in points}) > 1 for points in lines.values()):
        return None
    named = [(label, sorted(points, key=lambda point: point.x)) for (label, _), points in lines.items()]
    note = f"Means over the {len(common)} pictures that all these runs have, with 95 % intervals."
    return _chart("PSNR against the number of references", "references given", named, join=True, note=note, whole=True)


def against_tiers(runs: Sequence[Measured]) -> Chart | None:
    """Mean PSNR on Y by tier of the references; None unless a method has results with references of two tiers alone.

    From rows whose references are all of one tier (`--tiers H`, `--reference-policy each`), and for each label over
    the pictures that have such a row for every tier drawn.
    """
    found: dict[tuple[str, str], dict[str, list[ResultRow]]] = {}
    numbers: dict[tuple[str, str, str], int] = {}
    for run in runs:
        label, policy = run.summary.label, run.summary.policy
        if policy == "best" or (policy != "each" and len(run.only_tiers) != 1):
            continue
        for row in run.rows:
            tiers = set(row.tiers.split(",")) & set(TIERS)
            if row.failure is None and len(tiers) == 1:
                tier = tiers.pop()
                found.setdefault((label, policy), {}).setdefault(tier, []).append(row)
                numbers.setdefault((label, policy, tier), run.number)
    named: list[tuple[str, list[Point]]] = []
    counts = set()
    for (label, policy), by_tier in found.items():
        common = _common(list(by_tier.values()))
        if len(by_tier) < 2 or not common:
            continue
        counts.add(len(common))
        points = []
        for place, tier in enumerate(TIERS):
            value = _mean(by_tier[tier], common) if tier in by_tier else None
            if value is not None:
                text = f"{label}: {TIERS[tier]} references alone, {value.mean:.2f} dB"
                points.append(Point(x=place, value=value, tag=str(numbers[label, policy, tier]), text=text))
        named.append((label + (", one reference each" if policy == "each" else ""), points))
    if not named:
        return None
    size = f"{min(counts)} to {max(counts)}" if len(counts) > 1 else str(min(counts))
    note = f"Means over the {size} pictures that have references of every tier drawn, with 95 % intervals."
    ticks = tuple((float(place), name) for place, name in enumerate(TIERS.values()))
    return _chart("PSNR against the references' tier", "tier", named, join=True, note=note, x_ticks=ticks)


def against_cost(runs: Sequence[Measured]) -> list[Chart]:
    """Mean PSNR on Y against mean seconds and against peak memory, for what was measured."""
    charts = []
    costs: tuple[tuple[str, str, Callable[[RunSummary], float | None]], ...] = (
        ("PSNR against time", "seconds a picture", lambda run: run.seconds),
        ("PSNR against memory", "peak memory, MB", lambda run: run.peak_memory_mb),
    )
    devices = sorted({row.device for run in runs for row in run.rows if row.failure is None})
    note = "Measured on " + devices[0] if len(devices) == 1 else "Measured on different devices, which do not compare"
    for title, label, cost in costs:
        named: dict[str, list[Point]] = {}
        for run in runs:
            value, x = run.summary.means.get("psnr_y"), cost(run.summary)
            if value is not None and math.isfinite(value.mean) and x is not None and x > 0:
                text = f"{run.summary.label}: {x:.3g} {label}, {value.mean:.2f} dB"
                point = Point(x=x, value=value, tag=str(run.number), text=text)
                named.setdefault(run.summary.label, []).append(point)
        if sum(map(len, named.values())) > 1:
            charts.append(_chart(title, label, list(named.items()), join=False, note=note + "."))
    return charts


def _common(groups: Sequence[Sequence[ResultRow]]) -> set[object]:
    keys = [set(per_image(rows, "psnr_y")) for rows in groups]
    return set.intersection(*(each for each in keys if each)) if any(keys) else set()  # type: ignore[arg-type]


def _mean(rows: Sequence[ResultRow], common: set[object]) -> Estimate | None:
    values = [value for key, value in per_image(rows, "psnr_y").items() if key in common and math.isfinite(value)]
    return estimate(values) if values else None


def _chart(
    title: str,
    x_label: str,
    named: Sequence[tuple[str, Sequence[Point]]],
    *,
    join: bool,
    note: str,
    whole: bool = False,
    x_ticks: tuple[tuple[float, str], ...] = (),
) -> Chart:
    points = [point for _, line in named for point in line]
    xs = [point.x for point in points]
    ys = [
        value
        for point in points
        for value in (point.value.mean, point.value.low, point.value.high)
        if value is not None
    ]
    ticks, x_scale = _x_axis(xs, whole, x_ticks)
    y_ticks, y_scale = _linear(min(ys), max(ys), HEIGHT - BOTTOM, TOP)
    colours = _colours([name for name, _ in named])
    series = []
    for name, line in named:
        marks = tuple(_mark(point, x_scale, y_scale) for point in line)
        path = " ".join(f"{mark.x},{mark.y}" for mark in marks) if join and len(marks) > 1 else ""
        series.append(Series(name=name, colour=colours[name], marks=marks, line=path))
    return Chart(
        title=title,
        x_label=x_label,
        y_label="PSNR on Y, dB",
        x_ticks=ticks,
        y_ticks=y_ticks,
        series=tuple(series),
        note=note,
    )


def _mark(point: Point, x_scale: Scale, y_scale: Scale) -> Mark:
    low, high = point.value.low, point.value.high
    return Mark(
        x=round(x_scale(point.x), 1),
        y=round(y_scale(point.value.mean), 1),
        low=None if low is None else round(y_scale(low), 1),
        high=None if high is None else round(y_scale(high), 1),
        tag=point.tag,
        text=point.text,
    )


def _colours(names: Sequence[str]) -> Mapping[str, int]:
    return {name: number % COLOURS for number, name in enumerate(dict.fromkeys(names))}


def _x_axis(
    values: Sequence[float], whole: bool, named: tuple[tuple[float, str], ...]
) -> tuple[tuple[tuple[float, str], ...], Scale]:
    left, right = LEFT + 14, WIDTH - RIGHT - 14
    low, high = min(values), max(values)
    if named:
        step = (right - left) / len(named)
        return tuple((left + (place + 0.5) * step, text) for place, text in named), lambda x: left + (x + 0.5) * step
    if whole:
        span = max(1.0, high - low)
        place: Scale = lambda x: left + (x - low) / span * (right - left)  # noqa: E731
        every = max(1, math.ceil(span / 10))
        return tuple((place(x), str(x)) for x in range(math.ceil(low), math.floor(high) + 1, every)), place
    if high / low < 8:
        return _linear(low, high, left, right)
    first, last = math.log10(low) - 0.05, math.log10(high) + 0.05
    logarithmic: Scale = lambda x: left + (math.log10(x) - first) / (last - first) * (right - left)  # noqa: E731
    decades = range(math.floor(first), math.ceil(last) + 1)
    digits = (1, 2, 5) if last - first < 3 else (1,)
    marks = [digit * 10.0**decade for decade in decades for digit in digits]
    return tuple((logarithmic(x), f"{x:g}") for x in marks if first <= math.log10(x) <= last), logarithmic


def _linear(low: float, high: float, start: float, end: float) -> tuple[tuple[tuple[float, str], ...], Scale]:
    """Round ticks and the scale of an axis from `start` to `end` that shows low to high with some air."""
    span = high - low or max(abs(high) * 0.1, 0.1)
    low, high = low - 0.06 * span, high + 0.06 * span
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= raw)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    scale: Scale = lambda value: start + (value - low) / (high - low) * (end - start)  # noqa: E731
    numbers = range(math.ceil(low / step), math.floor(high / step) + 1)
    return tuple((round(scale(number * step), 1), f"{number * step:.{digits}f}") for number in numbers), scale
