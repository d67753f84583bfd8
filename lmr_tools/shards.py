"""Groups in and out of WebDataset tar files.

One sample is `<group_id>.target.png`, `<group_id>.ref0.png` ... and `<group_id>.json`. Any shard reads with plain
`webdataset.WebDataset`. The reader here is stricter, because a shard may come from anywhere and may be damaged: plain
tar only, PNG and JSON members only, sizes capped, keys never used as paths, no pickles; and a shard that was cut on a
block boundary, which tar readers take for a complete one, is an error. Imports `packing`: groups to members and back.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from lmr_tools.packing import GROUP_ID, group_of, pack
from lmr_tools.schema import Group, LmrError, SampleRow, ShardRow
from lmr_tools.tables import atomic_path

MEMBER = re.compile(r"json|target\.png|ref(0|[1-9][0-9]?)\.png")
BLOCK = 512
MAX_JSON_BYTES = 2**20
MAX_PNG_BYTES = 256 * 2**20


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """A tar file as it lies on the disk: its row of the `shards` table and its rows of the `samples` table."""

    row: ShardRow
    samples: tuple[SampleRow, ...]


@dataclass(frozen=True, kw_only=True)
class PackedSample:
    """One sample of a tar: {member: bytes}, and the range of the tar it fills, headers and padding included."""

    group_id: str
    members: dict[str, bytes]
    offset: int
    bytes: int
    sha256: str


def write_shard(path: Path, groups: Iterable[Group]) -> WrittenShard:
    """Write `groups`, all of one split, as one WebDataset tar, atomically; returns its rows for the tables.

    Equal groups in equal order give equal bytes. Raises `LmrError` for a group id that is not 1-80 of `A-Z a-z 0-9 _ -`
    (a dot in a key would merge samples), for an id that comes twice, and when there is no group at all.
    """
    return write_samples(path, map(pack, groups))


def write_samples(path: Path, samples: Iterable[Mapping[str, str | bytes]]) -> WrittenShard:
    """Write packed samples (`__key__` and members, as `pack` makes them) as one tar, atomically."""
    from webdataset import TarWriter  # imports torch, which readers do not need

    seen: set[str] = set()
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file, TarWriter(file, user="lmr", group="lmr", mtime=0, encoder=False) as writer:
            for sample in samples:
                key = str(sample["__key__"])
                if key in seen:
                    raise LmrError(f"{path}: group {key} comes twice")
                seen.add(key)
                writer.write(sample)
        if not seen:
            raise LmrError(f"{path}: no groups to write")
        return index_shard(temporary, path.name)


def index_shard(path: Path, name: str = "") -> WrittenShard:
    """The rows that describe a tar as it lies on the disk, read in one pass; no pixel is decoded.

    `name` is what the tables call it (the file's own name by default). Raises `LmrError` for damage of any kind and
    for samples of more than one split.
    """
    name = name or path.name
    samples: list[SampleRow] = []
    with path.open("rb") as stream:
        file = CountedFile(stream)
        for packed in read_samples(file, str(path)):
            group = group_of(packed.group_id, packed.members, decode=False)
            samples.append(
                SampleRow(
                    group_id=group.group_id,
                    split=str(group.split),
                    scene=group.scene,
                    shard=name,
                    offset=packed.offset,
                    bytes=packed.bytes,
                    sha256=packed.sha256,
                )
            )
    splits = sorted({row.split for row in samples})
    if len(splits) != 1:
        raise LmrError(f"{path}: samples of {' and '.join(splits) or 'no split'}; a shard holds one split")
    row = ShardRow(shard=name, split=splits[0], samples=len(samples), bytes=file.bytes, sha256=file.sha256())
    return WrittenShard(row=row, samples=tuple(samples))


class CountedFile:
    """A binary stream that counts and hashes what is read through it; `read` is short only at the end."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._hash = hashlib.sha256()
        self.bytes = 0

    def read(self, size: int) -> bytes:
        parts = []
        while size > 0 and (part := self._stream.read(size)):
            parts.append(part)
            size -= len(part)
        data = b"".join(parts)
        self._hash.update(data)
        self.bytes += len(data)
        return data

    def drain(self) -> int:
        """Read to the end; returns how many of the bytes were not zero."""
        foreign = 0
        while data := self.read(2**16):
            foreign += len(data) - data.count(0)
        return foreign

    def sha256(self) -> str:
        """Hex sha256 of what was read so far."""
        return self._hash.hexdigest()


def read_samples(file: CountedFile, name: str) -> Iterator[PackedSample]:
    """Yield the samples of a tar, in order, in one pass, one sample in memory.

    Raises `LmrError` naming `name` for anything but a whole plain tar of PNG and JSON members.
    """
    key, members, start, digest = "", dict[str, bytes](), 0, hashlib.sha256()

    def packed(end: int) -> PackedSample:
        return PackedSample(group_id=key, members=members, offset=start, bytes=end - start, sha256=digest.hexdigest())

    seen: set[str] = set()
    while header := file.read(BLOCK):
        place = file.bytes - len(header)
        if not header.strip(b"\0"):
            if file.bytes % BLOCK or len(file.read(BLOCK)) < BLOCK:
                break
            if file.drain():
                raise LmrError(f"{name}: data after the end of the tar; it was altered")
            if members:
                yield packed(place)
            return
        owner, member, size = _parse_header(header, name)
        if owner != key:
            if members:
                yield packed(place)
            if owner in seen:
                raise LmrError(f"{name}: sample {owner} comes twice")
            seen.add(owner)
            key, members, start, digest = owner, {}, place, hashlib.sha256()
        if member in members:
            raise LmrError(f"{name}: {owner}.{member} comes twice")
        members[member] = file.read(size)
        padding = file.read(-size % BLOCK)
        if len(members[member]) < size or len(padding) < -size % BLOCK:
            raise LmrError(f"{name}: ends inside {owner}.{member}; it is cut short, get it again or rebuild")
        for part in (header, members[member], padding):
            digest.update(part)
    raise LmrError(f"{name}: ends after {len(seen)} samples without a tar end mark; it is cut short, get it again")


def unpack(data: bytes, name: str) -> dict[str, bytes]:
    """{member: bytes} of the range of a tar that holds one sample; `name` says in errors what it is.

    Raises `LmrError` for anything but whole members of one sample.
    """
    owners: set[str] = set()
    members: dict[str, bytes] = {}
    place = 0
    while place < len(data):
        owner, member, size = _parse_header(data[place : place + BLOCK], name)
        end = place + BLOCK + size
        owners.add(owner)
        if member in members or len(owners) > 1 or end > len(data):
            raise LmrError(f"{name}: its range of the tar does not hold one whole sample; run lmr verify")
        members[member] = data[place + BLOCK : end]
        place = end + -size % BLOCK
    return members


def _parse_header(header: bytes, name: str) -> tuple[str, str, int]:
    try:
        info = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
    except (tarfile.HeaderError, UnicodeDecodeError):
        raise LmrError(f"{name}: not a plain tar, or damaged (a header can not be read); get it again") from None
    owner, _, member = info.name.partition(".")
    if info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        raise LmrError(f"{name}: {info.name[:80]!r} is not a plain file; shards hold nothing else")
    if not GROUP_ID.fullmatch(owner) or not MEMBER.fullmatch(member):
        raise LmrError(f"{name}: unexpected member {info.name[:80]!r}; shards hold ID.target.png, ID.refN.png, ID.json")
    limit = MAX_JSON_BYTES if member == "json" else MAX_PNG_BYTES
    if not 0 <= info.size <= limit:
        raise LmrError(f"{name}: {info.name} claims {info.size} bytes, the limit is {limit}")
    return owner, member, info.size


def read_shard(
    source: Path | str | BinaryIO, expected: ShardRow | None = None, *, only: Collection[str] | None = None
) -> Iterator[Group]:
    """Yield the groups of a shard; with `only`, decode and yield just those ids.

    Raises `LmrError` naming the shard for damage of any kind. With `expected` the size of a file is judged before the
    first group; samples, bytes and sha256 when the last one was yielded, so that a stream is read once.
    """
    name = expected.shard if expected else str(getattr(source, "name", "shard"))
    if isinstance(source, str | Path):
        name = str(source)
        try:
            size = Path(source).stat().st_size
            opened: Any = Path(source).open("rb")  # noqa: SIM115 - closed by the with below
        except OSError as error:
            raise LmrError(f"{name}: can not be read ({error.strerror})") from None
        if expected and size != expected.bytes:
            opened.close()
            raise LmrError(f"{name}: {size} bytes, the shards table says {expected.bytes}; it is cut short or altered")
    else:
        opened = nullcontext(source)
    with opened as stream:
        file, samples = CountedFile(stream), 0
        for packed in read_samples(file, name):
            samples += 1
            if only is None or packed.group_id in only:
                try:
                    yield group_of(packed.group_id, packed.members)
                except LmrError as error:
                    raise LmrError(f"{name}: {error}") from None
    if expected:
        for what, found, promised in (
            ("samples", samples, expected.samples),
            ("bytes", file.bytes, expected.bytes),
            ("sha256", file.sha256(), expected.sha256),
        ):
            if found != promised:
                raise LmrError(f"{name}: {what} {found}, the shards table says {promised}; it is cut short or altered")
