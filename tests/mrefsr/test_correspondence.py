"""Pairs against OpenCV and explicit points, losses against loops, matching of features that are known to be there."""

import math

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from lmr_tools.schema import LmrError
from mrefsr.correspondence import (
    Pair,
    PairRule,
    cell_places,
    homography_between,
    make_pair,
    match_errors,
    match_loss,
    stack_pairs,
)
from mrefsr.sampling import Draws

SIZE = 96


def texture(seed: int, size: int = SIZE) -> np.ndarray:
    """Smooth random blobs, RGB uint8."""
    noise = np.random.default_rng(seed).standard_normal((size, size, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3)
    return np.clip(128 + 45 * smooth / smooth.std(), 0, 255).astype(np.uint8)


def pair(seed: int = 0, **options: float) -> Pair:
    rule = PairRule(**{"crop": 64, "shift": 6.0, "photometric": 0.0} | options)  # type: ignore[arg-type]
    return make_pair(texture(seed), rule, Draws(1, 3, seed))


def test_a_homography_is_opencvs_and_takes_its_points_there() -> None:
    random = np.random.default_rng(0)
    source = np.array([[0, 0], [63, 0], [63, 63], [0, 63]], float)
    for _ in range(20):
        to = source + random.uniform(-8, 8, (4, 2))
        found = homography_between(source, to)
        expected = cv2.getPerspectiveTransform(source.astype(np.float32), to.astype(np.float32))
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        for point, wanted in zip(source, to, strict=True):
            x, y, w = found @ np.array([*point, 1])
            np.testing.assert_allclose([x / w, y / w], wanted, atol=1e-9)


def test_places_of_cells_by_explicit_points() -> None:
    right_and_down = np.array([[1.0, 0, 8], [0, 1, -4], [0, 0, 1]])
    places = cell_places(right_and_down, 3, 5)
    assert places.shape == (3, 5, 2)
    for row in range(3):
        for column in range(5):
            np.testing.assert_allclose(places[row, column], [column + 2, row - 1])
    # Twice as large about the first pixel's middle: the middle of cell 0, pixel 1.5, comes to pixel 3.
    places = cell_places(np.diag([2.0, 2, 1]), 2, 2)
    np.testing.assert_allclose(places[0, 0], [(3 - 1.5) / 4] * 2)
    np.testing.assert_allclose(places[1, 1], [(11 - 1.5) / 4] * 2)


@pytest.mark.parametrize("seed", range(4))
def test_the_warped_picture_shows_at_a_cells_place_what_the_picture_shows_in_the_cell(seed: int) -> None:
    made = pair(seed)
    assert made.image.shape == made.warped.shape == made.enlarged.shape == (64, 64, 3)
    places = cell_places(made.homography, 16, 16)
    x, y = np.meshgrid(np.arange(16) * 4 + 1.5, np.arange(16) * 4 + 1.5)
    here = cv2.remap(made.image, x.astype(np.float32), y.astype(np.float32), cv2.INTER_LINEAR).astype(float)
    at = (4 * places + 1.5).astype(np.float32)
    there = cv2.remap(made.warped, at[..., 0], at[..., 1], cv2.INTER_LINEAR).astype(float)
    inside = ((at > 1) & (at < 62)).all(-1)
    assert inside.mean() > 0.7
    off = np.abs(here - there)[inside]
    assert off.mean() < 2.5
    assert np.abs(here - there[::-1])[inside].mean() > 10  # and not just anywhere


def test_the_window_keeps_away_from_the_border_so_that_nothing_mirrored_is_seen() -> None:
    rule = PairRule(crop=64, shift=8, photometric=0)
    for number in range(50):
        picture = np.zeros((80, 80, 3), np.uint8)
        picture[[0, -1]] = picture[:, [0, -1]] = 255  # the rim, mirrored or not, would be seen
        made = make_pair(picture, rule, Draws(0, 3, number))
        corners = np.linalg.inv(made.homography) @ np.array([[0, 0, 1], [63, 0, 1], [63, 63, 1], [0, 63, 1]]).T
        reach = corners[:2] / corners[2]
        assert reach.min() >= -8 and reach.max() <= 71
        assert (made.warped[2:-2, 2:-2] < 30).all()


def test_a_pair_follows_from_its_draws_and_options_change_what_they_say() -> None:
    first, again, other = pair(2), pair(2), make_pair(texture(2), PairRule(crop=64, shift=6), Draws(2, 3, 2))
    assert np.array_equal(first.warped, again.warped) and np.array_equal(first.image, again.image)
    assert not np.array_equal(first.homography, other.homography)
    np.testing.assert_allclose(pair(2, shift=0).homography, np.eye(3), atol=1e-12)
    relit = pair(2, photometric=0.3)
    assert np.array_equal(relit.homography, first.homography) and np.array_equal(relit.image, first.image)
    assert not np.array_equal(relit.warped, first.warped)
    assert np.abs(first.enlarged.astype(int) - first.image).mean() > 0.1


def test_rules_and_crops_that_can_not_be_are_refused() -> None:
    for options, text in (({"crop": 30}, "crop 30"), ({"shift": 16}, "shift 16"), ({"photometric": 1}, "photometric")):
        with pytest.raises(LmrError, match=text):
            pair(**options)
    with pytest.raises(LmrError, match=r"crop 128: larger than a stored crop of 96x96"):
        pair(crop=128)


def by_loops(
    image: Tensor,
    warped: Tensor,
    place: Tensor,
    margin: float,
    radius: float,
    teacher: tuple[Tensor, Tensor],
    tau: float,
) -> tuple[float, float]:
    """Triplet loss and distillation of one pair, cell by cell."""
    height, width = place.shape[:2]

    def unit(features: Tensor, x: int, y: int) -> Tensor:
        return features[:, y, x] / features[:, y, x].norm()

    cells = []
    for y in range(height):
        for x in range(width):
            u, v = (round(float(value)) for value in place[y, x])
            if 0 <= u < width and 0 <= v < height:
                cells.append((x, y, u, v))
    triplets, divergences = [], []
    for x, y, u, v in cells:
        p, q = unit(image, x, y), unit(warped, u, v)
        negatives = [10.0]
        for _, _, u2, v2 in cells:
            if max(abs(u - u2), abs(v - v2)) > radius:
                negatives.append(float((p - unit(warped, u2, v2)).square().sum()))
        for y2 in range(height):
            far = [x2 for x2 in range(width) if max(abs(x - x2), abs(y - y2)) > radius]
            negatives += [float((q - unit(image, x2, y2)).square().sum()) for x2 in far]
        triplets.append(max(0.0, margin + float((p - q).square().sum()) - min(negatives)))
        logits = [
            [float(unit(a, x, y) @ unit(b, c[2], c[3])) / tau for c in cells] for a, b in ((image, warped), teacher)
        ]
        mine, theirs = (torch.tensor(row, dtype=torch.float64).softmax(0) for row in logits)
        divergences.append(float((theirs * (theirs / mine).log()).sum()))
    return sum(triplets) / len(triplets), sum(divergences) / len(divergences)


def test_the_losses_are_those_of_loops_over_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    image, warped, taught_image, taught_warped = torch.randn(4, 3, 6, 5, 7, generator=generator)
    place = torch.stack(torch.meshgrid(torch.arange(7.0), torch.arange(5.0), indexing="xy"), -1)
    place = place + torch.tensor([1.2, -0.7]) + 0.4 * torch.rand(3, 5, 7, 2, generator=generator)
    place[2] += 100  # nothing in common: this pair is left out
    options = {"margin": 0.8, "safe_radius": 1.0, "temperature": 0.3}
    found = match_loss((image, warped), place, teacher=(taught_image, taught_warped), **options)
    expected = [
        by_loops(image[i], warped[i], place[i], 0.8, 1.0, (taught_image[i], taught_warped[i]), 0.3) for i in range(2)
    ]
    assert found.triplet.item() == pytest.approx(sum(e[0] for e in expected) / 2, rel=1e-4)
    assert found.distillation.item() == pytest.approx(sum(e[1] for e in expected) / 2, rel=1e-4)
    assert match_loss((image, warped), place, **options).distillation.item() == 0


def test_equal_correlations_cost_nothing_and_the_teacher_gets_no_gradient() -> None:
    generator = torch.Generator().manual_seed(1)
    image, warped, other = (torch.randn(1, 8, 6, 6, generator=generator).requires_grad_() for _ in range(3))
    place = torch.from_numpy(cell_places(np.eye(3), 6, 6))[None].float()
    same = match_loss((image, warped), place, teacher=(image.detach(), warped.detach()))
    assert same.distillation.item() == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        taught = (other * 1, image * 1)
    match_loss((image, warped), place, teacher=taught).distillation.backward()
    assert image.grad is not None and warped.grad is not None and other.grad is None


def test_pairs_without_common_cells_teach_nothing_but_keep_the_graph() -> None:
    features = torch.randn(1, 4, 5, 5).requires_grad_()
    loss = match_loss((features, features * 1), torch.full((1, 5, 5, 2), 50.0)).triplet
    loss.backward()
    assert loss.item() == 0 and features.grad is not None and bool((features.grad == 0).all())


def test_errors_are_distances_to_the_exact_place() -> None:
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(1, 16, 12, 14, generator=generator)
    warped = image.roll((2, 1), (2, 3))  # 2 down, 1 to the right
    grid = torch.stack(torch.meshgrid(torch.arange(14.0), torch.arange(12.0), indexing="xy"), -1)[None]
    exact = match_errors((image, warped), grid + torch.tensor([1.0, 2.0]))
    assert len(exact) == (12 - 4) * (14 - 3) and float(exact.max()) < 1e-6
    off = match_errors((image, warped), grid + torch.tensor([1.0 + 3, 2.0 - 1]))
    assert float(off.median()) == pytest.approx(math.hypot(3, 1))


def test_a_batch_holds_its_pairs() -> None:
    pairs = [pair(seed) for seed in range(3)]
    batch = stack_pairs(pairs)
    assert batch.image.shape == batch.enlarged.shape == batch.warped.shape == (3, 3, 64, 64)
    assert batch.place.shape == (3, 16, 16, 2)
    assert np.array_equal(batch.warped[1].mul(255).round().byte().permute(1, 2, 0).numpy(), pairs[1].warped)
    np.testing.assert_allclose(batch.place[2], cell_places(pairs[2].homography, 16, 16), atol=1e-5)
