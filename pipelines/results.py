"""`lmr results`: the tables of one or more folders of results."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from lmr_tools.schema import LmrError

if TYPE_CHECKING:
    from lmr_tools.comparison import RunSummary


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--against", metavar="LABEL", help="Run that the others are compared with.  [the first]")
@click.option("--published/--no-published", default=True, show_default=True, help="Show published numbers, marked so.")
@click.option("--json", "form", flag_value="json", help="Print means and differences as JSON.")
@click.option("--csv", "form", flag_value="csv", help="Print one line a run as CSV.")
@click.option("--markdown", "form", flag_value="markdown", help="Print Markdown tables.")
@click.option("--latex", "form", flag_value="latex", help="Print LaTeX tables (booktabs).")
def results(runs: tuple[Path, ...], against: str | None, published: bool, form: str | None) -> None:
    """Show the means of RUNs (folders of lmr evaluate, or their results.parquet), with 95 % intervals.

    Runs on the same test set under the same protocol are also compared picture by picture. Published numbers stand
    beside them where test set and protocol are the published ones.
    """
    from lmr_tools.comparison import differences, summarise
    from lmr_tools.published import published_results
    from lmr_tools.result_tables import FORMATS, tables_of
    from lmr_tools.results import read_results

    rows = list(dict.fromkeys(row for run in runs for row in read_results(run)))
    if not rows:
        raise LmrError(f"{runs[0]}: no rows yet; run lmr evaluate")
    summaries, pairs = summarise(rows), differences(rows, against)
    if form == "csv":
        click.echo(_csv(summaries), nl=False)
    elif form == "json":
        places = dict.fromkeys((summary.benchmark, summary.protocol) for summary in summaries)
        shown = [
            {"benchmark": place[0], "protocol": place[1], "system": system, "psnr_y": psnr, "ssim_y": ssim}
            for place in places
            for system, (psnr, ssim) in (published_results(*place) if published else {}).items()
        ]
        click.echo(_json({"runs": summaries, "differences": pairs, "published": shown}))
    else:
        tables = tables_of(summaries, pairs, published=published)
        click.echo("\n\n".join(FORMATS[form or "text"](table) for table in tables))


def _json(value: object) -> str:
    import dataclasses
    import math

    def plain(part: object) -> object:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            return {field.name: plain(getattr(part, field.name)) for field in dataclasses.fields(part)}
        if isinstance(part, dict):
            return {key: plain(item) for key, item in part.items()}
        if isinstance(part, list):
            return [plain(item) for item in part]
        # JSON has no infinity; a picture equal to its target has this PSNR.
        return str(part) if isinstance(part, float) and not math.isfinite(part) else part

    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False)


def _csv(summaries: list[RunSummary]) -> str:
    from lmr_tools.comparison import METRICS

    what = ("run_id", "label", "method", "benchmark", "testset", "protocol")
    plain = (*what, "references", "policy", "tiers", "images", "failed")
    costs = ("seconds", "peak_memory_mb")
    metrics = [f"{metric}{part}" for metric in METRICS for part in ("", "_low", "_high")]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*plain, *metrics, *costs])
    for summary in summaries:
        numbers: list[float | None] = []
        for metric in METRICS:
            mean = summary.means.get(metric)
            numbers += [mean.mean, mean.low, mean.high] if mean else [None, None, None]
        writer.writerow([*(getattr(summary, name) for name in plain), *numbers, *(getattr(summary, c) for c in costs)])
    return text.getvalue()
