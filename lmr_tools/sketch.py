"""Small copies of vectors, and how lists of neighbours get better by asking the neighbours.

A sketch holds the 128 strongest directions of a vector in one byte each; sums of products of bytes are exact, so what
comes out depends on no thread. Lists of near neighbours are improved round by round: who is near my neighbour may be
near me (the idea of NN-descent; Dong, Charikar, Li: Efficient k-nearest neighbor graph construction, WWW 2011). Every
round reads the lists of the round before, so the order in which photos are taken decides nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numba
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

SKETCH = 128  # directions kept
SAMPLE = 1 << 16  # vectors that the directions are learnt from
BLOCK = 1 << 14  # vectors taken at a time


def learn_directions(sample_MD: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(D, P) orthogonal directions that keep most of the inner products of the sample, strongest first, P <= 128.

    The mean is not taken off: inner products of what is left would be other ones.
    """
    _, directions = np.linalg.eigh(sample_MD.T.astype(np.float64) @ sample_MD.astype(np.float64))
    return np.ascontiguousarray(directions[:, ::-1][:, :SKETCH], np.float32)


def sketch_of(vectors_ND: npt.NDArray[np.float16], directions_DP: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
    """(N, P) bytes: coordinates along the directions, 1.0 being 127; read block by block."""
    out = np.empty((len(vectors_ND), directions_DP.shape[1]), np.int8)
    for start in range(0, len(vectors_ND), BLOCK):
        part = vectors_ND[start : start + BLOCK].astype(np.float32) @ directions_DP
        out[start : start + BLOCK] = np.clip(np.rint(part * 127), -127, 127)
    return out


@numba.njit(cache=True, inline="always")  # type: ignore[untyped-decorator]
def _product(sketch_NVP, a, b):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    views, places = sketch_NVP.shape[1], sketch_NVP.shape[2]
    best = np.int32(-(1 << 30))
    for v in range(views):
        for w in range(views):
            total = np.int32(0)
            for p in range(places):
                total += np.int32(sketch_NVP[a, v, p]) * np.int32(sketch_NVP[b, w, p])
            if total > best:
                best = total
    return best


@numba.njit(parallel=True, cache=True)  # type: ignore[untyped-decorator]
def _round(sketch_NVP, lists_NW, keep, fan, first, parts):  # type: ignore[no-untyped-def]  # pragma: no cover - compiled
    rows, width = lists_NW.shape
    photos = len(sketch_NVP)
    out = np.full((rows, keep), -1, np.int32)
    for part in numba.prange(parts):
        seen = np.full(photos, -1, np.int32)
        ids, scores = np.empty(keep, np.int32), np.empty(keep, np.int32)
        for row in range(rows * part // parts, rows * (part + 1) // parts):
            photo = first + row
            seen[photo] = photo
            held = 0
            # Step 0 takes the photo's own list, step s the list of its s-th neighbour.
            for step in range(fan + 1):
                owner = row if step == 0 else lists_NW[row, step - 1]
                if owner < 0:
                    continue
                for place in range(width if step == 0 else fan):
                    other = lists_NW[owner, place]
                    if other < 0 or seen[other] == photo:
                        continue
                    seen[other] = photo
                    score = _product(sketch_NVP, photo, other)
                    if held == keep and (score < scores[-1] or (score == scores[-1] and other > ids[-1])):
                        continue
                    at = held if held < keep else keep - 1
                    held = min(held + 1, keep)
                    while at > 0 and (scores[at - 1] < score or (scores[at - 1] == score and ids[at - 1] > other)):
                        scores[at], ids[at] = scores[at - 1], ids[at - 1]
                        at -= 1
                    scores[at], ids[at] = score, other
            out[row, :held] = ids[:held]
    return out


def ask_neighbours(
    sketch_NVP: npt.NDArray[np.int8], lists_NW: npt.NDArray[np.int32], *, keep: int, fan: int, first: int = 0
) -> npt.NDArray[np.int32]:
    """The `keep` best of each photo's list (N, W) and of the first `fan` of its first `fan` neighbours' lists.

    (N, keep), best first. Lists hold photo numbers, -1 for none; two photos are as near as their nearest views. With
    `fan` 0 the lists may be those of the photos from number `first` on only.
    """
    if not len(lists_NW):
        return np.empty((0, keep), np.int32)
    fan = min(fan, lists_NW.shape[1])
    better: npt.NDArray[np.int32] = _round(sketch_NVP, lists_NW, keep, fan, first, 4 * numba.get_num_threads())
    return better
