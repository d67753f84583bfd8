"""Features once per photo, geometry once per unordered pair: the cached, resumable middle of the build.

Both are kept in the work folder, content-addressed: a photo's features under its sha256, a pair's geometry in the file
of the photo with the smaller sha256. What is there is not computed again, so a killed run goes on and a grown folder
costs only what is new. Imports `features`, `geometry`, `observations` and `sources`, whose functions it applies,
and `dedup`'s rejects.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from lmr_tools.dedup import reject
from lmr_tools.features import Features, extract_features, features_from_bytes, features_to_bytes
from lmr_tools.geometry import PairGeometry, geometry_from_bytes, geometry_to_bytes, match_pair
from lmr_tools.observations import Observations, match_observed, observations_from_bytes
from lmr_tools.schema import ImageRow, LmrError, RejectRow
from lmr_tools.sources import Source, read_photo
from lmr_tools.tables import fingerprint, write_bytes
from lmr_tools.workers import Mapper, Tracker

# Part of the names of the folders below: raise it when features or geometry come out differently.
GEOMETRY_VERSION = 2

# One row per unordered pair; `a` is the photo with the smaller sha256. Numbers only: the points stay on disk.
PAIR_NUMBERS = np.dtype(
    [
        ("a", np.int32),
        ("b", np.int32),
        ("matches", np.int32),
        ("inliers", np.int32),
        ("consistent", np.int32),
        ("overlap_a", np.float64),
        ("overlap_b", np.float64),
        ("scale_log2", np.float64),
        ("scale_ratio", np.float64),
    ]
)


@dataclass(frozen=True, kw_only=True)
class PairStore:
    """Where features and geometries of one setting lie: `work`, SIFT's long side, features per photo."""

    work: Path
    max_side: int
    max_features: int
    model: str = ""  # fingerprint of a reconstruction: its observations take the place of SIFT features

    @property
    def setting(self) -> str:
        """What decides features and geometries, as part of their folders' names."""
        own = (self.model,) if self.model else (self.max_side, self.max_features)
        return fingerprint(GEOMETRY_VERSION, *own)

    @property
    def features(self) -> Path:
        """Folder of the feature files."""
        return self.work / f"features-{self.setting}"

    @property
    def pairs(self) -> Path:
        """Folder of the geometry files."""
        return self.work / f"pairs-{self.setting}"

    def feature_file(self, sha256: str) -> Path:
        """File of one photo's features; two hex digits of folder keep directories small."""
        return self.features / sha256[:2] / f"{sha256}.sift"

    def pair_file(self, sha256: str) -> Path:
        """File of the geometries in which this photo has the smaller sha256."""
        return self.pairs / sha256[:2] / f"{sha256}.npz"


def extract_all(
    rows: Sequence[ImageRow], sources: Sequence[Source], store: PairStore, mapper: Mapper, track: Tracker
) -> list[RejectRow]:
    """Make the missing feature files; returns the rejects: photos that could not be read any more."""
    missing = [row for row in rows if not store.feature_file(row.sha256).is_file()]
    results = mapper(partial(_extract, sources=tuple(sources), store=store), missing)
    reasons = track(results, len(missing), "features")
    return [
        reject(row, "features", "unreadable", reason) for row, reason in zip(missing, reasons, strict=True) if reason
    ]


def _extract(row: ImageRow, *, sources: Sequence[Source], store: PairStore) -> str:
    try:
        image = read_photo(sources, row)
    except LmrError as error:
        return str(error)
    features = extract_features(image, max_side=store.max_side, max_features=store.max_features)
    write_bytes(store.feature_file(row.sha256), features_to_bytes(features))
    return ""


def load_features(store: PairStore, sha256: str) -> Features:
    """Features of a photo from the work folder; a damaged file is an LmrError that says how to go on."""
    path = store.feature_file(sha256)
    try:
        return features_from_bytes(path.read_bytes())
    except FileNotFoundError:
        raise LmrError(f"{path}: the features are gone; run the build again") from None
    except LmrError as error:
        raise LmrError(f"{path}: {error}; delete this file and run the build again") from None


def verify_all(
    rows: Sequence[ImageRow], candidates: npt.NDArray[np.int32], store: PairStore, mapper: Mapper
) -> Iterator[npt.NDArray[np.void]]:
    """Geometry of every candidate pair, once per unordered pair.

    `candidates` (N, k) holds row numbers, -1 for none. Yields one PAIR_NUMBERS array per photo (the pairs in which its
    sha256 is the smaller one), in row order, so that memory holds numbers and never points.
    """
    low, high = _unordered(rows, candidates)
    begin = np.searchsorted(low, np.arange(len(rows) + 1))

    def partners(index: int) -> tuple[tuple[int, str], ...]:
        return tuple((other, rows[other].sha256) for other in high[begin[index] : begin[index + 1]].tolist())

    tasks = ((index, row.sha256, partners(index)) for index, row in enumerate(rows))
    # Neighbours in the list share partners: a worker that takes a run of them reads each feature file less often.
    for batch in mapper(partial(_verify_batch, store=store), _batches(tasks, 4)):
        yield from batch


def _unordered(
    rows: Sequence[ImageRow], candidates: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Every candidate pair once: the photos of smaller sha256, ascending, and for each its partners, ascending.

    Arrays, since a set of partners per photo would take 2 kB.
    """
    rank = np.empty(len(rows), np.int64)
    rank[sorted(range(len(rows)), key=lambda number: rows[number].sha256)] = np.arange(len(rows))
    target, place = np.nonzero((candidates >= 0) & (candidates != np.arange(len(rows))[:, None]))
    other = candidates[target, place].astype(np.int64)
    first = rank[target] < rank[other]
    keys = np.unique(np.where(first, target * len(rows) + other, other * len(rows) + target))
    low, high = np.divmod(keys, max(len(rows), 1))
    return low, high


PairTask = tuple[int, str, tuple[tuple[int, str], ...]]


def _batches(tasks: Iterable[PairTask], size: int) -> Iterator[tuple[PairTask, ...]]:
    iterator = iter(tasks)
    while batch := tuple(itertools.islice(iterator, size)):
        yield batch


def _verify_batch(tasks: Sequence[PairTask], *, store: PairStore) -> list[npt.NDArray[np.void]]:
    return [_verify(task, store) for task in tasks]


@lru_cache(maxsize=128)
def _cached_features(store: PairStore, sha256: str) -> Features:
    return load_features(store, sha256)


def observation_file(store: PairStore, sha256: str) -> Path:
    """File of what one photo observes of the reconstruction."""
    return store.features / sha256[:2] / f"{sha256}.points"


@lru_cache(maxsize=128)
def _observations(store: PairStore, sha256: str) -> Observations:
    path = observation_file(store, sha256)
    try:
        return observations_from_bytes(path.read_bytes())
    except FileNotFoundError:
        raise LmrError(f"{path}: the observations are gone; run the build again") from None
    except LmrError as error:
        raise LmrError(f"{path}: {error}; delete this file and run the build again") from None


def _measure(store: PairStore, a: str, b: str) -> PairGeometry:
    if store.model:
        return match_observed(_observations(store, a), _observations(store, b))
    return match_pair(_cached_features(store, a), _cached_features(store, b))


def _verify(task: PairTask, store: PairStore) -> npt.NDArray[np.void]:
    index, sha256, partners = task
    numbers = np.zeros(len(partners), PAIR_NUMBERS)
    if not partners:
        return numbers
    path = store.pair_file(sha256)
    known = _read_blobs(path)
    fresh = False
    for place, (other, other_sha256) in enumerate(partners):
        geometry = _kept(known.get(other_sha256))
        if geometry is None:
            geometry = _measure(store, sha256, other_sha256)
            known[other_sha256] = geometry_to_bytes(geometry)
            fresh = True
        numbers[place] = (
            index,
            other,
            geometry.matches,
            geometry.inliers,
            geometry.consistent,
            geometry.overlap_a,
            geometry.overlap_b,
            geometry.scale_log2,
            geometry.scale_ratio,
        )
    if fresh:
        buffer = io.BytesIO()
        blobs: dict[str, Any] = {name: np.frombuffer(known[name], np.uint8) for name in sorted(known)}
        np.savez(buffer, **blobs)
        write_bytes(path, buffer.getvalue())
    return numbers


def _kept(blob: bytes | None) -> PairGeometry | None:
    if blob is None:
        return None
    try:
        return geometry_from_bytes(blob)
    except LmrError:
        return None  # damaged: computed again and replaced


def _read_blobs(path: Path) -> dict[str, bytes]:
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name].tobytes() for name in archive.files}
    except (OSError, ValueError, BadZipFile, EOFError):
        return {}  # damaged: computed again and replaced


def load_geometry(store: PairStore, a: str, b: str) -> PairGeometry:
    """Geometry of the photos with sha256 `a` and `b`, as seen from `a`."""
    low, high = min(a, b), max(a, b)
    path = store.pair_file(low)
    try:
        with np.load(path, allow_pickle=False) as archive:
            geometry = geometry_from_bytes(archive[high].tobytes())
    except (OSError, ValueError, KeyError, BadZipFile, EOFError):
        raise LmrError(f"{path}: the geometry of a pair is gone or damaged; run the build again") from None
    return geometry if a == low else geometry.flipped()
