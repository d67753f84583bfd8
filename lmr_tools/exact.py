"""Exact nearest photos: scores that are the same bits on every machine, and the brute force that recall is judged by.

A product of two float16 numbers and a sum of such products up to 1 are exact in float64, in whatever order they are
added: scores computed that way, and the order they give (ties: lower index), are the same bits for any number of
threads, any block size and any BLAS. float32 products only sort out what can not be in the answer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    Float16s = npt.NDArray[np.float16]
    Float32s = npt.NDArray[np.float32]
    Float64s = npt.NDArray[np.float64]
    Ints = npt.NDArray[np.int64]

PAIRS = 1 << 12  # pairs scored at a time
VECTORS = 1 << 13  # corpus vectors compared at a time
ROWS = 1 << 11  # query vectors compared at a time
SLACK = 1e-5  # more than float32 scores of unit vectors can be wrong by


def pair_scores(a_MD: Float16s, left: Ints, b_ND: Float16s, right: Ints) -> Float64s:
    """Inner products of the vectors of `a` at `left` with those of `b` at `right`, exact in float64."""
    scores = np.empty(len(left))
    for start in range(0, len(left), PAIRS):
        part = slice(start, start + PAIRS)
        scores[part] = np.einsum("pd,pd->p", a_MD[left[part]].astype(np.float64), b_ND[right[part]].astype(np.float64))
    return scores


def photo_scores(a_MVD: Float16s, left: Ints, b_NVD: Float16s, right: Ints) -> Float64s:
    """Score of the photos of `a` at `left` with those of `b` at `right`: the largest product over all views, exact.

    With several views float32 products choose the few pairs of views that can be the largest.
    """
    views, dimension = a_MVD.shape[1:]
    if views == 1:
        return pair_scores(a_MVD[:, 0], left, b_NVD[:, 0], right)
    scores = np.empty(len(left))
    a_flat, b_flat = a_MVD.reshape(-1, dimension), b_NVD.reshape(-1, dimension)
    step = max(1, PAIRS // views)
    for start in range(0, len(left), step):
        one, other = left[start : start + step], right[start : start + step]
        rough = a_MVD[one].astype(np.float32) @ b_NVD[other].astype(np.float32).transpose(0, 2, 1)
        pair, x, y = np.nonzero(rough >= rough.max((1, 2), keepdims=True) - 2 * SLACK)
        fine = np.full(len(one), -np.inf)
        np.maximum.at(fine, pair, pair_scores(a_flat, one[pair] * views + x, b_flat, other[pair] * views + y))
        scores[start : start + step] = fine
    return scores


def best_photos(row: Ints, photo: Ints, score: Float64s, rows: int, k: int) -> tuple[Ints, Float32s]:
    """Per row the k photos of the highest score, each once; ties by lower index. Ids (rows, k) and scores (rows, k)."""
    order = np.lexsort((-score, photo, row))
    row, photo, score = row[order], photo[order], score[order]
    first = np.r_[True, (row[1:] != row[:-1]) | (photo[1:] != photo[:-1])][: len(row)]
    row, photo, score = row[first], photo[first], score[first]
    order = np.lexsort((photo, -score, row))
    row, photo, score = row[order], photo[order], score[order]
    place = np.arange(len(row)) - np.searchsorted(row, row)
    ids, scores = np.full((rows, k), -1, np.int64), np.full((rows, k), -np.inf, np.float32)
    inside = place < k
    ids[row[inside], place[inside]] = photo[inside]
    scores[row[inside], place[inside]] = score[inside]
    return ids, scores


def exact_photos(
    vectors_NVD: Float16s, queries_QVD: Float16s, k: int, *, own: Ints, among: Ints | None = None
) -> tuple[Ints, Float32s]:
    """The k photos of the corpus most similar to each query photo, by brute force: ids (Q, k) and scores (Q, k).

    Photo `own[q]` (-1: none) is left out of the answer to query q; `among` limits the answer to some photos. The corpus
    is read block by block, once per 2,048 query vectors, so it may be a memory-mapped file.
    """
    views = vectors_NVD.shape[1]
    among = np.arange(len(vectors_NVD)) if among is None else np.sort(among)
    ids, scores = np.full((len(queries_QVD), k), -1, np.int64), np.full((len(queries_QVD), k), -np.inf, np.float32)
    step = max(1, ROWS // views)
    for start in range(0, len(queries_QVD), step):
        part = slice(start, start + step)
        queries = queries_QVD[part]
        row, photo = _possible(vectors_NVD, queries, k, own[part], among)
        ids[part], scores[part] = best_photos(
            row, photo, photo_scores(queries, row, vectors_NVD, photo), len(queries), k
        )
    return ids, scores


def _possible(vectors_NVD: Float16s, queries_QVD: Float16s, k: int, own: Ints, among: Ints) -> tuple[Ints, Ints]:
    """(query, photo) of every photo that float32 products do not rule out of the k best, in one pass over `among`."""
    _, views, dimension = vectors_NVD.shape
    count = len(queries_QVD)
    queries = queries_QVD.reshape(-1, dimension).astype(np.float32)
    best = np.full((count, k), -np.inf, np.float32)  # the k largest float32 scores so far, in no order
    row, photo, score = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    step = max(1, VECTORS // views)
    for begin in range(0, len(among), step):
        others = among[begin : begin + step]
        # A run of row numbers is a view of the file, not a gathered copy.
        run = slice(others[0], others[-1] + 1) if others[-1] - others[0] == len(others) - 1 else others
        products = queries @ vectors_NVD[run].reshape(-1, dimension).astype(np.float32).T
        if views > 1:
            products = products.reshape(count, views, len(others), views).max((1, 3))
        products[own[:, None] == others] = -np.inf
        top = np.concatenate([best, products if products.shape[1] <= k else -np.partition(-products, k - 1)[:, :k]], 1)
        best = -np.partition(-top, k - 1)[:, :k]
        least = best.min(1) - 2 * SLACK
        x, y = np.nonzero((products >= least[:, None]) & (products > -np.inf))
        row, photo, score = np.r_[row, x], np.r_[photo, others[y]], np.r_[score, products[x, y]]
        kept = score >= least[row]
        row, photo, score = row[kept], photo[kept], score[kept]
    return row, photo
