"""The tier rule at and around its thresholds."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmr_tools.schema import Tier
from lmr_tools.tiers import TierRule, grade, is_strict, is_verified

RULE = TierRule()
ORDER = {Tier.HIGH: 3, Tier.MEDIUM: 2, Tier.LOW: 1, None: 0}


@pytest.mark.parametrize(
    ("overlap", "scale", "tier", "why"),
    [
        (0.31, 0.91, Tier.HIGH, "overlap 0.31 > 0.30"),
        (0.30, 0.91, Tier.MEDIUM, "overlap 0.30 <= 0.30"),
        (0.31, 0.90, Tier.MEDIUM, "scale 0.90 <= 0.90"),
        (0.11, 0.67, Tier.MEDIUM, "overlap 0.11 <= 0.30"),
        (0.10, 0.99, Tier.LOW, "overlap 0.10 <= 0.10"),
        (0.90, 0.66, Tier.LOW, "scale 0.66 <= 0.66"),
    ],
)
def test_the_papers_thresholds_are_strict(overlap: float, scale: float, tier: Tier, why: str) -> None:
    found, reason = grade(overlap, scale, 50, 50, 0.9, RULE)
    assert found == tier
    assert why in reason


@pytest.mark.parametrize(
    ("consistent", "inliers", "verified"),
    [(10, 10, True), (9, 9, False), (14, 20, True), (13, 20, False), (0, 0, False)],
)
def test_evidence_decides_whether_there_is_a_pair(consistent: int, inliers: int, verified: bool) -> None:
    assert is_verified(consistent, inliers, RULE) == verified
    tier, reason = grade(0.9, 1.0, consistent, inliers, 0.75, RULE)
    assert (tier is not None) == verified
    assert verified or ("not verified" in reason and "embedding 0.75" in reason)


@given(st.floats(0, 1), st.floats(0.01, 1), st.floats(0, 1), st.floats(0.01, 1), st.integers(0, 90), st.integers(0, 90))
def test_more_of_everything_never_lowers_a_tier(
    overlap: float, scale: float, more: float, larger: float, consistent: int, extra: int
) -> None:
    inliers = consistent + extra
    low, _ = grade(min(overlap, more), min(scale, larger), consistent, inliers, None, RULE)
    high, _ = grade(max(overlap, more), max(scale, larger), inliers, inliers, None, RULE)
    assert ORDER[high] >= ORDER[low]


@given(st.integers(0, 100), st.integers(0, 100))
def test_strict_evidence_is_evidence(consistent: int, extra: int) -> None:
    assert not is_strict(consistent, consistent + extra, RULE) or is_verified(consistent, consistent + extra, RULE)


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 20)), max_size=20))
def test_evidence_of_many_pairs_is_that_of_each(pairs: list[tuple[int, int]]) -> None:
    consistent = np.array([given for given, _ in pairs], np.int32)
    inliers = consistent + np.array([extra for _, extra in pairs], np.int32)
    for decide in (is_verified, is_strict):
        each = [decide(c, n, RULE) for c, n in zip(consistent.tolist(), inliers.tolist(), strict=True)]
        assert decide(consistent, inliers, RULE).tolist() == each
