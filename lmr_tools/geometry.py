"""Geometry of a photo pair from local features: how much they share, and at which size. Matches those of `features`.

Matches, a robust epipolar fit, and the dominant mode of keypoint rotation and size among its inliers decide whether
two photos show one place; `landing` then carries points across. Every constant was chosen on labelled and known pairs:
docs/geometry.md. MAGSAC++ is Barath et al., CVPR 2020.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt
from numba import njit

from lmr_tools.features import NORM, Features, pack_arrays, unpack_arrays

if TYPE_CHECKING:
    pass

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Index = npt.NDArray[np.intp]

RATIO = 0.85  # nearest over second-nearest descriptor distance
MIN_MATCHES = 8  # of one mode, for an epipolar fit
EPIPOLAR_PIXELS = 1.5  # MAGSAC threshold at the working scale
HOMOGRAPHY_PIXELS = 3.0  # likewise, and the residual up to which a homography explains a match
ITERATIONS = 2000
MODE_DEGREES = 30.0
MODE_LOG2 = 0.7
VERIFIED_COUNT = 10
VERIFIED_SHARE = 0.7  # consistent / inliers
HOMOGRAPHY_SHARE = 0.8  # explained / consistent, from which the scene counts as a plane or a pure rotation
OVERLAP_EXPONENT = 0.414
CONFIDENCE = 0.999
MIN_HOMOGRAPHY = 8
NEARBY = 6  # matches whose steps must agree, and by how much: share of the step, plus working pixels
STEP_SHARE = 0.5
STEP_PIXELS = 4.0
_ROWS = 512  # rows of the distance matrix held at once


@dataclass(frozen=True, kw_only=True, eq=False)
class PairGeometry:
    """What two photos a and b have in common. Pixels are those of the original photos.

    `overlap_a` is the Rolp of reference b for target a (paper, section 1), `overlap_b` that of reference a for target
    b. `homography` maps a to b and is a good map of the whole scene only where `model` is "homography"; otherwise it is
    the best plane, a start for `landing`. Unverified pairs carry numbers too, but they mean little.
    """

    matches: int
    inliers: int  # matches of one rotation and size that an epipolar fit explains
    consistent: int  # inliers whose neighbours move with them
    verified: bool
    share_a: float  # consistent / keypoints of a
    share_b: float
    covered_a: float  # share of a's keypoints that the homography puts inside b; 1 when the model is "epipolar"
    covered_b: float
    overlap_a: float
    overlap_b: float
    scale_log2: float  # log2(apparent size in b / in a)
    scale_ratio: float  # 2 ** -abs(scale_log2)
    model: str  # homography | epipolar
    homography: Float64 | None  # 3, 3
    points_a: Float32  # consistent, 2
    points_b: Float32

    def flipped(self) -> PairGeometry:
        """The same pair seen from b."""
        inverse = None if self.homography is None else _inverse(self.homography)
        return dataclasses.replace(
            self,
            share_a=self.share_b,
            share_b=self.share_a,
            covered_a=self.covered_b,
            covered_b=self.covered_a,
            overlap_a=self.overlap_b,
            overlap_b=self.overlap_a,
            scale_log2=-self.scale_log2,
            homography=inverse,
            points_a=self.points_b,
            points_b=self.points_a,
        )


def match_pair(a: Features, b: Features) -> PairGeometry:
    """Geometry of photos a and b. Deterministic: depends on the two feature sets alone, not on earlier calls.

    Call it once per unordered pair and use `flipped` for the other direction; the ratio test looks from a to b.
    """
    i, j = mutual_matches(a, b)
    matches = len(i)
    i, j, turn, growth = _dominant_mode(a, b, i, j)
    i, j = _epipolar_inliers(a, b, i, j)
    inliers = len(i)
    keep = with_neighbours(a.points[i] * a.working_scale, b.points[j] * b.working_scale, turn, growth)
    return _describe(a, b, i[keep], j[keep], matches=matches, inliers=inliers)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _scan(dots: Int32, first: int, row: Int32, column: Int32) -> None:  # pragma: no cover - compiled
    """Best, second best and place of the best along rows and columns of one block of products.

    `row` is (3, n), `column` (3, m). All products are >= 0, so the bits of their float32 order like integers do.
    """
    n, m = dots.shape
    for i in range(n):
        best = np.int32(-1)
        at_row = np.int32(first + i)
        for j in range(m):
            value = dots[i, j]
            best = value if value > best else best
            top = column[0, j]
            low = value if value < top else top
            column[1, j] = low if low > column[1, j] else column[1, j]
            column[2, j] = at_row if value > top else column[2, j]
            column[0, j] = value if value > top else top
        second = np.int32(-1)
        ties = np.int32(0)
        place = np.int32(m)
        for j in range(m):
            value = dots[i, j]
            other = np.int32(-1) if value == best else value
            second = other if other > second else second
            ties = np.int32(ties + (np.int32(1) if value == best else np.int32(0)))
            here = np.int32(j) if value == best else np.int32(m)
            place = here if here < place else place
        row[0, first + i] = best
        row[1, first + i] = best if ties > 1 else second
        row[2, first + i] = place


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _mode_centre(turn: Float32, growth: Float32) -> int:  # pragma: no cover - compiled
    """Index of the match that most others agree with in rotation (degrees) and size (log2); the first of equals."""
    best, centre = 0, -1
    for i in range(len(turn)):
        count = 0
        for j in range(len(turn)):
            apart = abs(turn[i] - turn[j])
            if min(apart, 360 - apart) <= MODE_DEGREES and abs(growth[i] - growth[j]) <= MODE_LOG2:
                count += 1
        if count > best:
            best, centre = count, i
    return centre


def _nearest(a: Float32, b: Float32) -> tuple[Int32, Int32]:
    """Best product, second best and its place: (3, n) for the rows of `a`, (3, m) for those of `b`."""
    row = np.full((3, len(a)), -1, np.int32)
    column = np.full((3, len(b)), -1, np.int32)
    block = np.empty((min(_ROWS, len(a)), len(b)), np.float32)
    for first in range(0, len(a), _ROWS):
        part = block[: min(_ROWS, len(a) - first)]
        np.dot(a[first : first + _ROWS], b.T, out=part)
        _scan(part.view(np.int32), first, row, column)
    return row, column


def mutual_matches(a: Features, b: Features) -> tuple[Index, Index]:
    """Indices of mutual nearest neighbours that pass the ratio test, at most one per place, best first."""
    rows, columns, squares = [], [], []
    for part_a, part_b in ((slice(0, a.bright), slice(0, b.bright)), (slice(a.bright, None), slice(b.bright, None))):
        one = a.descriptors[part_a].astype(np.float32)
        two = b.descriptors[part_b].astype(np.float32)
        if len(one) == 0 or len(two) == 0:
            continue
        row, column = _nearest(one, two)
        best = row[2]
        # Products of integers below 2^24 are exact in float32: the same on every machine and BLAS.
        dots = row[:2].view(np.float32).astype(np.float64)
        squared = np.einsum("nd,nd->n", one, one) + np.einsum("nd,nd->n", two, two)[best] - 2 * dots[0]
        runner_up = 2.0 * NORM**2 - 2 * dots[1]
        index = np.arange(len(one))
        keep = (column[2][best] == index) & (squared < RATIO**2 * runner_up) & (row[1] >= 0)
        rows.append(index[keep] + (part_a.start or 0))
        columns.append(best[keep].astype(np.intp) + (part_b.start or 0))
        squares.append(squared[keep])
    if not rows:
        return np.zeros(0, np.intp), np.zeros(0, np.intp)
    i, j = np.concatenate(rows), np.concatenate(columns)
    order = np.lexsort((i, np.concatenate(squares)))
    i, j = i[order], j[order]
    # SIFT gives one place several orientations; counted twice they would look like independent evidence.
    keep = _first_per_place(a.points[i])
    i, j = i[keep], j[keep]
    keep = _first_per_place(b.points[j])
    return i[keep], j[keep]


def _first_per_place(points: Float32) -> Index:
    """Sorted indices of the first point at each place, places told apart to 1/8 pixel."""
    cell = np.rint(points * 8).astype(np.int64)
    _, first = np.unique(cell[:, 0] << 32 | (cell[:, 1] & 0xFFFFFFFF), return_index=True)
    return np.sort(first)


def _dominant_mode(a: Features, b: Features, i: Index, j: Index) -> tuple[Index, Index, float, float]:
    """The matches that turn and grow alike, with their median turn in degrees and growth in log2.

    Asked before the epipolar fit: chance matches turn and grow at random, so most of them never reach it.
    """
    if len(i) == 0:
        return i, j, 0.0, 0.0
    turn = (b.angle[j] - a.angle[i]) % np.float32(360)
    growth = np.log2(b.size[j] / a.size[i])
    centre = _mode_centre(turn, growth)
    apart = (turn - turn[centre] + 180) % 360 - 180
    keep = (np.abs(apart) <= MODE_DEGREES) & (np.abs(growth - growth[centre]) <= MODE_LOG2)
    return i[keep], j[keep], float(turn[centre] + np.median(apart[keep])), float(np.median(growth[keep]))


def _epipolar_inliers(a: Features, b: Features, i: Index, j: Index) -> tuple[Index, Index]:
    """The matches that a fundamental matrix explains."""
    none = np.zeros(0, np.intp)
    if len(i) < MIN_MATCHES:
        return none, none
    points_a, points_b = a.points[i] * a.working_scale, b.points[j] * b.working_scale
    try:
        _, mask = cv2.findFundamentalMat(points_a, points_b, cv2.USAC_MAGSAC, EPIPOLAR_PIXELS, CONFIDENCE, ITERATIONS)
    except cv2.error:
        # OpenCV stops on matches of one exact plane, which no fundamental matrix fits uniquely. The plane itself then
        # is the evidence, and a stronger one.
        try:
            _, mask = cv2.findHomography(
                points_a, points_b, cv2.USAC_MAGSAC, EPIPOLAR_PIXELS, None, ITERATIONS, CONFIDENCE
            )
        except cv2.error:  # degenerate matches, all on one line for example
            return none, none
    if mask is None:
        return none, none
    keep = mask.ravel() > 0
    return i[keep], j[keep]


def with_neighbours(points_a: Float32, points_b: Float32, turn: float, growth: float) -> npt.NDArray[np.bool_]:
    """Which matches keep their neighbours: for at least half of the nearest ones, the step from match to neighbour in
    a, turned and grown, is the step in b. Chance inliers of an epipolar fit, and windows of one facade mistaken for
    each other, fail this."""
    across = 2**growth * math.cos(math.radians(turn))
    along = 2**growth * math.sin(math.radians(turn))
    return np.asarray(_count_neighbours(points_a, points_b, across, along) > 0)


@njit(nogil=True, cache=True)  # type: ignore[untyped-decorator]
def _count_neighbours(
    points_a: Float32, points_b: Float32, across: float, along: float
) -> Int32:  # pragma: no cover - compiled
    """Per match, how many of its nearest matches moved with it; 0 when they are fewer than half."""
    n = len(points_a)
    count = min(NEARBY, n - 1)
    supported = np.zeros(n, np.int32)
    place = np.empty(NEARBY, np.int64)
    distance = np.empty(NEARBY, np.float64)
    for i in range(n):
        held = 0
        for k in range(n):
            if k == i:
                continue
            x, y = points_a[k, 0] - points_a[i, 0], points_a[k, 1] - points_a[i, 1]
            apart = float(x * x + y * y)
            if held == count and apart >= distance[held - 1]:
                continue
            slot = min(held, count - 1)
            while slot > 0 and distance[slot - 1] > apart:
                distance[slot], place[slot] = distance[slot - 1], place[slot - 1]
                slot -= 1
            distance[slot], place[slot] = apart, k
            held = min(held + 1, count)
        good = 0
        for slot in range(held):
            k = place[slot]
            x, y = points_a[k, 0] - points_a[i, 0], points_a[k, 1] - points_a[i, 1]
            step_x, step_y = across * x - along * y, along * x + across * y
            miss_x = points_b[k, 0] - points_b[i, 0] - step_x
            miss_y = points_b[k, 1] - points_b[i, 1] - step_y
            allowed = STEP_SHARE * math.sqrt(step_x * step_x + step_y * step_y) + STEP_PIXELS
            if miss_x * miss_x + miss_y * miss_y <= allowed * allowed:
                good += 1
        if 2 * good >= held and held > 0:
            supported[i] = good
    return supported


def _describe(a: Features, b: Features, i: Index, j: Index, *, matches: int, inliers: int) -> PairGeometry:
    points_a, points_b = a.points[i], b.points[j]
    consistent = len(i)
    scale_log2 = float(np.median(np.log2(b.size[j] / a.size[i]))) if consistent else 0.0
    homography = fit_homography(points_a, points_b, a.working_scale, b.working_scale)
    model, covered_a, covered_b = "epipolar", 1.0, 1.0
    if homography is not None:
        residual = np.linalg.norm(map_points(homography, points_a) - points_b, axis=1) * b.working_scale
        if np.count_nonzero(residual <= HOMOGRAPHY_PIXELS) >= HOMOGRAPHY_SHARE * consistent:
            model = "homography"
            covered_a = _share_inside(homography, a.points, b.width, b.height)
            covered_b = _share_inside(_inverse(homography), b.points, a.width, a.height)
            scale_log2 = float(np.median(_log2_scale(homography, points_a)))
    share_a, share_b = consistent / max(1, len(a)), consistent / max(1, len(b))
    return PairGeometry(
        matches=matches,
        inliers=inliers,
        consistent=consistent,
        verified=consistent >= VERIFIED_COUNT and consistent >= VERIFIED_SHARE * inliers,
        share_a=share_a,
        share_b=share_b,
        covered_a=covered_a,
        covered_b=covered_b,
        overlap_a=min(share_a**OVERLAP_EXPONENT, covered_a),
        overlap_b=min(share_b**OVERLAP_EXPONENT, covered_b),
        scale_log2=scale_log2,
        scale_ratio=2 ** -abs(scale_log2),
        model=model,
        homography=homography,
        points_a=points_a,
        points_b=points_b,
    )


def fit_homography(points_a: Float32, points_b: Float32, scale_a: float, scale_b: float) -> Float64 | None:
    """The plane or rotation that explains most matches, in original pixels; None when there is no sane one."""
    if len(points_a) < MIN_HOMOGRAPHY:
        return None
    try:
        found, _ = cv2.findHomography(
            points_a * scale_a, points_b * scale_b, cv2.USAC_MAGSAC, HOMOGRAPHY_PIXELS, None, ITERATIONS, CONFIDENCE
        )
    except cv2.error:  # degenerate matches, on one line for example: OpenCV stops instead of finding nothing
        return None
    if found is None:
        return None
    homography = np.diag([1 / scale_b, 1 / scale_b, 1.0]) @ found @ np.diag([scale_a, scale_a, 1.0])
    depth = points_a @ homography[2, :2] + homography[2, 2]
    # A mirror image, or points that pass through the horizon, are no view of one scene.
    if not np.isfinite(homography).all() or np.linalg.det(homography) * np.sign(depth[0]) <= 0:
        return None
    if (depth * depth[0] <= 0).any():
        return None
    return np.asarray(homography / np.median(depth))


def _inverse(homography: Float64) -> Float64:
    return np.asarray(np.linalg.inv(homography))


def map_points(homography: Float64, points: npt.NDArray[Any]) -> Float64:
    """Points (n, 2) through a homography; nan where they lie behind its horizon."""
    mapped = np.column_stack([points, np.ones(len(points))]) @ homography.T
    depth = np.where(mapped[:, 2:] > 0, mapped[:, 2:], np.nan)
    return np.asarray(mapped[:, :2] / depth)


def _log2_scale(homography: Float64, points: npt.NDArray[Any]) -> Float64:
    """log2 of the local magnification of a homography: half the log of its Jacobian's determinant."""
    depth = points @ homography[2, :2] + homography[2, 2]
    return np.asarray(0.5 * np.log2(np.linalg.det(homography) / depth**3))


def _share_inside(homography: Float64, points: Float32, width: int, height: int) -> float:
    """Share of the points that a homography puts inside a photo."""
    x, y = map_points(homography, points).T
    inside = (x >= -0.5) & (y >= -0.5) & (x <= width - 0.5) & (y <= height - 0.5)
    return float(inside.mean())


def geometry_to_bytes(geometry: PairGeometry) -> bytes:
    """Compact, versioned bytes of a geometry; equal geometries give equal bytes."""
    numbers = {
        field.name: getattr(geometry, field.name)
        for field in dataclasses.fields(geometry)
        if field.name not in {"homography", "points_a", "points_b"}
    }
    arrays: dict[str, npt.NDArray[Any]] = {"points_a": geometry.points_a, "points_b": geometry.points_b}
    if geometry.homography is not None:
        arrays["homography"] = geometry.homography
    return pack_arrays("geometry", numbers, arrays)


def geometry_from_bytes(data: bytes) -> PairGeometry:
    """The geometry written by `geometry_to_bytes`; LmrError for damaged or foreign bytes."""
    return PairGeometry(**{"homography": None, **unpack_arrays("geometry", data)})
