"""The tables of a report as cells: leaderboard, published numbers, paired differences, all pictures.

`comparison` gives means and differences, `published` printed numbers, `result_tables` names and digits, `summary` names
that hold control characters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmr_tools.comparison import Difference, Estimate, Key, RunSummary, per_image
from lmr_tools.published import IMAGES
from lmr_tools.result_tables import DIGITS, NAMES
from lmr_tools.schema import ResultRow
from lmr_tools.summary import printable

PICTURES = 2000  # rows of the table of pictures; more make a page slow
LOWER_IS_BETTER = ("lpips_alex", "lpips_vgg")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A number of a table: text, its interval as text, the value it is sorted by, and how it is shown."""

    text: str
    interval: str = ""
    value: str = ""
    mark: str = ""  # best | better | worse


@dataclass(frozen=True, kw_only=True)
class Line:
    """One run, or one published system, in a leaderboard."""

    number: int | None
    name: str
    detail: str
    references: Cell
    images: Cell
    failed: int
    cells: tuple[Cell, ...]
    seconds: Cell
    memory: Cell
    published: bool = False


def _number(estimate: Estimate | None, metric: str, *, sign: bool = False, mark: str = "") -> Cell:
    if estimate is None:
        return Cell(text="–")

    def text(value: float) -> str:
        return f"{value:{'+' if sign else ''}.{DIGITS[metric]}f}".replace("-", "−") if math.isfinite(value) else "∞"

    low, high = estimate.low, estimate.high
    interval = f"{text(low)} to {text(high)}" if low is not None and high is not None else ""
    return Cell(text=text(estimate.mean), interval=interval, value=repr(estimate.mean), mark=mark)


def _plain(value: float | None, form: str = ".3g") -> Cell:
    return Cell(text="–") if value is None else Cell(text=format(value, form), value=repr(value))


def leaderboard(runs: Sequence[RunSummary], names: Sequence[str], metrics: Sequence[str]) -> list[Line]:
    """One line a run; the best mean of each metric is marked where there are several runs."""
    best = {}
    for metric in metrics:
        found = [run.means[metric].mean for run in runs if metric in run.means and run.policy != "best"]
        if len(runs) > 1 and found:
            best[metric] = min(found) if metric in LOWER_IS_BETTER else max(found)
    lines = []
    for number, (run, name) in enumerate(zip(runs, names, strict=True), 1):
        cells = []
        for metric in metrics:
            value = run.means.get(metric)
            marked = value is not None and value.mean == best.get(metric) and run.policy != "best"
            cells.append(_number(value, metric, mark="best" if marked else ""))
        words = (run.tiers.replace(",", " "), "" if run.policy in ("all", "none") else run.policy)
        lines.append(
            Line(
                number=number,
                name=name,
                detail=run.method if run.method != run.label else "",
                references=Cell(
                    text=" ".join(word for word in (run.references, *words) if word),
                    value=run.references.split("-")[0],
                ),
                images=Cell(text=f"{run.images:,}", value=str(run.images)),
                failed=run.failed,
                cells=tuple(cells),
                seconds=_plain(run.seconds),
                memory=_plain(run.peak_memory_mb, ",.0f"),
            )
        )
    return lines


def published_lines(benchmark: str, printed: Mapping[str, tuple[float, float]], metrics: Sequence[str]) -> list[Line]:
    """The printed numbers of other systems."""
    lines = []
    for system, (psnr, ssim) in printed.items():
        values = {"psnr_y": (psnr, ".2f"), "ssim_y": (ssim, ".3f")}
        cells = tuple(_plain(*values[metric]) if metric in values else Cell(text="–") for metric in metrics)
        none, images = Cell(text="–"), Cell(text=str(IMAGES[benchmark]), value=str(IMAGES[benchmark]))
        lines.append(
            Line(
                number=None,
                name=system,
                detail="",
                references=none,
                images=images,
                failed=0,
                cells=cells,
                seconds=none,
                memory=none,
                published=True,
            )
        )
    return lines


def notes_on(runs: Sequence[RunSummary], benchmark: str, printed: bool) -> list[str]:
    """What must be known to read the leaderboard."""
    notes = ["Means over pictures; below them 95 % bootstrap intervals."]
    if len({run.images for run in runs}) > 1:
        notes.append("The runs have different numbers of pictures: compare the paired differences, not the means.")
    if printed:
        text = f"Published numbers are means over all {IMAGES[benchmark]} pictures, as printed by their authors"
        fewer = any(run.images != IMAGES[benchmark] for run in runs)
        notes.append(text + ("; a run with fewer does not compare." if fewer else "."))
    if any(run.policy == "best" for run in runs):
        notes.append("“best” chose its reference by the result's PSNR against GT: an upper bound, not a result.")
    return notes


def paired(
    pairs: Sequence[Difference], runs: Sequence[RunSummary], names: Sequence[str], metrics: Sequence[str]
) -> list[tuple[str, int, tuple[Cell, ...]]]:
    """(name, pictures, cells) of each run that is compared with another one."""
    named = {run.run_id: name for run, name in zip(runs, names, strict=True)}
    found = []
    for run_id in dict.fromkeys(pair.run_id for pair in pairs):
        own = {pair.metric: pair.estimate for pair in pairs if pair.run_id == run_id}
        cells = []
        for metric in metrics:
            value, mark = own.get(metric), ""
            if (
                value is not None
                and value.low is not None
                and value.high is not None
                and not value.low <= 0 <= value.high
            ):
                mark = "better" if (value.mean > 0) != (metric in LOWER_IS_BETTER) else "worse"
            cells.append(_number(value, metric, sign=True, mark=mark))
        found.append((named[run_id], max(value.images for value in own.values()), tuple(cells)))
    return found


def picture_table(
    runs: Sequence[RunSummary],
    names: Sequence[str],
    metrics: Sequence[str],
    by_run: Mapping[str, Sequence[ResultRow]],
) -> dict[str, Any]:
    """The table of pictures for the page's script: names, and numbers[metric][run][picture]."""
    found = {metric: [per_image(by_run[run.run_id], metric) for run in runs] for metric in metrics}
    # A target that could not be read has no hash: its failed row belongs to the picture of that name.
    known = {
        row.image_id: (row.image_id, row.target_sha256)
        for run in runs
        for row in by_run[run.run_id]
        if row.target_sha256
    }
    failures: dict[Key, dict[str, str]] = {}
    keys: dict[Key, None] = {}
    for number, run in enumerate(runs):
        for row in by_run[run.run_id]:
            key = (
                (row.image_id, row.target_sha256)
                if row.target_sha256
                else known.get(row.image_id, (row.image_id, None))
            )
            keys[key] = None
            if row.failure is not None:
                failures.setdefault(key, {})[str(number)] = printable(row.failure)
    chosen, total = sorted(keys, key=str), len(keys)
    if total > PICTURES:
        leading = found.get("psnr_y") or next(iter(found.values()), [])
        spread = {key: _spread_of(leading, key) for key in chosen}
        chosen = sorted(
            sorted(chosen, key=lambda key: (key not in failures, -spread[key], str(key)))[:PICTURES], key=str
        )

    def plain(value: float | None, metric: str) -> float | str | None:
        # JSON has no infinity; a picture equal to its target has this PSNR.
        return value if value is None else round(value, DIGITS[metric] + 1) if math.isfinite(value) else "∞"

    return {
        "runs": list(names),
        "metrics": [[metric, NAMES[metric], DIGITS[metric], metric in LOWER_IS_BETTER] for metric in metrics],
        "images": [printable(key[0]) for key in chosen],
        "failures": [failures.get(key, {}) for key in chosen],
        "total": total,
        "values": {
            metric: [[plain(values.get(key), metric) for key in chosen] for values in found[metric]]
            for metric in metrics
        },
    }


def _spread_of(values: Sequence[Mapping[Key, float]], key: Key) -> float:
    there = [each[key] for each in values if key in each and math.isfinite(each[key])]
    return max(there) - min(there) if there else 0.0
