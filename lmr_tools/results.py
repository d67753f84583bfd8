"""A folder of results: one file for each measured picture, merged into one table.

RUN/evaluation.json names the format; RUN/runs/ID.json holds the settings of a run, RUN/rows/ID/NAME.json one row,
RUN/images/ID/NAME.png its SR picture, and RUN/results.parquet all rows. Rows are files of their own, so any number of
processes may add to a folder, and one that is killed leaves only whole rows behind.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from lmr_tools.schema import LmrError, ResultRow, arrow_schema
from lmr_tools.tables import read_json, read_table, rows_of, write_json, write_rows

FORMAT = "lmr-evaluation"
VERSION = 2
MARKER = "evaluation.json"
TABLE = "results.parquet"


def open_run(run: Path) -> None:
    """Make RUN a folder of results, or check that it is one; LmrError when it holds something else."""
    if run.is_dir() and not (run / MARKER).exists() and any(path.name[0] != "." for path in run.iterdir()):
        raise LmrError(f"{run}: holds something that is not results of lmr evaluate; name a new or empty folder")
    if run.exists() and not run.is_dir():
        raise LmrError(f"{run}: is a file; name a folder for the results")
    if (run / MARKER).exists():
        check_run(run)
    else:
        write_json(run / MARKER, {"format": FORMAT, "version": VERSION})


def check_run(run: Path) -> None:
    """LmrError unless RUN is a folder of results that this version reads."""
    if not (run / MARKER).is_file():
        raise LmrError(f"{run}: not a folder of lmr evaluate (no {MARKER})")
    marker = read_json(run / MARKER)
    if not isinstance(marker, dict) or marker.get("format") != FORMAT:
        raise LmrError(f"{run / MARKER}: not the marker of a folder of lmr evaluate")
    if marker.get("version") != VERSION:
        raise LmrError(
            f"{run}: results of version {marker.get('version')!r}, this program reads {VERSION}; run it anew"
        )


def settings_path(run: Path, run_id: str) -> Path:
    """File with the settings of a run."""
    return run / "runs" / f"{run_id}.json"


def row_path(run: Path, run_id: str, name: str) -> Path:
    """File of one row; `name` is that of its picture."""
    return run / "rows" / run_id / f"{name}.json"


def picture_path(run: Path, run_id: str, name: str) -> Path:
    """File of one SR picture."""
    return run / "images" / run_id / f"{name}.png"


def read_settings(run: Path) -> dict[str, dict[str, Any]]:
    """{run_id: settings} of all runs in a folder, by id."""
    return {path.stem: read_json(path) for path in sorted((run / "runs").glob("*.json"))}


def write_row(run: Path, name: str, row: ResultRow) -> None:
    """Keep a row, in the place of an older one of the same picture."""
    write_json(row_path(run, row.run_id, name), dataclasses.asdict(row))


def read_row(path: Path) -> ResultRow | None:
    """One row, or None when there is none."""
    if not path.is_file():
        return None
    values = read_json(path)
    names = {field.name for field in dataclasses.fields(ResultRow)}
    if not isinstance(values, Mapping) or set(values) != names:
        raise LmrError(f"{path}: a row of another version; delete it and run the same command again")
    return ResultRow(**values)


def merge(run: Path) -> list[ResultRow]:
    """Write RUN/results.parquet from all rows there are, sorted; returns them. Safe among several processes."""
    with _lock(run):
        rows = [row for path in (run / "rows").glob("*/*.json") if (row := read_row(path))]
        counts: dict[str, int] = {}  # runs of one label stand in the order of their numbers of references
        for row in rows:
            counts[row.run_id] = max(row.n_references, counts.get(row.run_id, 0))
        rows.sort(
            key=lambda row: (
                *(row.benchmark, row.protocol, row.label, counts[row.run_id], row.run_id),
                *(row.image_id, row.reference_ids),
            )
        )
        write_rows(run / TABLE, rows, ResultRow)
    return rows


def read_results(run: Path) -> list[ResultRow]:
    """The table of a RUN folder, or of a results.parquet file itself, which may have come through other programs."""
    if run.is_dir():
        check_run(run)
        if not (run / TABLE).is_file():
            raise LmrError(f"{run}: no {TABLE}; its evaluation was stopped, run the same lmr evaluate again")
        run = run / TABLE
    table = read_table(run)
    for field in arrow_schema(ResultRow):
        place = table.schema.get_field_index(field.name)
        if place < 0:
            continue  # `rows_of` names it
        try:
            column = table.column(place).cast(field.type)
        except pa.ArrowException:
            found = table.schema.field(place).type
            raise LmrError(f"{run}: column {field.name} holds {found}, not {field.type}; it was altered") from None
        if column.null_count and not field.nullable:
            raise LmrError(f"{run}: column {field.name} has rows without a value; it was altered")
        table = table.set_column(place, field.name, column)
    return rows_of(table, ResultRow, str(run))


@contextmanager
def _lock(run: Path) -> Iterator[None]:
    """Hold RUN/.lock: who merges last must have seen every row that was written before."""
    try:
        import fcntl
    except ImportError:  # Windows: one process at a time
        yield
        return
    descriptor = os.open(run / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
