"""Verify a dataset folder: every file against the manifest, every tar against the tables, the tables with each other.

Nothing is changed and nothing is trusted; whatever is wrong becomes one line that names the file and the id. Imports
`consistency`, `dataset`, `packing`, `shards` and `summary`, whose checks it runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from lmr_tools.consistency import LIMIT, counts_of, cross_check
from lmr_tools.dataset import TABLES, read_manifest, table_path
from lmr_tools.packing import group_of
from lmr_tools.schema import (
    CandidateRow,
    Group,
    GroupRow,
    ImageRow,
    LmrError,
    PairRow,
    RejectRow,
    SampleRow,
    ShardRow,
    arrow_schema,
    embedding_schema,
)
from lmr_tools.shards import CountedFile, PackedSample, read_samples
from lmr_tools.summary import printable
from lmr_tools.tables import read_json, read_table, sha256_file

ROWS: dict[str, type] = {
    "images": ImageRow,
    "rejects": RejectRow,
    "candidates": CandidateRow,
    "pairs": PairRow,
    "groups": GroupRow,
    "shards": ShardRow,
    "samples": SampleRow,
}

Item = TypeVar("Item")


class Watch(Protocol):
    """Passes items on and may show how far they are."""

    def __call__(self, items: Iterable[Item], total: int, label: str) -> Iterable[Item]: ...


def unwatched(items: Iterable[Item], total: int, label: str) -> Iterable[Item]:
    """The `Watch` that shows nothing."""
    return items


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was looked at, and every problem as one line."""

    problems: tuple[str, ...]
    rows: dict[str, int]
    shards: int
    samples: int
    pictures: int
    bytes: int
    decoded: bool


@dataclass(frozen=True, kw_only=True)
class ShardTask:
    """One tar and what the tables say of it: its row, its `groups` rows, the paths of their photos, its `samples` rows.

    `samples` is None when that table can not be used.
    """

    path: Path
    row: ShardRow
    groups: tuple[GroupRow, ...]
    paths: Mapping[str, str]
    samples: tuple[SampleRow, ...] | None


@dataclass(frozen=True, kw_only=True)
class ShardFindings:
    """What reading one tar gave."""

    problems: tuple[str, ...]
    samples: int
    pictures: int
    bytes: int


def verify_dataset(dataset: Path, *, decode: bool = True, mapper: Any = map, watch: Watch = unwatched) -> Report:
    """Verify all of `dataset`; never raises for what is wrong inside it.

    Without `decode` the pixels stay packed: hashes, JSON and PNG headers are still judged. `mapper(function, tasks)` is
    an ordered map that may use processes.
    """
    if not dataset.is_dir():
        raise LmrError(f"{dataset}: no such folder")
    problems: list[str] = []
    manifest: dict[str, Any] = {}
    try:
        manifest = read_manifest(dataset)
    except LmrError as error:
        problems.append(str(error))
    frames: dict[str, pd.DataFrame] = {}
    for name in watch(TABLES, len(TABLES), "tables"):
        problems += _check_table(dataset, name, manifest, frames)
    embedder = _section(manifest, "embedder")
    if "dimension" in embedder and embedder["dimension"] is None:
        frames.pop("embeddings", None)  # imported, or merged from several encoders: there are no vectors to miss
    problems += cross_check(frames, _section(manifest, "recipe"))
    problems += _check_counts(manifest, frames)
    problems += _check_documents(dataset, manifest)
    findings: list[ShardFindings] = []
    if {"shards", "groups", "images"} <= frames.keys():
        problems += _foreign_files(dataset / "shards", set(frames["shards"]["shard"]))
        checks = mapper(partial(check_shard, decode=decode), _shard_tasks(dataset, frames))
        findings += watch(checks, len(frames["shards"]), "shards")
    return Report(
        problems=tuple(printable(line) for line in (*problems, *(line for f in findings for line in f.problems))),
        rows={name: len(frame) for name, frame in frames.items()},
        shards=len(findings),
        samples=sum(found.samples for found in findings),
        pictures=sum(found.pictures for found in findings),
        bytes=sum(found.bytes for found in findings),
        decoded=decode,
    )


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of dataset.json; {} when it is missing or no object."""
    part = values.get(name)
    return part if isinstance(part, dict) else {}


def _check_table(
    dataset: Path, name: str, manifest: Mapping[str, Any], frames: dict[str, pd.DataFrame]
) -> Iterator[str]:
    """Judge one table against the manifest and its columns; put it into `frames` when it can be used."""
    path, shown = table_path(dataset, name), f"tables/{name}.parquet"
    try:
        # Vectors are many and say nothing here: the sha256 guards them.
        table = read_table(path, ["image_id", "view"] if name == "embeddings" else None)
        columns = pq.read_schema(path)
    except (LmrError, pa.ArrowException, OSError) as error:
        yield str(error).replace(str(path), shown)
        return
    entry = _section(_section(manifest, "tables"), name)
    if manifest and not entry:
        yield f"dataset.json: does not list the table {name}"
    elif manifest:
        if entry.get("rows") != table.num_rows:
            yield f"{shown}: {table.num_rows} rows, dataset.json says {entry.get('rows')}"
        if entry.get("sha256") != sha256_file(path):
            yield f"{shown}: its sha256 is not that of dataset.json; the file was changed"
    usable = True
    for field in _wanted_columns(name, manifest):
        found = columns.field(field.name) if field.name in columns.names else None
        if found is None or found.type != field.type:
            yield f"{shown}: column {field.name} is {found.type if found else 'missing'}, not {field.type}"
            usable = False
        elif name != "embeddings" and not field.nullable and table.column(field.name).null_count:
            yield f"{shown}: column {field.name} holds nulls"
            usable = False
    if usable:
        frames[name] = table.to_pandas()


def _wanted_columns(name: str, manifest: Mapping[str, Any]) -> list[Any]:
    if name != "embeddings":
        return list(arrow_schema(ROWS[name]))
    dimension = _section(manifest, "embedder").get("dimension")
    if isinstance(dimension, int) and dimension > 0:
        return list(embedding_schema(dimension))
    return list(embedding_schema(1))[:2]


def _check_counts(manifest: Mapping[str, Any], frames: Mapping[str, pd.DataFrame]) -> Iterator[str]:
    """The counts of dataset.json that follow from tables, against the tables."""
    promised = _section(manifest, "counts")
    for name, number in counts_of(frames).items():
        if name in promised and promised[name] != number:
            yield f"dataset.json: counts {name} {json.dumps(promised[name])}, the tables hold {json.dumps(number)}"


def _check_documents(dataset: Path, manifest: Mapping[str, Any]) -> Iterator[str]:
    """README.md and croissant.json are there, and the Croissant file names the tables as they are."""
    if not (dataset / "README.md").is_file():
        yield "README.md: missing"
    try:
        croissant = read_json(dataset / "croissant.json")
        files = {entry["@id"]: entry.get("sha256") for entry in croissant["distribution"]}
    except LmrError as error:
        yield str(error).replace(str(dataset / "croissant.json"), "croissant.json")
        return
    except (KeyError, TypeError, AttributeError):
        yield "croissant.json: no list of files (distribution)"
        return
    tables = _section(manifest, "tables")
    for name in tables:
        if files.get(f"tables/{name}.parquet") != _section(tables, name).get("sha256"):
            yield f"croissant.json: its sha256 of tables/{name}.parquet is not that of dataset.json"


def _foreign_files(folder: Path, known: set[str]) -> Iterator[str]:
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for name in names:
        if name not in known:
            yield f"shards/{name}: not in the shards table; it is no part of this dataset"


def _shard_tasks(dataset: Path, frames: Mapping[str, pd.DataFrame]) -> Iterator[ShardTask]:
    groups = frames["groups"].sort_values("shard", kind="stable")
    places = groups.groupby("shard").indices
    samples = frames.get("samples")
    ranges = {} if samples is None else samples.groupby("shard").indices
    paths = frames["images"].drop_duplicates("image_id").set_index("image_id")["path"]
    for row in _rows(frames["shards"], ShardRow):
        # A name from a table is no path: only the last part of it, inside shards/, is ever opened.
        own = _rows(groups.iloc[places[row.shard]], GroupRow) if row.shard in places else []
        photos = {row.target_image for row in own} | {row.ref_image for row in own}
        known = {str(name): str(path) for name, path in paths.reindex(sorted(photos)).dropna().items()}
        listed = None if samples is None else tuple(_rows(samples.iloc[ranges.get(row.shard, [])], SampleRow))
        path = dataset / "shards" / Path(row.shard).name
        yield ShardTask(path=path, row=row, groups=tuple(own), paths=known, samples=listed)


def _rows(frame: pd.DataFrame, row_type: type[Item]) -> list[Item]:
    """Rows of a frame as dataclasses; pandas' NaN is None again."""
    names = arrow_schema(row_type).names
    columns = [[None if value != value else value for value in frame[name].tolist()] for name in names]
    return [row_type(**dict(zip(names, values, strict=True))) for values in zip(*columns, strict=True)]


def check_shard(task: ShardTask, *, decode: bool) -> ShardFindings:
    """Read one tar from end to end and compare it with the tables."""
    name = f"shards/{task.row.shard}"
    rows: dict[str, list[GroupRow]] = {}
    for row in task.groups:
        rows.setdefault(row.group_id, []).append(row)
    problems: list[str] = []
    seen: set[str] = set()
    pictures = 0
    try:
        stream = task.path.open("rb")
    except OSError as error:
        line = f"{name}: can not be read ({error.strerror})"
        return ShardFindings(problems=(line,), samples=0, pictures=0, bytes=0)
    with stream:
        file = CountedFile(stream)
        try:
            for packed in read_samples(file, name):
                key = packed.group_id
                seen.add(key)
                problems += [f"{name}: sample {key}: {line}" for line in misplaced(packed, task.samples)]
                try:
                    group = group_of(key, packed.members, decode=decode)
                except LmrError as error:
                    problems.append(f"{name}: {error}")
                    continue
                pictures += 1 + len(group.references)
                lines = differences(group, rows.get(key, []), task)
                problems += [f"{name}: sample {key}: {line}" for line in lines]
        except LmrError as error:
            problems.append(str(error))
            file.drain()
    for what, found, promised in (
        ("samples", len(seen), task.row.samples),
        ("bytes", file.bytes, task.row.bytes),
        ("sha256", file.sha256(), task.row.sha256),
    ):
        if found != promised:
            problems.append(f"{name}: {what} {found}, the shards table says {promised}")
    missing = sorted(rows.keys() - seen)
    problems += [f"{name}: sample {key}: in the groups table, but not in the tar" for key in missing[:LIMIT]]
    if len(missing) > LIMIT:
        problems.append(f"{name}: {len(missing) - LIMIT} more samples are not in the tar")
    return ShardFindings(problems=tuple(problems), samples=len(seen), pictures=pictures, bytes=file.bytes)


def misplaced(packed: PackedSample, rows: Sequence[SampleRow] | None) -> Iterator[str]:
    """Where the range of a sample and its row in the `samples` table disagree."""
    if rows is None:
        return
    row = next((row for row in rows if row.group_id == packed.group_id), None)
    if row is None:
        yield "not in the samples table"
        return
    yield from _compare(
        "",
        ("offset", packed.offset, row.offset),
        ("bytes", packed.bytes, row.bytes),
        ("range's sha256", packed.sha256, row.sha256),
    )


def differences(group: Group, rows: Sequence[GroupRow], task: ShardTask) -> Iterator[str]:
    """Where a sample and its `groups` rows disagree."""
    if not rows:
        yield "not in the groups table"
        return
    first, size = rows[0], rows[0].size
    yield from _compare(
        "",
        ("split", str(group.split), first.split),
        ("shard's split", str(group.split), task.row.split),
        ("scene", group.scene, first.scene),
        ("target", group.target_image, first.target_image),
        ("target's corner", (group.target_x, group.target_y), (first.target_x, first.target_y)),
        ("target's pixels", group.target.shape[:2], (size, size)),
        ("target's path", group.target_path, task.paths.get(group.target_image, group.target_path)),
        ("references", [r.slot for r in group.references], [row.slot for row in rows]),
    )
    by_slot = {row.slot: row for row in rows}
    for reference in group.references:
        row = by_slot.get(reference.slot)
        if row is None:
            continue
        yield from _compare(
            f"{reference.slot}'s ",
            ("photo", reference.image_id, row.ref_image),
            ("tier", str(reference.tier), row.tier),
            ("overlap", reference.overlap, row.overlap),
            ("scale ratio", reference.scale_ratio, row.scale_ratio),
            ("clip score", reference.clip_score, row.clip_score),
            ("corner", (reference.x, reference.y), (row.ref_x, row.ref_y)),
            ("pixels", reference.pixels.shape[:2], (size, size)),
            ("path", reference.path, task.paths.get(reference.image_id, reference.path)),
        )


def _compare(owner: str, *facts: tuple[str, Any, Any]) -> Iterator[str]:
    for what, found, promised in facts:
        if found != promised:
            yield f"{owner}{what} {json.dumps(found)} in the tar, {json.dumps(promised)} in the tables"
