"""Where photos are: folders, globs, tar shards and fsspec URLs, listed in a fixed order and read by address.

Local folders are walked with symlinks followed once; files inside plain tars (WebDataset, img2dataset) are addressed
by byte offset, never extracted. Remote reads are repeated and have a time limit (`stores`).
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from lmr_tools.images import MAX_BYTES, SUFFIXES, BadImage, decode
from lmr_tools.schema import ImageRow, LmrError
from lmr_tools.stores import LIMIT, patiently, without_secrets

if TYPE_CHECKING:
    from lmr_tools.schema import Image

TAR_SUFFIX = ".tar"
# Photos that some camera or site writes and this toolkit does not decode: named in `rejects`, not passed over.
UNSUPPORTED = (".avif", ".bmp", ".cr2", ".cr3", ".dng", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".nef", ".arw")
# Archives that hold no photo at a known byte.
PACKED = (".7z", ".rar", ".tar.bz2", ".tar.gz", ".tar.xz", ".tar.zst", ".tgz", ".zip")
UNLISTED = "unlisted"  # stamp of a folder that can not be read
LONGEST_END = 2**20  # bytes of zeros that may end a tar: writers fill up their last record, of 10 kB as a rule
DATASET_MARKER = ".lmr-dataset"  # stands in every folder that a build writes
SLOWEST = 1e6  # bytes per second below which a tar counts as stuck
# What the object stores call the thing that changes with a file.
STAMPS = ("ETag", "etag", "md5Hash", "mtime", "LastModified")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where photos are: `root` is a folder or URL prefix; paths in the tables are relative to it."""

    root: str
    remote: bool
    pattern: str | None  # a glob, or one file, below the root
    given: str


@dataclass(frozen=True, kw_only=True)
class Found:
    """One file of a source, not yet opened. `stamp` changes when the file does."""

    source: int
    path: str
    offset: int | None
    bytes: int
    stamp: str


@dataclass(frozen=True, kw_only=True)
class Listing:
    """Everything below the sources: readable files, and files refused by their name alone (with the reason)."""

    found: tuple[Found, ...]
    refused: tuple[tuple[Found, str, str], ...]
    other_files: int


def parse_source(text: str) -> Source:
    """A command-line SOURCE as a `Source`; raises LmrError when nothing is there. Its `given` holds no secrets."""
    if not is_utf8(text):
        # dataset.json names the sources; told at its end, a long build would be lost.
        raise LmrError(f"{text}: the path is not UTF-8; rename the folder, or name a link to it")
    if "://" in text:
        shown = without_secrets(text, place=True)
        wild = any(mark in text for mark in "*?[")
        is_file = text.lower().endswith((*SUFFIXES, TAR_SUFFIX))
        if not wild and not is_file:
            return Source(root=text.rstrip("/"), remote=True, pattern=None, given=shown)
        parts = text.split("/")
        # The root ends before the first part with a wildcard, or before the file's name.
        cut = next((i for i, part in enumerate(parts) if any(mark in part for mark in "*?[")), len(parts) - 1)
        return Source(root="/".join(parts[:cut]), remote=True, pattern="/".join(parts[cut:]), given=shown)
    path = Path(text)
    if path.is_dir():
        return Source(root=str(path), remote=False, pattern=None, given=text)
    if path.is_file():
        return Source(root=str(path.parent), remote=False, pattern=path.name, given=text)
    glob_at = next((i for i, part in enumerate(path.parts) if any(mark in part for mark in "*?[")), None)
    if glob_at is None:
        raise LmrError(f"{text}: no such file or folder")
    root = Path(*path.parts[:glob_at]) if glob_at else Path()
    return Source(root=str(root), remote=False, pattern=str(PurePosixPath(*path.parts[glob_at:])), given=text)


def list_photos(sources: Sequence[Source]) -> Listing:
    """List the photos of all sources in a fixed order: by source, then path, then place inside a tar."""
    found: list[Found] = []
    refused: list[tuple[Found, str, str]] = []
    others = 0
    for number, source in enumerate(sources):
        files = _remote_files(source) if source.remote else _local_files(source)
        for path, size, stamp in sorted(set(files)):  # a glob may name a folder and what is in it
            file = Found(source=number, path=path, offset=None, bytes=size, stamp=stamp)
            suffix = PurePosixPath(path).suffix.lower()
            if not is_utf8(path):
                shown = path.encode("utf-8", "backslashreplace").decode()
                named = Found(source=number, path=shown, offset=None, bytes=size, stamp=stamp)
                refused.append((named, "name", "the file name is not UTF-8; rename it"))
            elif stamp == UNLISTED:
                refused.append((file, "unreadable folder", "it can not be listed; see its permissions"))
            elif suffix == TAR_SUFFIX:
                members, problem = _tar_members(source, file)
                found.extend(member for member, reason, _ in members if not reason)
                refused.extend(member for member in members if member[1])
                if problem:
                    refused.append((file, "broken tar", problem))
            elif suffix in SUFFIXES:
                found.append(file)
            elif suffix in UNSUPPORTED:
                refused.append((file, *_unsupported(suffix)))
            elif path.lower().endswith(PACKED):
                refused.append((file, "packed archive", "only plain tars are read; unpack it"))
            else:
                others += 1
    return Listing(found=tuple(found), refused=tuple(refused), other_files=others)


def _unsupported(suffix: str) -> tuple[str, str]:
    return "unsupported format", f"{suffix} is not read; convert it to JPEG or PNG"


def is_utf8(path: str) -> bool:
    """Whether a path can be written into tables and JSON; file systems hold names that can not."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _local_files(source: Source) -> Iterator[tuple[str, int, str]]:
    root = Path(source.root)
    if source.pattern is not None:
        paths: Iterable[Path] = root.glob(source.pattern)
        for path in paths:
            if _in_dataset(path if path.is_dir() else path.parent, root):
                continue
            if path.is_dir():
                yield from ((str(PurePosixPath(path.relative_to(root)) / p), n, t) for p, n, t in _walk(path))
            elif _is_photo_file(path):
                yield _stat(path, root)
        return
    yield from _walk(root)


def _is_photo_file(path: Path) -> bool:
    # macOS leaves ._name files beside photos on foreign disks: not photos.
    return not path.name.startswith("._") and (path.is_file() or path.is_symlink())


def _in_dataset(folder: Path, root: Path) -> bool:
    below = folder.relative_to(root).parts
    return any((root.joinpath(*below[:depth]) / DATASET_MARKER).exists() for depth in range(len(below) + 1))


def _walk(root: Path) -> Iterator[tuple[str, int, str]]:
    seen: set[tuple[int, int]] = set()
    failed: list[OSError] = []
    for folder, folders, names in os.walk(root, onerror=failed.append, followlinks=True):
        state = Path(folder).stat()
        if (state.st_dev, state.st_ino) in seen or DATASET_MARKER in names:
            folders.clear()  # a symlink led back here, or a built dataset lies among the photos
            continue
        seen.add((state.st_dev, state.st_ino))
        folders.sort()
        for name in names:
            path = Path(folder) / name
            if _is_photo_file(path):
                yield _stat(path, root)
    # os.walk passes over what it can not list: the photos in there must not be missed without a word.
    yield from ((Path(error.filename).relative_to(root).as_posix(), 0, UNLISTED) for error in failed)


def _stat(path: Path, root: Path) -> tuple[str, int, str]:
    relative = path.relative_to(root).as_posix()
    try:
        state = path.stat()
    except OSError:  # a dangling link: reading it will say why
        return relative, 0, "missing"
    return relative, state.st_size, str(state.st_mtime_ns)


@lru_cache(maxsize=8)
def _filesystem(root: str) -> tuple[Any, str]:
    import fsspec

    try:
        return cast("tuple[Any, str]", fsspec.core.url_to_fs(root))
    except (ImportError, ValueError) as error:
        raise LmrError(f"{without_secrets(root, place=True)}: {without_secrets(str(error).splitlines()[0])}") from None


def _remote_files(source: Source) -> Iterator[tuple[str, int, str]]:
    files, base = _filesystem(source.root)

    def ask() -> dict[str, Any]:
        if source.pattern is None:
            return cast("dict[str, Any]", files.find(base, detail=True))
        return cast("dict[str, Any]", files.glob(f"{base.rstrip('/')}/{source.pattern}", detail=True))

    try:
        entries = patiently(source.root, ask)
    except (LmrError, OSError) as error:
        raise LmrError(f"{source.given}: can not be listed ({without_secrets(str(error))[:200]})") from None
    prefix = base.rstrip("/") + "/"
    for path, entry in entries.items():
        if entry.get("type") == "file":
            stamps = (str(entry[name]) for name in STAMPS if name in entry)
            yield path.removeprefix(prefix), int(entry.get("size") or 0), next(stamps, "")


Member = tuple[Found, str, str]  # reason and detail are empty for one that is read


def _tar_members(source: Source, file: Found) -> tuple[list[Member], str]:
    """Photos of a tar, and what is wrong with it: members before the damage are kept, the damage is its own row."""
    if not source.remote:
        return _list_members(source, file, (tarfile.TarError, EOFError, OSError))

    # A broken tar stays one, however often it is read; a failing store does not.
    def read() -> tuple[list[Member], str]:
        return _list_members(source, file, (tarfile.TarError, EOFError))

    try:  # listing reads headers all over the file: a large one takes longer than other calls
        return patiently(f"{source.root}/{file.path}", read, limit=LIMIT + file.bytes / SLOWEST)
    except (LmrError, OSError) as error:
        return [], without_secrets(str(error))[:200]


def _list_members(source: Source, file: Found, damage: tuple[type[Exception], ...]) -> tuple[list[Member], str]:
    members: list[Member] = []
    try:
        # Names in another encoding are only shown, never opened: what is not UTF-8 is written as \xff.
        with (
            _open(source, file.path) as stream,
            tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="backslashreplace") as tar,
        ):
            for member in tar:
                reason = _judge(member)
                if reason is not None:
                    found = Found(
                        source=file.source,
                        path=f"{file.path}::{member.name}",
                        offset=member.offset_data,
                        bytes=member.size,
                        stamp=file.stamp,
                    )
                    members.append((found, *reason))
            problem = _ending(stream, tar.offset)
    except damage as error:
        problem = str(error)[:120]
    photos = sum(not reason for _, reason, _ in members)
    return members, f"{problem} after {photos} photos" if problem else ""


def _judge(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """Reason and detail why a tar's member is refused, ("", "") for a photo, None for what is no photo by its name."""
    suffix = PurePosixPath(member.name).suffix.lower()
    if member.isdir() or suffix not in (*SUFFIXES, *UNSUPPORTED):
        return None
    if not member.isfile() or member.issparse():
        return "not a plain member", "a link, device or sparse file in a tar is not read"
    return ("", "") if suffix in SUFFIXES else _unsupported(suffix)


def _ending(stream: BinaryIO, at: int) -> str:
    """What is wrong where the members of a tar end; tarfile takes a damaged header for the end, without a word."""
    stream.seek(at)
    rest = stream.read(LONGEST_END + 1)
    if len(rest) < tarfile.BLOCKSIZE:
        return "cut: no end mark"
    if rest[: tarfile.BLOCKSIZE].strip(b"\0"):
        return f"damaged header at byte {at}"
    if rest.strip(b"\0") or len(rest) > LONGEST_END:
        return f"more data behind the end mark at byte {at}"
    return ""


def _open(source: Source, path: str) -> BinaryIO:
    if source.remote:
        files, base = _filesystem(source.root)
        return cast("BinaryIO", files.open(f"{base.rstrip('/')}/{path}", "rb"))
    return (Path(source.root) / path).open("rb")


def read_bytes(sources: Sequence[Source], photo: Found | ImageRow) -> bytes:
    """The bytes of a photo; raises `BadImage` when it can not be read any more."""
    source = sources[photo.source]
    if photo.bytes > MAX_BYTES:
        raise BadImage("too large", f"{photo.bytes} bytes, the limit is {MAX_BYTES}")

    def read() -> bytes:
        if photo.offset is None:
            with _open(source, photo.path) as file:
                return file.read(MAX_BYTES + 1)
        with _open(source, photo.path.split("::", 1)[0]) as file:
            file.seek(photo.offset)
            return file.read(photo.bytes)

    try:
        return patiently(f"{source.root}/{photo.path}", read) if source.remote else read()
    except OSError as error:
        raise BadImage("unreadable", error.strerror or without_secrets(str(error))) from None
    except LmrError as error:
        raise BadImage("unreadable", str(error)) from None


def read_photo(sources: Sequence[Source], row: ImageRow, *, enough: int | None = None) -> Image:
    """The pixels of a scanned photo, RGB uint8 (H, W, 3); LmrError when the file is gone or has changed.

    `enough`: see `images.decode`.
    """
    data = read_bytes(sources, row)
    if hashlib.sha256(data).hexdigest() != row.sha256:
        raise LmrError(
            f"{row.path}: the file changed since it was scanned; run the build again, with --rehash if the file kept "
            "its size and time"
        )
    return decode(data, enough=enough)
