"""Pair geometry from a reconstruction, as the paper measures it: shared 3-D points instead of matched features.

Rolp is the share of the target's 3-D points that the reference shows too; Rs compares apparent sizes, which go with
focal length over depth. Where a point lands follows from the places of the shared points. Imports `colmap_model`, whose
images it reads, `features` (packed arrays), `geometry`, whose result type it fills, and `turning`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import cv2
import numpy as np
import numpy.typing as npt

from lmr_tools.colmap_model import Model, ModelImage
from lmr_tools.features import pack_arrays, unpack_arrays
from lmr_tools.geometry import PairGeometry, fit_homography
from lmr_tools.schema import ImageRow
from lmr_tools.turning import turned

SIZE_TOLERANCE = 0.01  # a photo may be a resized copy of the model's picture, not one of another shape
WORKING_SIDE = 800  # residuals of the plane are judged at this long side, as those of matched features are
POINT_BITS = 40  # ids of points of several models: the model's number stands above these bits


@dataclass(frozen=True, kw_only=True, eq=False)
class Observations:
    """The 3-D points that one photo sees. Pixels of the decoded photo; the centre of the top-left pixel is 0, 0."""

    ids: npt.NDArray[np.int64]  # n; ascending
    points: npt.NDArray[np.float32]  # n, 2
    size: npt.NDArray[np.float32]  # n; pixels that a unit of length covers at the point
    width: int
    height: int


def observations_to_bytes(value: Observations) -> bytes:
    """Compact, checked bytes."""
    numbers = {"width": value.width, "height": value.height}
    return pack_arrays("observations", numbers, {"ids": value.ids, "points": value.points, "size": value.size})


def observations_from_bytes(data: bytes) -> Observations:
    """What `observations_to_bytes` wrote; LmrError for damaged or foreign bytes."""
    return Observations(**unpack_arrays("observations", data))


def name_photos(models: Sequence[Model], paths: Mapping[str, str]) -> dict[str, tuple[int, ModelImage]]:
    """{image id: (model's number, its image)} for photos (image id -> path) that the models name without doubt.

    A name fits a path when one ends with all parts of the other. Names that fit several photos, and photos that fit
    several names, fit none.
    """
    by_file: dict[str, list[str]] = {}
    for image_id, path in paths.items():
        by_file.setdefault(PurePosixPath(path.split("::")[-1]).name, []).append(image_id)
    found: list[tuple[str, int, ModelImage]] = []
    for number, model in enumerate(models):
        for image in model.images:
            parts = PurePosixPath(image.name.replace("\\", "/")).parts
            fitting = [i for i in by_file.get(parts[-1], []) if _ends(parts, paths[i])] if parts else []
            if len(fitting) > 1:  # the folder of the model may say which: MegaDepth has one model a scene
                fitting = [i for i in fitting if set(PurePosixPath(paths[i]).parts[:-1]) & set(model.folder.parts)]
            if len(fitting) == 1:
                found.append((fitting[0], number, image))
    count = Counter(image_id for image_id, _, _ in found)
    return {image_id: (number, image) for image_id, number, image in found if count[image_id] == 1}


def _ends(parts: Sequence[str], path: str) -> bool:
    own = PurePosixPath(path.replace("::", "/")).parts
    length = min(len(own), len(parts))
    return tuple(own[-length:]) == tuple(parts[-length:])


def observe(number: int, image: ModelImage, row: ImageRow, orientation: int) -> Observations | None:
    """The image's points as `row` sees them; None when the photo is no resized copy of what the model was made of."""
    camera = image.camera
    stored = (row.height, row.width) if orientation >= 5 else (row.width, row.height)
    if not _same_shape(stored, (camera.width, camera.height)):
        # Some pipelines turn photos before they reconstruct.
        if orientation < 5 or not _same_shape((row.width, row.height), (camera.width, camera.height)):
            return None
        orientation, stored = 1, (row.width, row.height)
    scale_x, scale_y = stored[0] / camera.width, stored[1] / camera.height
    x, y = turned(image.points[:, 0] * scale_x, image.points[:, 1] * scale_y, 0, orientation, row.width, row.height)
    return Observations(
        ids=image.ids + (number << POINT_BITS),
        points=np.column_stack([x - 0.5, y - 0.5]).astype(np.float32),
        size=(camera.focal * np.sqrt(scale_x * scale_y) / image.depth).astype(np.float32),
        width=row.width,
        height=row.height,
    )


def _same_shape(a: tuple[int, int], b: tuple[int, int]) -> bool:
    return bool(abs(np.log(a[0] / a[1]) - np.log(b[0] / b[1])) <= SIZE_TOLERANCE)


def match_observed(a: Observations, b: Observations) -> PairGeometry:
    """Geometry of two photos of one reconstruction."""
    _, i, j = np.intersect1d(a.ids, b.ids, assume_unique=True, return_indices=True)
    points_a, points_b = a.points[i], b.points[j]
    shared = len(i)
    scale_log2 = float(np.median(np.log2(b.size[j] / a.size[i]))) if shared else 0.0
    working = [min(1.0, WORKING_SIDE / max(photo.width, photo.height)) for photo in (a, b)]
    homography = fit_homography(points_a, points_b, *working)
    if homography is None and shared >= 3:
        # Any sane start will do: landing bends it to the nearest shared points.
        fitted, _ = cv2.estimateAffinePartial2D(points_a, points_b, method=cv2.LMEDS)
        if fitted is not None and np.isfinite(fitted).all() and np.linalg.det(fitted[:, :2]) > 0:
            homography = np.vstack([fitted, [0.0, 0.0, 1.0]])
    share_a, share_b = shared / max(1, len(a.ids)), shared / max(1, len(b.ids))
    return PairGeometry(
        matches=shared,
        inliers=shared,
        consistent=shared,
        verified=shared > 0,
        share_a=share_a,
        share_b=share_b,
        covered_a=1.0,
        covered_b=1.0,
        overlap_a=share_a,
        overlap_b=share_b,
        scale_log2=scale_log2,
        scale_ratio=2 ** -abs(scale_log2),
        model="epipolar",
        homography=homography,
        points_a=points_a,
        points_b=points_b,
    )


def most_shared(photos: Sequence[Observations | None], k: int) -> npt.NDArray[np.int32]:
    """(N, k): for each photo the numbers of the photos that share most points with it, -1 where there are no more."""
    found = np.full((len(photos), k), -1, np.int32)
    seen = [(number, photo.ids) for number, photo in enumerate(photos) if photo is not None and len(photo.ids)]
    if not seen:
        return found
    ids = np.concatenate([own for _, own in seen])
    owner = np.concatenate([np.full(len(own), number) for number, own in seen])
    order = np.argsort(ids, kind="stable")
    ids, owner = ids[order], owner[order]
    for number, own in seen:
        start, end = np.searchsorted(ids, own, "left"), np.searchsorted(ids, own, "right")
        length = end - start
        places = np.repeat(start - (np.cumsum(length) - length), length) + np.arange(length.sum())
        # Only photos that share something are looked at: work must not grow with the square of the corpus.
        others, count = np.unique(owner[places], return_counts=True)
        best = np.argsort(-count, kind="stable")
        best = others[best[others[best] != number]][:k]
        found[number, : len(best)] = best
    return found
