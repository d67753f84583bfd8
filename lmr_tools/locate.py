"""Where photos lie now: found among sources by content, whatever their names and folders have become.

A file is hashed only when a wanted photo has its size, and what was hashed is kept in the work folder, so that a run
after a kill opens no file twice. Imports `images` for its refusals and `sources`, which says where the bytes are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

from lmr_tools.images import BadImage
from lmr_tools.schema import ImageRow
from lmr_tools.sources import Found, Source, list_photos, read_bytes
from lmr_tools.tables import append_piece, fingerprint, read_pieces
from lmr_tools.workers import Mapper, Tracker

PIECE = 1024
LOCATE_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Hashed:
    """The sha256 of one file, by the file's place, size and time; empty when it could not be read."""

    key: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Lost:
    """A photo that is in no source: `reason` is missing, changed (its path holds another file) or unreadable."""

    row: ImageRow
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Located:
    """`places`: image id -> a row that says where the photo lies now; `lost`: the photos that were not found."""

    places: Mapping[str, ImageRow]
    lost: tuple[Lost, ...]


def locate(
    wanted: Sequence[ImageRow], sources: Sequence[Source], work: Path, mapper: Mapper, track: Tracker
) -> Located:
    """Find every photo of `wanted` in `sources` by its sha256; among equal files the first of the listing is taken."""
    listing = list_photos(sources)
    sizes = {row.bytes for row in wanted}
    # A store that names no size (0) can not be asked to skip a file.
    fitting = [found for found in listing.found if found.bytes in sizes or not found.bytes]
    hashes = track(hash_all(fitting, sources, work, mapper), len(fitting), "locate")
    place_of: dict[str, Found] = {}
    unreadable: set[str] = set()
    for found, sha256 in zip(fitting, hashes, strict=True):
        if sha256:
            place_of.setdefault(sha256, found)
        else:
            unreadable.add(found.path)
    names = {found.path for found in listing.found}
    tails = {PurePosixPath(found.path).name: found.path for found in reversed(listing.found)}
    places, lost = {}, []
    for row in wanted:
        if found_now := place_of.get(row.sha256):
            places[row.image_id] = replace(
                row,
                source=found_now.source,
                path=found_now.path,
                offset=found_now.offset,
                bytes=found_now.bytes or row.bytes,
            )
        else:
            lost.append(_lost(row, names, tails, unreadable))
    return Located(places=places, lost=tuple(lost))


def _lost(row: ImageRow, names: set[str], tails: Mapping[str, str], unreadable: set[str]) -> Lost:
    namesake = row.path if row.path in names else tails.get(PurePosixPath(row.path).name)
    if namesake is None:
        return Lost(row=row, reason="missing", detail=f"no source holds a file with sha256 {row.sha256}")
    if namesake in unreadable:
        return Lost(row=row, reason="unreadable", detail=f"{namesake} can not be read")
    return Lost(row=row, reason="changed", detail=f"{namesake} is another file, its sha256 is not {row.sha256}")


def hash_all(found: Sequence[Found], sources: Sequence[Source], work: Path, mapper: Mapper) -> Iterator[str]:
    """The sha256 of every file, in order; empty for one that can not be read, which is tried again next time."""
    folder = work / f"hashes-{LOCATE_VERSION}"
    known = {row.key: row.sha256 for row in read_pieces(folder, Hashed)}
    keys = [
        fingerprint(sources[file.source].root, file.path, file.offset, file.bytes, file.stamp) if file.stamp else ""
        for file in found
    ]
    fresh = mapper(
        partial(_hash, sources=tuple(sources)),
        [file for file, key in zip(found, keys, strict=True) if key not in known],
    )
    before = set(known)
    piece: list[Hashed] = []
    try:
        for key in keys:
            if key in before:
                yield known[key]
                continue
            sha256 = next(fresh)
            if key and sha256:
                piece.append(Hashed(key=key, sha256=sha256))
            if len(piece) == PIECE:
                append_piece(folder, piece, Hashed)
                piece = []
            yield sha256
    finally:
        if piece:
            append_piece(folder, piece, Hashed)


def _hash(found: Found, *, sources: tuple[Source, ...]) -> str:
    try:
        return hashlib.sha256(read_bytes(sources, found)).hexdigest()
    except BadImage:
        return ""
