"""A built dataset as a random-access stream: any sample of a split by its number, from a folder or an fsspec URL.

What a reader of whole tars learns too late or never is judged when the dataset is opened: every shard of the split is
there and has its size. Each sample is one range read, and its sha256 is that of the `samples` table, whose own sha256
is in dataset.json. Imports `dataset`, `packing`, `shards`, `sources`, which knows the mark of a build, and `stores`,
which knows the errors that stay, secrets and stuck calls.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lmr_tools import stores
from lmr_tools.dataset import MANIFEST, checked
from lmr_tools.packing import GROUP_ID, group_of
from lmr_tools.schema import Group, LmrError, SampleRow, ShardRow, Split, arrow_schema
from lmr_tools.shards import unpack
from lmr_tools.sources import DATASET_MARKER

if TYPE_CHECKING:
    import numpy.typing as npt

SHARD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}\.tar")
SHA256 = re.compile(r"[0-9a-f]{64}")
# What no second try will mend, also a file system without byte ranges; every other error may be a passing one.
FINAL = (*stores.FINAL, NotImplementedError)

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class DatasetFiles:
    """The files below a folder or URL. A read that fails for a passing reason is tried again, later each time.

    On a URL a call that gives no answer in `limit` seconds has failed.
    """

    root: str
    tries: int
    pause: float  # seconds before the second try; doubles
    limit: float = stores.LIMIT

    @property
    def shown(self) -> str:
        """The folder or URL as it may be printed and kept: without credentials."""
        return stores.without_secrets(self.root, place=True)

    def read(self, name: str) -> bytes:
        """All of a file; LmrError names it when it can not be read."""
        return self.insist(name, lambda files, base: cast("bytes", files.cat_file(f"{base}/{name}")))

    def insist(self, name: str, call: Callable[[Any, str], Result]) -> Result:
        """`call(file system, path of the root on it)`, which is about the file `name`, with its tries."""
        files, base = _filesystem(self.root)
        for attempt in range(1, self.tries + 1):
            try:
                return self._within(lambda: call(files, base))
            except Exception as error:  # every fsspec backend has its own errors
                if isinstance(error, FINAL) or attempt == self.tries:
                    far = "://" in self.root and not isinstance(error, FileNotFoundError)
                    way_out = "check address, access and connection" if far else "get it again or rebuild"
                    raise LmrError(f"{self.shown}/{name}: {_cause(error)}; {way_out}") from None
                self.wait(attempt)
        raise AssertionError("no try")

    def wait(self, attempt: int) -> None:
        """Sleep after a failed attempt, counted from 1."""
        time.sleep(self.pause * 2 ** (attempt - 1))

    def ranges(self, names: Sequence[str], starts: Sequence[int], ends: Sequence[int]) -> list[bytes | Exception]:
        """Byte ranges, side by side where the file system can; one try, an error stands in place of its range."""
        files, base = _filesystem(self.root)
        paths = [f"{base}/{name}" for name in names]
        try:
            return list(self._within(lambda: files.cat_ranges(paths, list(starts), list(ends), on_error="return")))
        except Exception as error:  # some backends raise all the same
            return [error] * len(paths)

    def _within(self, action: Callable[[], Result]) -> Result:
        return stores.within(action, self.limit) if "://" in self.root else action()


@dataclass(frozen=True, kw_only=True)
class StoredSample:
    """One sample as it lies in its shard: PNG data and JSON by member name. `name` says in errors where it is from."""

    name: str
    group_id: str
    members: Mapping[str, bytes]

    @property
    def references(self) -> int:
        """How many references the sample has."""
        return sum(member.startswith("ref") for member in self.members)

    def group(self, *, decode: bool | Collection[str] = True) -> Group:
        """Its `Group`; a collection names the members to decode, the pixels of the others are black."""
        try:
            return group_of(self.group_id, self.members, decode=decode)
        except LmrError as error:
            raise LmrError(f"{self.name}: {error}") from None


@dataclass(frozen=True, kw_only=True, eq=False)
class SampleStore:
    """The samples of one split by number, 0 to len - 1, in the order of the tables. Made by `open_samples`.

    It holds one small row per sample and no open file, so it can be sent to worker processes.
    """

    files: DatasetFiles
    split: Split
    size: int  # side of the stored crops, pixels
    group_ids: npt.NDArray[np.bytes_]
    scenes: npt.NDArray[np.int64]  # number of the scene of each sample
    shards: tuple[str, ...]
    shard: npt.NDArray[np.int64]  # index into `shards`
    offset: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]
    sha256: npt.NDArray[np.bytes_]

    @property
    def root(self) -> str:
        """The folder or URL, as it may be printed and kept."""
        return self.files.shown

    def __len__(self) -> int:
        return len(self.group_ids)

    def group_id(self, number: int) -> str:
        """Id of a sample."""
        return str(self.group_ids[number], "ascii")

    def read(self, numbers: Sequence[int]) -> list[StoredSample]:
        """Read samples, each as one range of its shard; remote file systems fetch them side by side.

        Raises LmrError naming shard and sample when a range can not be read, or is not what the build wrote.
        """
        waiting, done = list(dict.fromkeys(numbers)), dict[int, StoredSample]()
        for attempt in range(1, self.files.tries + 1):
            names = [self._shard(number) for number in waiting]
            starts = [int(self.offset[number]) for number in waiting]
            ends = [int(self.offset[number] + self.bytes[number]) for number in waiting]
            again = []
            for number, data in zip(waiting, self.files.ranges(names, starts, ends), strict=True):
                name = f"{self.root}/{self._shard(number)}: sample {self.group_id(number)}"
                problem = self._problem(number, data)
                if not problem and isinstance(data, bytes):
                    members = unpack(data, name)
                    done[number] = StoredSample(name=name, group_id=self.group_id(number), members=members)
                elif isinstance(data, FINAL) or attempt == self.files.tries:
                    raise LmrError(f"{name}: {problem}")
                else:  # short and altered ranges too: a connection may have broken
                    again.append(number)
            if not again:
                break
            waiting = again
            self.files.wait(attempt)
        return [done[number] for number in numbers]

    def _shard(self, number: int) -> str:
        return f"shards/{self.shards[self.shard[number]]}"

    def _problem(self, number: int, data: Any) -> str:
        if isinstance(data, Exception):
            return _cause(data)
        if len(data) < self.bytes[number]:
            return f"{len(data)} of its {self.bytes[number]} bytes are there; the shard is cut short, get it again"
        if len(data) > self.bytes[number]:
            return "more than the range asked for came; the server does not serve byte ranges, copy the dataset first"
        if hashlib.sha256(data).hexdigest().encode() != self.sha256[number]:
            return "its sha256 is not that of the samples table; the shard was altered, get it again or run lmr verify"
        return ""


def open_samples(dataset: str | Path, split: str = "train", *, tries: int = 0, pause: float = 0.5) -> SampleStore:
    """Open one split of a built dataset: a folder, or an fsspec URL (s3://, gs://, https://, memory:// ...).

    A read that fails is tried `tries` times in all (0: 4 for a URL, 2 for a folder), the second time after `pause`
    seconds, then after twice as long each time.
    Raises LmrError when it is no dataset, of another version, without that split, or a shard is missing or cut short.
    """
    root = str(dataset).rstrip("/") or "/"
    files = DatasetFiles(root=root, tries=tries or (4 if "://" in root else 2), pause=pause)
    manifest = _manifest(files)
    shards, samples = _table(files, manifest, "shards", ShardRow), _table(files, manifest, "samples", SampleRow)
    held = sorted(set(samples["split"].to_pylist()))
    if split not in held:
        raise LmrError(f"{files.shown}: split {split} has no groups; there are groups in: {', '.join(held) or 'none'}")
    shards, samples = (table.filter(pc.equal(table["split"], split)) for table in (shards, samples))
    _check_shards(files, shards)
    return _store(files, Split(split), manifest, shards, samples)


def _manifest(files: DatasetFiles) -> dict[str, Any]:
    def if_there(name: str) -> bytes | None:
        def call(system: Any, base: str) -> bytes | None:
            try:
                return cast("bytes", system.cat_file(f"{base}/{name}"))
            except (FileNotFoundError, NotADirectoryError):
                return None

        return files.insist(name, call)

    data = if_there(MANIFEST)
    if data is None:
        if if_there(DATASET_MARKER) is not None:
            raise LmrError(f"{files.shown}: has not finished; run the command that was making it again")
        raise LmrError(f"{files.shown}: not a dataset of lmr-tools (no {MANIFEST} there)")
    where = f"{files.shown}/{MANIFEST}"
    try:
        return checked(json.loads(data), where)
    except (ValueError, RecursionError):
        raise LmrError(f"{where}: not a readable JSON file; get it again") from None


def _table(files: DatasetFiles, manifest: Mapping[str, Any], name: str, row_type: type) -> pa.Table:
    place = f"tables/{name}.parquet"
    where = f"{files.shown}/{place}"
    entry = _section(_section(manifest, "tables"), name)
    if not entry:
        raise LmrError(f"{files.shown}: no table {name}, an older version built it; run the same build-dataset again")
    data = files.read(place)
    if hashlib.sha256(data).hexdigest() != entry.get("sha256"):
        raise LmrError(f"{where}: its sha256 is not that of dataset.json; the file was changed, run lmr verify")
    try:
        table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise LmrError(f"{where}: not a readable Parquet table ({str(error).splitlines()[0]})") from None
    for field in arrow_schema(row_type):
        found = table.schema.field(field.name).type if field.name in table.column_names else "missing"
        if found != field.type or table[field.name].null_count:
            raise LmrError(f"{where}: column {field.name} is {found} or has nulls, not {field.type}; run lmr verify")
    return table


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    part = values.get(name)
    return part if isinstance(part, dict) else {}


def _check_shards(files: DatasetFiles, shards: pa.Table) -> None:
    """Every shard is there with its size: one listing, and a question for each shard that it leaves open."""
    system, base = _filesystem(files.root)
    try:
        system.invalidate_cache(f"{base}/shards")
        listing = system.ls(f"{base}/shards", detail=True)
    except Exception:  # a store that can not list, or no such folder: each shard is asked for
        listing = []
    sizes = {str(entry["name"]).rsplit("/", 1)[-1]: entry.get("size") for entry in listing}
    problems = []
    for name, promised in zip(shards["shard"].to_pylist(), shards["bytes"].to_pylist(), strict=True):
        if not SHARD.fullmatch(name):
            raise LmrError(f"{files.shown}/tables/shards.parquet: {name[:80]!r} is no name of a shard; run lmr verify")
        place, size = f"shards/{name}", sizes.get(name)
        try:
            if size is None:
                size = files.insist(place, lambda system, base: system.info(f"{base}/{place}")["size"])  # noqa: B023
            if size is not None and size != promised:  # some web servers do not tell
                text = f"{size} bytes, the shards table says {promised}; it is cut short or altered"
                raise LmrError(f"{files.shown}/{place}: {text}, get it again or rebuild")
        except LmrError as error:
            problems.append(str(error))
    if problems:
        more = f" ({len(problems) - 1} more of {shards.num_rows} shards as well)" if len(problems) > 1 else ""
        raise LmrError(problems[0] + more)


def _store(
    files: DatasetFiles, split: Split, manifest: Mapping[str, Any], shards: pa.Table, samples: pa.Table
) -> SampleStore:
    names = shards["shard"].to_pylist()
    place = {name: number for number, name in enumerate(names)}
    room = np.array(shards["bytes"].to_pylist(), np.int64)
    ids, sums = samples["group_id"].to_pylist(), samples["sha256"].to_pylist()
    shard = np.array([place.get(name, -1) for name in samples["shard"].to_pylist()], np.int64)
    offset, size = (np.array(samples[name].to_pylist(), np.int64) for name in ("offset", "bytes"))
    wrong = (shard < 0) | (offset < 0) | (size <= 0) | (offset + size > (room[shard] if names else 0))
    wrong |= np.array([not GROUP_ID.fullmatch(i) or not SHA256.fullmatch(h) for i, h in zip(ids, sums, strict=True)])
    if wrong.any():
        row = samples.slice(int(wrong.argmax()), 1).to_pylist()[0]
        raise LmrError(f"{files.shown}/tables/samples.parquet: impossible row {json.dumps(row)[:300]}; run lmr verify")
    side = _section(manifest, "recipe").get("size")
    if not isinstance(side, int) or side < 1:
        raise LmrError(f"{files.shown}/{MANIFEST}: its recipe has no size; run lmr verify")
    return SampleStore(
        files=files,
        split=split,
        size=side,
        group_ids=np.array([name.encode() for name in ids]),
        scenes=np.unique(samples["scene"].to_pylist(), return_inverse=True)[1].reshape(-1).astype(np.int64),
        shards=tuple(names),
        shard=shard,
        offset=offset,
        bytes=size,
        sha256=np.array([text.encode() for text in sums]),
    )


@lru_cache(maxsize=8)
def _filesystem(root: str) -> tuple[Any, str]:
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    if "://" not in root:
        return LocalFileSystem(), str(Path(root).absolute())
    try:
        files, base = fsspec.core.url_to_fs(root)
    except (ImportError, ValueError) as error:
        shown = stores.without_secrets(root, place=True)
        raise LmrError(f"{shown}: {stores.without_secrets(str(error).splitlines()[0])}") from None
    return files, str(base).rstrip("/")


def _cause(error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    text = error.strerror if isinstance(error, OSError) and error.strerror else (str(error).splitlines() or [""])[0]
    return f"can not be read ({type(error).__name__}: {stores.without_secrets(text)[:160]})"
