"""Photos that are in a benchmark stay out of a training set: found by hash, embedding and geometry.

A corpus photo leaks when it repeats a benchmark picture (near-equal hash) or holds it, or a part of it, as a flat copy:
a homography carries most of the smaller picture's verified detail onto the other. Imports
`dedup`, `geometry`, `index` and `pairs`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lmr_tools.dedup import hash_distance, reject
from lmr_tools.geometry import match_pair
from lmr_tools.index import search_photos
from lmr_tools.pairs import PairStore, load_features
from lmr_tools.schema import ImageRow, RejectRow

NEAREST = 10  # corpus photos looked at per benchmark picture
COPIED = 0.4  # share of the smaller picture's keypoints, or of those it shows of a picture around it, that must agree
COPIED_POINTS = 50
INSIDE = 0.9  # share of a picture's keypoints that another one shows: it lies in it


def benchmark_photos(
    rows: Sequence[ImageRow],
    vectors: npt.NDArray[np.float16],
    benchmark: Sequence[ImageRow],
    benchmark_vectors: npt.NDArray[np.float16],
    store: PairStore,
    *,
    max_bits: int,
) -> list[RejectRow]:
    """The rejects among `rows`, as far as they are nearest; ask again without them until there is none.

    `vectors` are (N, V, D) unit vectors of corpus and benchmark; the features of both must be in `store`.
    """
    near, _ = search_photos(vectors, benchmark_vectors, min(NEAREST, len(rows)))
    dropped: dict[int, RejectRow] = {}
    for number, picture in enumerate(benchmark):
        for other in near[number]:
            if other < 0 or int(other) in dropped:
                continue
            row = rows[int(other)]
            bits = hash_distance(row, picture)
            why = f"{bits} of 256 bits differ" if bits <= max_bits else _copy(row, picture, store)
            if why:
                dropped[int(other)] = reject(row, "leakage", "in benchmark", f"{picture.path}: {why}")
    return [dropped[number] for number in sorted(dropped)]


def _copy(row: ImageRow, picture: ImageRow, store: PairStore) -> str:
    if row.sha256 == picture.sha256:
        return "equal bytes"
    geometry = match_pair(load_features(store, row.sha256), load_features(store, picture.sha256))
    share_a, share_b = geometry.share_a, geometry.share_b
    shares = [share_a, share_b]
    # Of a picture with much detail the strongest features are kept, which are others than those of a crop of it: what
    # tells a crop is the share of those that lie where it was cut.
    if geometry.covered_a >= INSIDE:
        shares.append(share_b / max(share_b, geometry.covered_b))
    if geometry.covered_b >= INSIDE:
        shares.append(share_a / max(share_a, geometry.covered_a))
    share = max(shares)
    if geometry.model == "homography" and geometry.consistent >= COPIED_POINTS and share >= COPIED:
        return f"a flat copy: {geometry.consistent} points, {share:.0%} of a picture's there, fit one homography"
    return ""
