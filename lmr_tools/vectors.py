"""Embeddings of a corpus: computed once per photo, kept in the work folder, held as one float16 array.

Imports `embed` and `sources`, whose functions it applies, and `dedup`'s rejects; photos already embedded by the same
model are not opened.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lmr_tools.dedup import reject
from lmr_tools.embed import Embedder, embed_photos, enough_pixels
from lmr_tools.schema import ImageRow, LmrError, RejectRow, embedding_schema
from lmr_tools.sources import Source, read_photo
from lmr_tools.tables import ROW_GROUP, next_piece, read_piece, write_table
from lmr_tools.workers import Mapper, Tracker

PIECE = 256
IN_MEMORY = 2**30  # bytes of vectors that are held in memory; more lie in a file


def embed_all(
    rows: Sequence[ImageRow],
    sources: Sequence[Source],
    embedder: Embedder,
    work: Path,
    *,
    mapper: Mapper,
    track: Tracker,
) -> tuple[npt.NDArray[np.float16], list[RejectRow]]:
    """Unit vectors (N, V, D) of all photos, and the rejects: photos that could not be read any more (their rows are 0).

    Pieces of 256 photos are written as they come; a killed run repeats at most those.
    """
    folder = work / f"embeddings-{embedder.key}"
    vectors = _zeros(work, (len(rows), embedder.views, embedder.dimension))
    known = _known(folder, {row.sha256: number for number, row in enumerate(rows)}, vectors)
    missing = [number for number in range(len(rows)) if not known[number]]
    rejects: list[RejectRow] = []
    piece: list[int] = []

    def keep() -> None:
        if piece:
            write_table(next_piece(folder), _table([rows[number].sha256 for number in piece], vectors[piece]))
            piece.clear()

    items = ((str(number), rows[number]) for number in missing)
    results = embed_photos(
        items, partial(_load, sources=tuple(sources), enough=enough_pixels(embedder)), embedder, mapper=mapper
    )
    try:
        for name, result in track(results, len(missing), "embed"):
            number = int(name)
            if isinstance(result, LmrError):
                rejects.append(reject(rows[number], "embed", "unreadable", str(result)))
                continue
            vectors[number] = result
            piece.append(number)
            if len(piece) == PIECE:
                keep()
    finally:
        keep()
    return vectors, rejects


def _known(folder: Path, place: dict[str, int], vectors: npt.NDArray[np.float16]) -> npt.NDArray[np.bool_]:
    known = np.zeros(len(vectors), bool)
    for path in sorted(folder.glob("*.parquet")):
        table = read_piece(path)
        numbers = np.array([place.get(sha256, -1) for sha256 in table["image_id"].to_pylist()])
        wanted = numbers >= 0
        vectors[numbers[wanted], table["view"].to_numpy()[wanted]] = _array(table, vectors.shape[2])[wanted]
        known[numbers[wanted]] = True
    return known


def _load(row: ImageRow, *, sources: tuple[Source, ...], enough: int) -> npt.NDArray[np.uint8]:
    return read_photo(sources, row, enough=enough)


def _array(table: pa.Table, dimension: int) -> npt.NDArray[np.float16]:
    column = table["vector"].combine_chunks()
    flat = column.chunk(0).flatten() if isinstance(column, pa.ChunkedArray) else column.flatten()
    return np.asarray(flat.to_numpy(zero_copy_only=False), np.float16).reshape(-1, dimension)


def _table(ids: Sequence[str], vectors: npt.NDArray[np.float16]) -> pa.Table:
    count, views, dimension = vectors.shape
    flat = pa.array(vectors.reshape(-1))
    return pa.table(
        {
            "image_id": pa.array([image_id for image_id in ids for _ in range(views)]),
            "view": pa.array(np.tile(np.arange(views, dtype=np.int8), count)),
            "vector": pa.FixedSizeListArray.from_arrays(flat, dimension),
        },
        schema=embedding_schema(dimension),
    )


def _zeros(work: Path, shape: tuple[int, int, int]) -> npt.NDArray[np.float16]:
    """Zeros in memory, or, from IN_MEMORY on, in a file of the work folder that goes with the last use of the array."""
    if math.prod(shape) * 2 < IN_MEMORY:
        return np.zeros(shape, np.float16)
    work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=work) as file:
        file.truncate(math.prod(shape) * 2)
        return np.memmap(file, np.float16, "r+", shape=shape)


def keep_rows(vectors: npt.NDArray[np.float16], rows: Sequence[int]) -> npt.NDArray[np.float16]:
    """The vectors of some rows (ascending), moved to the front in place: a second array may not fit anywhere."""
    for start in range(0, len(rows), PIECE):
        part = rows[start : start + PIECE]
        vectors[start : start + len(part)] = vectors[part]
    return vectors[: len(rows)]


def embedding_tables(rows: Sequence[ImageRow], vectors: npt.NDArray[np.float16]) -> Iterator[pa.Table]:
    """The `embeddings` table of a dataset in parts: one row per photo and view, in the order of the photos."""
    step = max(1, ROW_GROUP // max(vectors.shape[1], 1))
    for start in range(0, max(len(rows), 1), step):
        part = slice(start, start + step)
        yield _table([row.image_id for row in rows[part]], np.asarray(vectors[part]))
