"""Files that are either whole or not there: atomic writing, Parquet tables in and out, the build manifest."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from lmr_tools.schema import LmrError, arrow_schema

Row = TypeVar("Row")

ROW_GROUP = 65536
WRITING: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is flushed to disk and renamed, on failure removed.

    A reader, or a run that goes on after a kill, therefore never meets half a file under the final name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two writers of the same content-addressed file apart; leftovers of a kill end in .tmp.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename is None:
            error.filename = str(path)  # a failed write does not say of which file
        raise


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` under `path`, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with a final newline, atomically; keys keep their order."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file; a missing or damaged one is an LmrError that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise LmrError(f"{path}: no such file") from None
    except (ValueError, OSError) as error:
        raise LmrError(f"{path}: not a readable JSON file ({error})") from None


def write_rows(path: Path, rows: Iterable[Row], row_type: type[Row]) -> int:
    """Write dataclass rows as Parquet with the columns of `row_type`, atomically and with page checksums.

    Rows are written in groups of 65,536, so an iterator of millions needs no more memory than one group. Returns how
    many were written; equal rows give equal bytes.
    """
    schema = arrow_schema(row_type)
    iterator, count = iter(rows), 0
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, **WRITING) as writer:
        while batch := list(itertools.islice(iterator, ROW_GROUP)):
            columns = {name: [getattr(row, name) for row in batch] for name in schema.names}
            writer.write_table(pa.table(columns, schema=schema))
            count += len(batch)
    return count


def write_table(path: Path, table: pa.Table) -> None:
    """Write a pyarrow table as Parquet, atomically; equal tables give equal bytes."""
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, row_group_size=ROW_GROUP, **WRITING)


def write_tables(path: Path, tables: Iterator[pa.Table]) -> int:
    """Write at least one pyarrow table, each as a row group, as one Parquet file, atomically; returns the rows."""
    first = next(tables)
    count = 0
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, first.schema, **WRITING) as writer:
        for table in itertools.chain([first], tables):
            writer.write_table(table, row_group_size=ROW_GROUP)
            count += table.num_rows
    return count


def read_table(path: Path, columns: list[str] | None = None) -> pa.Table:
    """Read a Parquet file and verify its page checksums; a missing or damaged one is an LmrError that names it."""
    try:
        return pq.read_table(path, columns=columns, page_checksum_verification=True)
    except FileNotFoundError:
        raise LmrError(f"{path}: no such table") from None
    except (pa.ArrowException, OSError) as error:
        raise LmrError(f"{path}: not a readable Parquet table ({str(error).splitlines()[0]})") from None


def read_rows(path: Path, row_type: type[Row]) -> list[Row]:
    """Read rows written by `write_rows`; columns that `row_type` does not know are ignored, missing ones refused."""
    return rows_of(read_table(path), row_type, str(path))


def rows_of(table: pa.Table, row_type: type[Row], name: str = "table") -> list[Row]:
    """The rows of a table in memory; columns that `row_type` does not know are ignored, missing ones refused."""
    names = [field.name for field in dataclasses.fields(row_type)]  # type: ignore[arg-type]
    missing = [column for column in names if column not in table.column_names]
    if missing:
        raise LmrError(f"{name}: column {missing[0]} is missing; it was written by another version")
    columns = [table.column(name).to_pylist() for name in names]
    return [row_type(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]


def iter_rows(path: Path, row_type: type[Row]) -> Iterator[Row]:
    """The rows of `read_rows`, a few thousand in memory at a time."""
    names = [field.name for field in dataclasses.fields(row_type)]  # type: ignore[arg-type]
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(ROW_GROUP // 8, columns=names):
            columns = [batch.column(name).to_pylist() for name in names]
            for values in zip(*columns, strict=True):
                yield row_type(**dict(zip(names, values, strict=True)))


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
    """Twelve hex digits that name a JSON-serialisable value; used to key caches by what they depend on."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def next_piece(folder: Path) -> Path:
    """Path of the next piece in a folder of Parquet pieces that only grows; a kill leaves whole pieces."""
    number = max((int(path.stem) for path in folder.glob("*.parquet")), default=-1) + 1
    return folder / f"{number:06d}.parquet"


def append_piece(folder: Path, rows: list[Row], row_type: type[Row]) -> None:
    """Add rows to a folder of pieces."""
    write_rows(next_piece(folder), rows, row_type)


def read_piece(path: Path) -> pa.Table:
    """One piece as a table; a damaged one is an LmrError that says how to go on."""
    try:
        return read_table(path)
    except LmrError as error:
        raise LmrError(f"{error}; delete this file and run the command again, it is made anew") from None


def read_pieces(folder: Path, row_type: type[Row]) -> Iterator[Row]:
    """All rows of a folder written by `append_piece`, oldest first."""
    for path in sorted(folder.glob("*.parquet")):
        yield from rows_of(read_piece(path), row_type, str(path))
