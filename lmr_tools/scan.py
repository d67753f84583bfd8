"""One look at every photo: hash, decode, quality, perceptual hash; what comes out are `images` and `rejects` rows.

A look is kept in the work folder under path, size and time stamp, so a photo is opened again only when it changed.
Imports `sources`, which says where the bytes are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np

from lmr_tools.images import SUFFIXES, BadImage, decode
from lmr_tools.schema import ImageRow, LmrError, RejectRow
from lmr_tools.sources import Found, Listing, Source, list_photos, read_bytes
from lmr_tools.tables import append_piece, fingerprint, read_pieces
from lmr_tools.workers import Mapper, Tracker

PIECE = 256
SCAN_VERSION = 1
QUALITY_SIDE = 640
BLOCK = 16
BLOCK_STD = 4.0
HASH_SIDE = 16


@dataclass(frozen=True, kw_only=True)
class Looked:
    """What one look at a photo gave; `reason` is empty for a good one. Kept in the work folder."""

    key: str
    sha256: str
    width: int
    height: int
    phash: str
    sharpness: float
    texture: float
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Scan:
    """The outcome of a scan: readable photos, refused files, their reject rows, how many files were no photos."""

    photos: tuple[ImageRow, ...]
    refused: tuple[ImageRow, ...]
    rejects: tuple[RejectRow, ...]
    other_files: int


def scan(
    sources: Sequence[Source], work: Path, mapper: Mapper, track: Tracker, *, labelled: bool, rehash: bool = False
) -> Scan:
    """List the sources and look at every photo; LmrError when there is none.

    A photo's id is the first 16 hex digits of its sha256, so it survives renaming and moving; copies get -1, -2 ...,
    files without readable bytes an id made from their path. `labelled`: the first sub-folder is the scene.
    """
    listing = list_photos(sources)
    if not listing.found:
        given = " ".join(source.given for source in sources)
        detail = f"{len(listing.refused)} refused, {listing.other_files} other files"
        raise LmrError(f"{given}: no photos found ({detail}); photos are {', '.join(SUFFIXES)} files or tars of them")
    return scan_listing(listing, sources, work, mapper, track, labelled=labelled, rehash=rehash)


def scan_listing(
    listing: Listing,
    sources: Sequence[Source],
    work: Path,
    mapper: Mapper,
    track: Tracker,
    *,
    labelled: bool,
    rehash: bool = False,
) -> Scan:
    """`scan` for files that are listed already."""
    looked = track(look_at_all(listing.found, sources, work, mapper, rehash=rehash), len(listing.found), "scan")
    copies: Counter[str] = Counter()
    photos, refused, rejects = [], [], []
    for found, look in zip(listing.found, looked, strict=True):
        name = look.sha256[:16] if look.sha256 else _path_id(found)
        number = copies[name]
        copies[name] += 1
        row = _row(found, f"{name}-{number}" if number else name, look, labelled)
        if look.reason:
            refused.append(row)
            rejects.append(_reject(row, look.reason, look.detail))
        else:
            photos.append(row)
    for found, reason, detail in listing.refused:
        row = _row(found, _path_id(found), _refused("", "", BadImage(reason, detail)), labelled)
        refused.append(row)
        rejects.append(_reject(row, reason, detail))
    return Scan(photos=tuple(photos), refused=tuple(refused), rejects=tuple(rejects), other_files=listing.other_files)


def _path_id(found: Found) -> str:
    return f"path-{fingerprint(found.source, found.path, found.offset)}"


def _row(found: Found, image_id: str, look: Looked, labelled: bool) -> ImageRow:
    folders = found.path.split("/")[:-1]
    return ImageRow(
        image_id=image_id,
        path=found.path,
        width=look.width,
        height=look.height,
        sha256=look.sha256,
        scene=folders[0] if labelled and folders else None,
        status="rejected" if look.reason else "unused",
        source=found.source,
        offset=found.offset,
        bytes=found.bytes,
        phash=look.phash,
        sharpness=round(look.sharpness, 4),
        texture=round(look.texture, 6),
        no_target=None,
    )


def _reject(row: ImageRow, reason: str, detail: str) -> RejectRow:
    return RejectRow(image_id=row.image_id, path=row.path, stage="scan", reason=reason, detail=detail)


def look(found: Found, *, sources: Sequence[Source]) -> Looked:
    """Hash, decode and measure one photo; never raises for a bad photo, the reason stands in the result."""
    key = _look_key(found)
    try:
        data = read_bytes(sources, found)
    except BadImage as error:
        return _refused(key, "", error)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        image = decode(data)
    except BadImage as error:
        return _refused(key, sha256, error)
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    sharpness, texture = quality(grey)
    height, width = grey.shape
    return Looked(
        key=key,
        sha256=sha256,
        width=width,
        height=height,
        phash=perceptual_hash(grey),
        sharpness=sharpness,
        texture=texture,
        reason="",
        detail="",
    )


def _refused(key: str, sha256: str, error: BadImage) -> Looked:
    return Looked(
        key=key,
        sha256=sha256,
        width=0,
        height=0,
        phash="",
        sharpness=0.0,
        texture=0.0,
        reason=error.reason,
        detail=error.detail,
    )


def _look_key(found: Found) -> str:
    return fingerprint(SCAN_VERSION, found.path, found.offset, found.bytes, found.stamp)


def look_at_all(
    found: Sequence[Found], sources: Sequence[Source], cache: Path, mapper: Mapper, *, rehash: bool = False
) -> Iterator[Looked]:
    """One `Looked` per file, in order; files seen by an earlier run, unchanged in size and time, are not opened.

    The cache is written every 256 photos, so a killed run repeats at most those. `rehash` opens every file.
    """
    roots = [source.root for source in sources]
    folder = cache / f"scan-{SCAN_VERSION}"
    known = {} if rehash else {row.key: row for row in read_pieces(folder, Looked)}
    # The key of a file includes its source's root, so that two sources may hold the same relative path.
    keys = [fingerprint(roots[file.source], _look_key(file)) for file in found]
    fresh_files = [file for file, key in zip(found, keys, strict=True) if key not in known]
    fresh = mapper(partial(look, sources=tuple(sources)), fresh_files)
    piece: list[Looked] = []
    try:
        for key in keys:
            if key in known:
                yield known[key]
                continue
            row = replace(next(fresh), key=key)
            if row.reason != "unreadable":  # a file that could not be read today may be readable tomorrow
                piece.append(row)
            if len(piece) == PIECE:
                append_piece(folder, piece, Looked)
                piece = []
            yield row
    finally:
        if piece:
            append_piece(folder, piece, Looked)


def quality(grey: np.ndarray) -> tuple[float, float]:
    """Sharpness and texture of a grey uint8 picture at long side 640 (smaller ones as they are).

    Sharpness is the variance of the Laplacian; texture the share of 16x16 blocks with a standard deviation above 4.
    """
    scale = QUALITY_SIDE / max(grey.shape)
    if scale < 1:
        grey = cv2.resize(grey, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    sharpness = float(cv2.Laplacian(grey, cv2.CV_64F).var())
    rows, columns = grey.shape[0] // BLOCK, grey.shape[1] // BLOCK
    if not rows or not columns:
        return sharpness, 0.0
    blocks = grey[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK).astype(np.float32)
    return sharpness, float((blocks.std(axis=(1, 3)) > BLOCK_STD).mean())


def perceptual_hash(grey: np.ndarray) -> str:
    """256-bit perceptual hash: signs of the 16x16 lowest DCT coefficients against their median, as 64 hex digits."""
    small = cv2.resize(grey, (4 * HASH_SIDE, 4 * HASH_SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[:HASH_SIDE, :HASH_SIDE].ravel()
    bits = low > np.median(low[1:])  # the first coefficient is the mean: exposure, not content
    return np.packbits(bits).tobytes().hex()
