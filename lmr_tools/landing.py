"""Where points of one photo land in the other, and how alike two photos are once laid over each other.

Carries out what `geometry` measured.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from lmr_tools.geometry import PairGeometry, map_points

if TYPE_CHECKING:
    from lmr_tools.schema import Image

Float64 = npt.NDArray[np.float64]

NEIGHBOURS = 8  # nearest matches that bend the homography towards themselves
FALLOFF = 0.1  # a match this close, in units of the median distance of the eight, weighs an eighth of one on the spot
STIFFNESS = 0.03  # resistance of the local affine map to slopes that few matches ask for
DRIFT = 0.05  # error that grows with the distance to the nearest match, in pixels per pixel


def landing(geometry: PairGeometry, points: npt.NDArray[Any]) -> tuple[Float64, npt.NDArray[np.int64], Float64]:
    """Where points (m, 2) of photo a land in photo b: (places (m, 2), support (m,), spread (m,)), in original pixels.

    The homography fits one plane of the scene at best, so an affine map of the residuals of the 8 nearest matches, the
    closer the heavier, is added to it. Support counts the matches used. Spread is the error to expect, in pixels of b:
    half of the landings miss by less than about .7 of it, nine in ten by less than about twice it (docs/geometry.md).
    A pair without a homography gives nan and no support.
    """
    points = np.atleast_2d(np.asarray(points, np.float64))
    if geometry.homography is None:
        return np.full(points.shape, np.nan), np.zeros(len(points), np.int64), np.full(len(points), np.nan)
    places = map_points(geometry.homography, points)
    residual = geometry.points_b - map_points(geometry.homography, geometry.points_a)
    count = min(NEIGHBOURS, len(residual))
    distance = np.linalg.norm(points[:, None] - geometry.points_a[None], axis=2)
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :count]
    distance = np.take_along_axis(distance, nearest, axis=1)
    unit = np.median(distance, axis=1, keepdims=True) + 1e-6
    weight = (distance / unit + FALLOFF) ** -3
    weight /= weight.sum(axis=1, keepdims=True)
    # Weighted ridge regression of the residuals on the offsets from the point: its constant is the correction there.
    offset = (geometry.points_a[nearest] - points[:, None]) / unit[..., None]
    terms = np.concatenate([offset, np.ones((*nearest.shape, 1))], axis=2)
    normal = np.einsum("mk,mki,mkj->mij", weight, terms, terms) + np.diag([STIFFNESS, STIFFNESS, 0.0])
    fit = np.linalg.solve(normal, np.einsum("mk,mki,mkj->mij", weight, terms, residual[nearest]))
    misfit = np.linalg.norm(np.einsum("mki,mij->mkj", terms, fit) - residual[nearest], axis=2)
    spread = np.einsum("mk,mk->m", weight, misfit) + DRIFT * distance[:, 0] * 2**geometry.scale_log2
    return places + fit[:, 2], np.full(len(points), count, np.int64), spread


def psnr_warped(crop_HWC: Image, photo_b: Image, geometry: PairGeometry, corner: tuple[int, int]) -> float:
    """PSNR in dB between a crop of photo a, cut at `corner` (x, y), and photo b warped onto it by the homography.

    Only the pixels that photo b covers count; nan when it covers less than half of the crop or there is no homography.
    """
    if geometry.homography is None:
        return math.nan
    height, width = crop_HWC.shape[:2]
    x, y = corner
    to_b = geometry.homography @ np.array([[1.0, 0.0, x], [0.0, 1.0, y], [0.0, 0.0, 1.0]])
    # Cubic: linear costs a resized duplicate up to 1 dB.
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    warped = cv2.warpPerspective(photo_b, to_b, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE)
    inside = np.full(photo_b.shape[:2], 255, np.uint8)
    covered = cv2.warpPerspective(inside, to_b, (width, height), flags=cv2.WARP_INVERSE_MAP) == 255
    if covered.mean() < 0.5:
        return math.nan
    error = float(np.mean((crop_HWC[covered].astype(np.float64) - warped[covered]) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)
