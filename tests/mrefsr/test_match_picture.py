"""The picture of matches: colours where they belong, every reference in the legend."""

from __future__ import annotations

import numpy as np
import pytest

from mrefsr.match_picture import COLOURS, FAINTEST, STRONGEST, draw_matches, tint


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[n : n + 2], 16) for n in (1, 3, 5)], dtype=float)


def halves(count: int, left: int, right: int, share: float) -> np.ndarray:
    """Shares on a 4x8 grid: `left` leads in the left half, `right` in the right one."""
    shares = np.full((count, 4, 8), (1 - share) / max(count - 1, 1), np.float32)
    shares[left, :, :4] = share
    shares[right, :, 4:] = share
    return shares


def test_each_region_has_the_colour_of_the_leading_reference() -> None:
    grey = np.full((32, 64, 3), 100, np.uint8)
    for share, strength in ((1.0, STRONGEST), (0.5, FAINTEST + (STRONGEST - FAINTEST) * 0.25)):
        tinted = tint(grey, halves(3, 2, 0, share)).astype(float)
        for columns, reference in ((slice(0, 32), 2), (slice(32, 64), 0)):
            expected = 100 * (1 - strength) + rgb(COLOURS[reference]) * strength
            assert np.abs(tinted[:, columns] - expected).max() <= 1


def test_single_places_do_not_break_up_a_region() -> None:
    shares = np.full((2, 100, 100), 0.2, np.float32)
    shares[0] = 0.8
    shares[:, ::3, ::3] = shares[::-1, ::3, ::3]  # one place in nine prefers the other reference
    tinted = tint(np.full((400, 400, 3), 100, np.uint8), shares).astype(float)
    towards = np.abs(tinted[:, :, None] - np.stack([rgb(colour) for colour in COLOURS[:2]])).sum(3)
    assert (towards[:, :, 0] < towards[:, :, 1]).all()


def test_without_references_it_is_grey() -> None:
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    tinted = tint(image, np.zeros((0, 4, 4), np.float32))
    assert (tinted.max(2) == tinted.min(2)).all()


@pytest.mark.parametrize("count", [0, 1, 2, 9])
def test_the_legend_shows_every_reference(count: int) -> None:
    image = np.full((16, 32, 3), 200, np.uint8)
    references = [np.full((20, 30, 3), 10 * n + 5, np.uint8) for n in range(count)]
    shares = halves(count, 0, count - 1, 0.9) if count > 1 else np.ones((count, 4, 8), np.float32)
    names = [f"r{n}.jpg" for n in range(count)]
    drawn = np.asarray(draw_matches(image, references, names, shares))
    for number in range(count):
        assert (drawn == references[number][0, 0]).all(2).sum() > 1000  # its thumbnail
        assert (drawn == rgb(COLOURS[number % len(COLOURS)])).all(2).sum() > 500  # frame and number
    assert np.array_equal(drawn, np.asarray(draw_matches(image, references, names, shares)))
    with pytest.raises(ValueError, match="names"):
        draw_matches(image, references, [*names, "more"], shares)
