"""Summaries of runs as tables of text: for a terminal, Markdown and LaTeX. Rows come from `comparison`, published
numbers from `published`, marked as such and only where benchmark and protocol are the published ones; `summary` shows
control characters of names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from lmr_tools.comparison import METRICS, Difference, Estimate, RunSummary, run_names
from lmr_tools.published import IMAGES, published_results
from lmr_tools.summary import printable

DIGITS = {"psnr_rgb": 2, "psnr_y": 2, "ssim_y": 4, "lpips_alex": 4, "lpips_vgg": 4}
NAMES = {
    "psnr_rgb": "PSNR RGB",
    "psnr_y": "PSNR Y",
    "ssim_y": "SSIM Y",
    "lpips_alex": "LPIPS alex",
    "lpips_vgg": "LPIPS vgg",
}
LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    # In LaTeX's oldest font encoding, which is its default, these would print as other characters.
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells of text; the first column is a name, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()


def tables_of(
    summaries: Sequence[RunSummary], differences: Sequence[Difference], *, published: bool = True
) -> list[Table]:
    """For each test set and protocol the means and, with two runs or more, the paired differences."""
    found = []
    for testset, protocol in dict.fromkeys((summary.testset, summary.protocol) for summary in summaries):
        here = [run for run in summaries if (run.testset, run.protocol) == (testset, protocol)]
        found.append(_means(here, published_results(here[0].benchmark, protocol) if published else {}))
        pairs = [pair for pair in differences if (pair.testset, pair.protocol) == (testset, protocol)]
        if pairs:
            names = dict(zip([run.run_id for run in here], map(printable, run_names(here)), strict=True))
            found.append(_paired(pairs, names))
    return found


def _means(runs: Sequence[RunSummary], published: Mapping[str, tuple[float, float]]) -> Table:
    shown = [metric for metric in METRICS if any(metric in run.means for run in runs)]
    header = ("method", "refs", "images", "failed", *(NAMES[metric] for metric in shown), "s/image")
    rows = []
    for run in runs:
        words = (run.references, run.policy, run.tiers)
        references = " ".join(word for word in words if word not in ("", "all", "none"))
        cells = [_cell(run.means.get(metric), metric) for metric in shown]
        seconds = "-" if run.seconds is None else f"{run.seconds:.3g}"
        rows.append((printable(run.label), references, str(run.images), str(run.failed), *cells, seconds))
    benchmark = runs[0].benchmark
    for system, (psnr, ssim) in published.items():
        values = {"psnr_y": f"{psnr:.2f}", "ssim_y": f"{ssim:.3f}"}
        cells = [values.get(metric, "-") for metric in shown]
        rows.append((f"{system} (published)", "-", str(IMAGES[benchmark]), "-", *cells, "-"))
    notes = ["means, with 95 % bootstrap intervals over pictures"]
    if len({run.images for run in runs}) > 1:
        notes.append("the runs have different numbers of pictures: compare the paired differences, not the means")
    if published and any(run.images != IMAGES[benchmark] for run in runs):
        notes.append(f"published means are over all {IMAGES[benchmark]} pictures; a run with fewer does not compare")
    if any(run.policy == "best" for run in runs):
        notes.append("best: the reference with the highest PSNR of its result: an upper bound, not a result")
    return Table(
        title=f"{runs[0].testset}, {runs[0].protocol} protocol", header=header, rows=tuple(rows), notes=tuple(notes)
    )


def _paired(pairs: Sequence[Difference], names: Mapping[str, str]) -> Table:
    shown = [metric for metric in METRICS if any(pair.metric == metric for pair in pairs)]
    rows = []
    for run_id in dict.fromkeys(pair.run_id for pair in pairs):
        own = {pair.metric: pair for pair in pairs if pair.run_id == run_id}
        some = next(iter(own.values()))
        cells = [_cell(own[metric].estimate, metric, sign=True) if metric in own else "-" for metric in shown]
        rows.append((f"{names[run_id]} - {names[some.against]}", str(some.estimate.images), *cells))
    return Table(
        title=f"{pairs[0].testset}, {pairs[0].protocol} protocol: differences over the pictures that both have",
        header=("runs", "images", *(NAMES[metric] for metric in shown)),
        rows=tuple(rows),
        notes=("paired 95 % bootstrap intervals; one that holds 0 shows no difference",),
    )


def _cell(estimate: Estimate | None, metric: str, sign: bool = False) -> str:
    if estimate is None:
        return "-"

    def text(value: float) -> str:
        return f"{value:{'+' if sign else ''}.{DIGITS[metric]}f}" if math.isfinite(value) else str(value)

    interval = (
        f" [{text(estimate.low)}, {text(estimate.high)}]"
        if estimate.low is not None and estimate.high is not None
        else ""
    )
    return text(estimate.mean) + interval


def as_text(table: Table) -> str:
    """Aligned columns for a terminal."""
    widths = [max(len(row[column]) for row in (table.header, *table.rows)) for column in range(len(table.header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        return "  ".join([first, *rest]).rstrip()

    rule = "-" * len("  ".join("x" * width for width in widths))
    return "\n".join([table.title, rule, line(table.header), rule, *map(line, table.rows), rule, *table.notes])


def as_markdown(table: Table) -> str:
    """A GitHub table under a heading."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"

    rule = "|" + "|".join(["---", *["---:"] * (len(table.header) - 1)]) + "|"
    return "\n".join([f"### {table.title}", "", line(table.header), rule, *map(line, table.rows), "", *table.notes])


def as_latex(table: Table) -> str:
    """A `tabular` with booktabs rules; text is escaped."""

    def line(cells: Sequence[str]) -> str:
        return " & ".join(_escaped(cell) for cell in cells) + r" \\"

    columns = "l" + "r" * (len(table.header) - 1)
    comments = [f"% {text}" for text in (table.title, *table.notes)]
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", line(table.header), r"\midrule"]
    return "\n".join([*comments, *top, *map(line, table.rows), r"\bottomrule", r"\end{tabular}"])


def _escaped(text: str) -> str:
    return "".join(LATEX_ESCAPES.get(character, character) for character in " ".join(text.split()))


FORMATS: Mapping[str, Callable[[Table], str]] = {"text": as_text, "markdown": as_markdown, "latex": as_latex}
