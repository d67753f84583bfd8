"""Result tables -> one HTML file that opens offline: leaderboard, charts, figures, a table of pictures.

Uses `results` for what lies in a folder, `comparison` for means and differences, `published` for printed numbers,
`result_tables` for names, `report_tables`, `report_charts` and `report_figures` for what its page shows, `summary` for
names that hold control characters. The page's own files lie in `page/`. Whatever comes from tables and file names is
escaped; the page's policy allows our script and style by their hash, pictures as data, and nothing else.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmr_tools.comparison import METRICS, Difference, RunSummary, differences, run_names, summarise
from lmr_tools.published import published_results
from lmr_tools.report_charts import Chart, Measured, against_cost, against_references, against_tiers
from lmr_tools.report_figures import CROP, METHODS, Figure, Pictured, figures
from lmr_tools.report_tables import (
    LOWER_IS_BETTER,
    Cell,
    Line,
    leaderboard,
    notes_on,
    paired,
    picture_table,
    published_lines,
)
from lmr_tools.result_tables import NAMES
from lmr_tools.results import MARKER, read_results, read_settings
from lmr_tools.schema import LmrError, ResultRow
from lmr_tools.summary import printable
from lmr_tools.tables import write_bytes

PAGE = Path(__file__).parent / "page"
FAILURES = 50


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a report shows. `room`: bytes of all pictures together; `data`: where the test set lies now."""

    against: str | None = None
    only: tuple[str, ...] = ()
    figures: int = 12
    room: int = 8_000_000
    published: bool = True
    title: str = "Super-resolution report"
    note: str = ""
    data: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Section:
    """All that is said of one test set under one protocol."""

    title: str
    protocol: str
    metrics: tuple[str, ...]
    lines: tuple[Line, ...]
    notes: tuple[str, ...]
    against: str
    pairs: tuple[tuple[str, int, tuple[Cell, ...]], ...]
    charts: tuple[Chart, ...]
    figures: tuple[Figure, ...]
    figure_notes: tuple[str, ...]
    failures: tuple[tuple[str, str, str], ...]
    more_failures: int
    images: int
    data: Mapping[str, Any]


def write_report(runs: Sequence[Path], out: Path, options: Options) -> dict[str, Any]:
    """Write the report of result folders (or results.parquet files) as one file; returns what it holds, in numbers.

    LmrError when there is nothing to show, or a label of `only` or `against` is not there.
    """
    folders, settings = _load(runs)
    rows = list(folders)
    if options.only:
        labels = {row.label for row in rows}
        if wrong := [label for label in options.only if label not in labels]:
            raise LmrError(f"--only {wrong[0]}: no run has this label; there are {', '.join(sorted(labels))}")
        rows = [row for row in rows if row.label in options.only]
    if not rows:
        raise LmrError(f"{runs[0]}: no rows yet; run lmr evaluate")
    summaries, pairs = summarise(rows), differences(rows, options.against)
    by_run: dict[str, list[ResultRow]] = {}
    for row in rows:
        by_run.setdefault(row.run_id, []).append(row)
    places = dict.fromkeys((run.testset, run.protocol) for run in summaries)
    sections, room = [], options.room
    for place in places:
        here = [run for run in summaries if (run.testset, run.protocol) == place]
        own = [pair for pair in pairs if (pair.testset, pair.protocol) == place]
        each = dataclasses.replace(options, room=room, figures=math.ceil(options.figures / len(places)))
        section = _section(here, own, by_run, folders, settings, each)
        room -= sum(figure.bytes for figure in section.figures)
        sections.append(section)
    page = render(sections, _facts(summaries, by_run), options).encode()
    write_bytes(out, page)
    shown = sum(len(section.figures) for section in sections)
    notes = [note for section in sections for note in section.figure_notes]
    return {"out": str(out), "bytes": len(page), "runs": len(summaries), "figures": shown, "notes": notes}


def _load(runs: Sequence[Path]) -> tuple[dict[ResultRow, Path | None], dict[str, dict[str, Any]]]:
    """{row: its folder, None where it is a table alone} and {run_id: settings}."""
    rows: dict[ResultRow, Path | None] = {}
    settings: dict[str, dict[str, Any]] = {}
    for run in runs:
        folder = run if run.is_dir() else run.parent
        known = (folder / MARKER).is_file()
        for row in read_results(run):
            if rows.get(row) is None:
                rows[row] = folder if known else None
        if known:
            settings |= {key: value for key, value in read_settings(folder).items() if isinstance(value, dict)}
    return rows, settings


def _section(
    runs: Sequence[RunSummary],
    pairs: Sequence[Difference],
    by_run: Mapping[str, Sequence[ResultRow]],
    folders: Mapping[ResultRow, Path | None],
    settings: Mapping[str, Mapping[str, Any]],
    options: Options,
) -> Section:
    names = [printable(name) for name in run_names(runs)]
    metrics = tuple(metric for metric in METRICS if any(metric in run.means for run in runs))
    benchmark, protocol = runs[0].benchmark, runs[0].protocol
    printed = published_results(benchmark, protocol) if options.published else {}
    measured = [
        Measured(number=number, summary=run, rows=by_run[run.run_id], only_tiers=_only_tiers(settings, run.run_id))
        for number, run in enumerate(runs, 1)
    ]
    charts = [against_references(measured), against_tiers(measured), *against_cost(measured)]
    pictured = [
        Pictured(
            name=name,
            rows=by_run[run.run_id],
            folders={row: place for row in by_run[run.run_id] if (place := folders[row]) is not None},
            settings=settings.get(run.run_id),
        )
        for name, run in zip(names, runs, strict=True)
    ]
    order = _figure_order(runs, pairs)
    shown, notes = figures([pictured[n] for n in order], count=options.figures, room=options.room, data=options.data)
    total = len({(row.image_id, row.target_sha256) for run in runs for row in by_run[run.run_id]})
    failed = [
        (name, printable(row.image_id), printable(row.failure))
        for name, run in zip(names, runs, strict=True)
        for row in by_run[run.run_id]
        if row.failure is not None
    ]
    return Section(
        title=runs[0].testset,
        protocol=protocol,
        metrics=metrics,
        lines=(*leaderboard(runs, names, metrics), *published_lines(benchmark, printed, metrics)),
        notes=tuple(notes_on(runs, benchmark, bool(printed))),
        against=printable(pairs[0].against_label) if pairs else "",
        pairs=tuple(paired(pairs, runs, names, metrics)),
        charts=tuple(chart for chart in charts if chart is not None),
        figures=tuple(shown),
        figure_notes=tuple(printable(note) for note in [*_figure_rule(runs, shown, total), *notes]),
        failures=tuple(failed[:FAILURES]),
        more_failures=max(0, len(failed) - FAILURES),
        images=total,
        data=picture_table(runs, names, metrics, by_run),
    )


def _only_tiers(settings: Mapping[str, Mapping[str, Any]], run_id: str) -> tuple[str, ...]:
    found = settings.get(run_id, {}).get("tiers", ())
    return tuple(str(tier) for tier in found) if isinstance(found, (list, tuple)) else ()


def _figure_order(runs: Sequence[RunSummary], pairs: Sequence[Difference]) -> list[int]:
    """Which runs come into figures: the base, then the others in their order; where they are too many, the best."""
    base = {pair.against for pair in pairs}

    def place(number: int) -> tuple[bool, float]:
        mean = runs[number].means.get("psnr_y")
        return runs[number].run_id not in base, -mean.mean if mean else math.inf

    chosen = sorted(range(len(runs)), key=place)[:METHODS]
    return sorted(chosen, key=lambda number: (runs[number].run_id not in base, number))


def _figure_rule(runs: Sequence[RunSummary], shown: Sequence[Figure], total: int) -> list[str]:
    if not shown:
        return []
    several = len(runs) > 1
    rule = "those where the runs lie farthest apart" if several else "spread from the worst to the best"
    where = (
        "the runs' pictures differ most (standard deviation of Y)" if several else "the picture differs most from GT"
    )
    what = f"{len(shown)} of {total} pictures, {rule}" if len(shown) < total else f"All {total} pictures"
    notes = [f"{what}; the crop (at most {CROP} pixels a side) is where {where}."]
    if len(runs) > METHODS:
        notes.append(
            f"{METHODS} of {len(runs)} runs: the one that others are compared with, and the best by PSNR on Y."
        )
    return notes


def _facts(runs: Sequence[RunSummary], by_run: Mapping[str, Sequence[ResultRow]]) -> list[dict[str, str]]:
    """What each run was, for the end of the page."""
    facts = []
    for run in runs:
        rows = by_run[run.run_id]
        try:
            versions = json.loads(rows[0].versions)
            text = ", ".join(f"{name} {version}" for name, version in versions.items())
        except (ValueError, AttributeError):
            text = rows[0].versions
        facts.append(
            {
                "run": run.run_id,
                "label": printable(run.label),
                "method": run.method,
                "testset": f"{run.testset}, {run.protocol}",
                "weights": (rows[0].weights_sha256 or "none")[:16],
                "device": printable(", ".join(sorted({row.device for row in rows}))),
                "versions": printable(text),
            }
        )
    return facts


def render(sections: Sequence[Section], facts: Sequence[Mapping[str, str]], options: Options) -> str:
    """The page as text. Jinja2 escapes everything but our own style and script."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    style, script = ((PAGE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    environment = Environment(
        loader=FileSystemLoader(PAGE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str and not value.isprintable() else value,
    )
    return environment.get_template("report.html").render(
        title=options.title,
        note=options.note,
        sections=sections,
        facts=facts,
        names=NAMES,
        lower=LOWER_IS_BETTER,
        style=Markup(style),
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
