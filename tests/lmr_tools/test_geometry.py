"""Geometry of pairs whose homography is known: shares, sizes and landing points against the truth."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from lmr_tools.features import Features, extract_features, features_from_bytes, features_to_bytes
from lmr_tools.geometry import (
    RATIO,
    VERIFIED_COUNT,
    VERIFIED_SHARE,
    PairGeometry,
    geometry_from_bytes,
    geometry_to_bytes,
    map_points,
    match_pair,
    mutual_matches,
    with_neighbours,
)
from lmr_tools.images import decode
from lmr_tools.landing import landing, psnr_warped
from lmr_tools.schema import LmrError
from lmr_tools.tiers import TierRule, grade, is_verified
from tests.pipelines.small_build import place

WIDTH, HEIGHT = 480, 360


def camera(zoom: float, turn: float, shift: tuple[float, float]) -> np.ndarray:
    """3x3 map from the place to a photo of it: zoomed, turned (degrees), looking `shift` pixels beside the middle."""
    turn = np.deg2rad(turn)
    rotation = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    middle = np.array([450.0, 350.0]) + shift
    offset = np.array([WIDTH / 2, HEIGHT / 2]) - rotation @ middle
    return np.vstack([np.column_stack([rotation, offset]), [0, 0, 1]])


def shoot(picture: np.ndarray, to_photo: np.ndarray, gain: float = 1.0) -> np.ndarray:
    photo = cv2.warpPerspective(picture, to_photo, (WIDTH, HEIGHT), flags=cv2.INTER_LINEAR)
    return np.clip(photo * gain, 0, 255).astype(np.uint8)


def moved(points: np.ndarray, homography: np.ndarray) -> np.ndarray:
    return cv2.perspectiveTransform(points[None].astype(np.float64), homography)[0]


CAMERAS = [(1.0, 5, (40, 10), 0.9), (1.4, -15, (-30, 20), 1.1), (0.75, 20, (20, -30), 1.0)]


@pytest.mark.parametrize(("zoom", "turn", "shift", "gain"), CAMERAS)
def test_size_overlap_and_landing_agree_with_the_truth(
    zoom: float, turn: float, shift: tuple[float, float], gain: float
) -> None:
    picture = place(3)
    first, second = camera(1.0, 0, (0, 0)), camera(zoom, turn, shift)
    a, b = extract_features(shoot(picture, first)), extract_features(shoot(picture, second, gain))
    geometry = match_pair(a, b)
    truth = second @ np.linalg.inv(first)
    assert is_verified(geometry.consistent, geometry.inliers, TierRule())
    assert geometry.model == "homography"
    assert geometry.scale_log2 == pytest.approx(np.log2(zoom), abs=0.03)
    assert geometry.scale_ratio == pytest.approx(2 ** -abs(geometry.scale_log2))
    spots = np.array([[240.0, 180.0], [200.0, 150.0], [280.0, 210.0]])
    places, support, spread = landing(geometry, spots)
    assert np.linalg.norm(places - moved(spots, truth), axis=1).max() < 1.0
    assert (support > 0).all() and (spread < 2).all()


def test_the_flipped_pair_leads_back() -> None:
    picture = place(4)
    a = extract_features(shoot(picture, camera(1.0, 0, (0, 0))))
    b = extract_features(shoot(picture, camera(1.3, 10, (20, 0))))
    geometry = match_pair(a, b)
    back = geometry.flipped()
    assert back.flipped().scale_log2 == geometry.scale_log2 == -back.scale_log2
    assert (back.overlap_a, back.share_a) == (geometry.overlap_b, geometry.share_b)
    spot = np.array([[230.0, 170.0]])
    there, _, _ = landing(geometry, spot)
    home, _, _ = landing(back, there)
    assert np.linalg.norm(home - spot) < 1.0


def test_other_places_and_empty_photos_are_no_pair() -> None:
    a = extract_features(shoot(place(5), camera(1.0, 0, (0, 0))))
    b = extract_features(shoot(place(6), camera(1.0, 0, (0, 0))))
    flat = extract_features(np.full((HEIGHT, WIDTH, 3), 90, np.uint8))
    assert len(flat) == 0
    for other in (b, flat):
        geometry = match_pair(a, other)
        assert (
            grade(geometry.overlap_a, geometry.scale_ratio, geometry.consistent, geometry.inliers, None, TierRule())[0]
            is None
        )


def test_a_duplicate_shows_in_the_warped_psnr_and_another_view_does_not() -> None:
    photo = shoot(place(7), camera(1.0, 0, (0, 0)))
    shifted = np.roll(photo, (6, 9), axis=(0, 1))
    other = shoot(place(7), camera(1.0, 0, (0, 0)), gain=0.8)
    a = extract_features(photo)
    crop = photo[120:220, 180:280]
    same, exposed = (match_pair(a, extract_features(p)) for p in (shifted, other))
    assert psnr_warped(crop, shifted, same, (180, 120)) > 35
    assert psnr_warped(crop, other, exposed, (180, 120)) < 30


def test_results_do_not_depend_on_order_or_process(tmp_path: Path) -> None:
    picture = place(8)
    blobs = []
    for number, (zoom, turn, shift, gain) in enumerate(CAMERAS):
        features = extract_features(shoot(picture, camera(zoom, turn, shift), gain))
        (tmp_path / f"{number}").write_bytes(features_to_bytes(features))
        blobs.append(features_to_bytes(features))
    kept = [features_from_bytes(blob) for blob in blobs]
    first = geometry_to_bytes(match_pair(kept[0], kept[1]))
    match_pair(kept[1], kept[2])
    assert geometry_to_bytes(match_pair(kept[0], kept[1])) == first
    code = (
        "import sys, pathlib; from lmr_tools.features import features_from_bytes as f;"
        "from lmr_tools.geometry import *; a, b = (f(pathlib.Path(p).read_bytes()) for p in sys.argv[1:]);"
        "sys.stdout.buffer.write(geometry_to_bytes(match_pair(a, b)))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "0"), str(tmp_path / "1")]
    assert subprocess.run(command, capture_output=True, check=True).stdout == first


def test_bytes_come_back_and_damage_is_told() -> None:
    features = extract_features(shoot(place(9), camera(1.0, 0, (0, 0))), max_features=100)
    blob = features_to_bytes(features)
    again = features_from_bytes(blob)
    assert np.array_equal(again.points, features.points)
    assert np.array_equal(again.descriptors, features.descriptors)
    geometry = match_pair(features, features)
    assert np.array_equal(geometry_from_bytes(geometry_to_bytes(geometry)).points_b, geometry.points_b)
    for damaged in (b"", blob[:-1], blob[:40] + b"\x00" + blob[41:], geometry_to_bytes(geometry)):
        with pytest.raises(LmrError):
            features_from_bytes(damaged)


def test_degenerate_matches_do_not_stop_a_build() -> None:
    """Identical photos: every match lies on one exact plane, which no fundamental matrix fits uniquely."""
    features = extract_features(shoot(place(2), camera(1.0, 0, (0, 0))))
    geometry = match_pair(features, features)
    assert geometry.scale_ratio == pytest.approx(1.0, abs=1e-3)
    assert geometry.consistent > 100


def test_cufed5_references_come_in_their_published_order(shared: Path) -> None:
    photos = [decode((shared / f"data/cufed/CUFED5/001_{n}.png").read_bytes()) for n in range(6)]
    target, *references = [extract_features(photo) for photo in photos]
    pairs = [match_pair(target, reference) for reference in references]
    similarity = [pair.overlap_a * pair.scale_ratio for pair in pairs]
    assert similarity == sorted(similarity, reverse=True)
    tiers = [grade(p.overlap_a, p.scale_ratio, p.consistent, p.inliers, None, TierRule())[0] for p in pairs]
    assert "".join(tiers) == "HHMML"


def test_sizes_agree_with_a_real_homography_set(shared: Path) -> None:
    folder = shared / "data/homography/hpatches_v_dogman"
    first = decode((folder / "1.png").read_bytes())
    a = extract_features(first)
    checked = 0
    for number in range(2, 7):
        truth = np.loadtxt(folder / f"H_1_{number}")
        b = extract_features(decode((folder / f"{number}.png").read_bytes()))
        geometry = match_pair(a, b)
        if not is_verified(geometry.consistent, geometry.inliers, TierRule()):
            continue
        checked += 1
        errors = np.linalg.norm(moved(geometry.points_a, truth) - geometry.points_b, axis=1)
        assert np.median(errors) < 3
    assert checked >= 4


def test_keypoints_of_a_photo_turned_by_half_lie_where_they_did() -> None:
    """Unbiased to a few hundredths of a pixel: OpenCV's own keypoints miss by half a pixel here."""
    photo = shoot(place(1), camera(1.0, 0, (0, 0)))
    upright, turned = extract_features(photo), extract_features(np.ascontiguousarray(photo[::-1, ::-1]))
    back = np.array([WIDTH - 1, HEIGHT - 1]) - turned.points
    apart = upright.points[:, None] - back[None]
    nearest = np.abs(apart).sum(axis=2).argmin(axis=1)
    miss = apart[np.arange(len(nearest)), nearest]
    assert np.abs(np.median(miss, axis=0)).max() < 0.05
    assert np.median(np.linalg.norm(miss, axis=1)) < 0.1


def test_a_large_photo_gives_places_in_its_own_pixels() -> None:
    photo = shoot(place(1), camera(1.0, 0, (0, 0)))
    large = cv2.resize(photo, None, fx=2, fy=2, interpolation=cv2.INTER_CUBIC)
    a, b = extract_features(photo), extract_features(large, max_side=WIDTH)
    geometry = match_pair(a, b)
    assert (b.working_scale, b.width) == (0.5, 2 * WIDTH)
    assert geometry.scale_log2 == pytest.approx(1.0, abs=0.02)
    centres = 2 * (geometry.points_a + 0.5) - 0.5
    assert np.median(np.linalg.norm(geometry.points_b - centres, axis=1)) < 0.3


def some_features(random: np.random.Generator, count: int, bright: int) -> Features:
    raw = random.gamma(0.6, size=(count, 128))
    return Features(
        points=random.uniform(0, 300, (count, 2)).astype(np.float32),
        size=np.ones(count, np.float32),
        angle=np.zeros(count, np.float32),
        descriptors=np.rint(512 * np.sqrt(raw / raw.sum(axis=1, keepdims=True))).astype(np.uint8),
        bright=bright,
        width=300,
        height=300,
        working_scale=1.0,
    )


def test_matches_are_those_of_brute_force() -> None:
    random = np.random.default_rng(0)
    a, b = some_features(random, 700, 300), some_features(random, 650, 350)
    # Every second descriptor of a returns in b, more or less disturbed, in another order.
    partner = np.concatenate([random.permutation(350)[:150], 350 + random.permutation(300)[:200]])
    noise = random.normal(0, random.uniform(2, 40, (350, 1)), (350, 128))
    b.descriptors[partner] = np.clip(a.descriptors[::2] + noise, 0, 255).astype(np.uint8)
    one, two = a.descriptors.astype(np.int64), b.descriptors.astype(np.int64)
    dots = one @ two.T
    like = (np.arange(700) < 300)[:, None] == (np.arange(650) < 350)[None]
    dots[~like] = -1
    expected = set()
    for i, row in enumerate(dots):
        j = int(row.argmax())
        squared = (one[i] ** 2).sum() + (two[j] ** 2).sum() - 2 * row[j]
        runner_up = 2 * 512**2 - 2 * np.sort(row)[-2]
        if dots[:, j].argmax() == i and squared < RATIO**2 * runner_up:
            expected.add((i, j))
    i, j = mutual_matches(a, b)
    assert set(zip(i.tolist(), j.tolist(), strict=True)) == expected
    assert 100 < len(expected) < 350


def test_only_matches_that_move_with_their_neighbours_count() -> None:
    random = np.random.default_rng(1)
    a = random.uniform(0, 800, (60, 2)).astype(np.float32)
    turn, growth = 25.0, 0.5
    camera_b = 2**growth * np.array(
        [[np.cos(np.deg2rad(turn)), -np.sin(np.deg2rad(turn))], [np.sin(np.deg2rad(turn)), np.cos(np.deg2rad(turn))]]
    )
    b = (a @ camera_b.T + [30, 40]).astype(np.float32)
    assert with_neighbours(a, b, turn, growth).all()
    wrong = b.copy()
    wrong[:6] = random.uniform(0, 800, (6, 2))
    kept = with_neighbours(a, wrong, turn, growth)
    assert not kept[:6].any() and kept[6:].mean() > 0.9
    assert with_neighbours(a, random.permutation(b), turn, growth).mean() < 0.1
    assert not with_neighbours(a[:1], b[:1], turn, growth).any()


def test_landing_bends_to_the_nearest_matches() -> None:
    """Two planes at different depths: the homography knows the first, the matches around a point know its own."""
    x, y = np.meshgrid(np.arange(0, 400, 25.0), np.arange(0, 300, 25.0))
    a = np.column_stack([x.ravel(), y.ravel()])
    near = a[:, 0] >= 200
    b = a + np.array([10.0, 5.0])
    b[near] += np.column_stack([20 + 0.1 * (a[near, 0] - 200), 0.05 * a[near, 1]])
    geometry = PairGeometry(
        **{name: len(a) for name in ("matches", "inliers", "consistent")},
        **dict.fromkeys(("share_a", "share_b", "covered_a", "covered_b", "overlap_a", "overlap_b"), 1.0),
        verified=True,
        scale_log2=0.0,
        scale_ratio=1.0,
        model="epipolar",
        homography=np.array([[1.0, 0, 10], [0, 1, 5], [0, 0, 1]]),
        points_a=a.astype(np.float32),
        points_b=b.astype(np.float32),
    )
    spots = np.array([[313.0, 141.0], [87.0, 160.0]])
    truth = spots + np.array([[10 + 20 + 0.1 * 113, 5 + 0.05 * 141], [10, 5]])
    places, _, spread = landing(geometry, spots)
    assert np.linalg.norm(map_points(geometry.homography, spots[:1]) - truth[:1]) > 25
    assert np.linalg.norm(places - truth, axis=1).max() < 1.0
    assert spread.max() < 3
    # Far from every match the place is a guess, and said to be one.
    assert landing(geometry, np.array([[2000.0, 150.0]]))[2][0] > 50


def test_the_verdict_in_a_geometry_is_the_default_rule() -> None:
    assert (TierRule().min_consistent, TierRule().min_consistency) == (VERIFIED_COUNT, VERIFIED_SHARE)
