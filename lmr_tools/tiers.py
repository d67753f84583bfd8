"""(overlap, scale ratio, evidence) -> High | Medium | Low | not a pair, with the numbers that decided. Pure.

The thresholds of the tiers are the paper's (LMR, ICCV 2023, supplementary): High: Rolp > .30 and Rs > .90; Medium:
Rolp > .10 and Rs > .66; Low: every other pair of the scene. How the 2-D measures stand to the paper's 3-D ones, and why
a pair is believed from `min_consistent` on, stands in docs/geometry.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, overload

from lmr_tools.schema import Tier

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Numbers: TypeAlias = npt.NDArray[np.integer[Any]]
    Truths: TypeAlias = npt.NDArray[np.bool_]

# Evidence that joins photos into scenes and chains: stricter than what one pair needs, because errors would spread.
STRICT_CONSISTENT = 16
STRICT_CONSISTENCY = 0.7


@dataclass(frozen=True, kw_only=True)
class TierRule:
    """Thresholds of the tiers and of the evidence that two photos show one place."""

    min_consistent: int = 10
    min_consistency: float = 0.7
    high_overlap: float = 0.30
    high_scale: float = 0.90
    medium_overlap: float = 0.10
    medium_scale: float = 0.66
    duplicate_psnr: float = 30.0


@overload
def is_verified(consistent: int, inliers: int, rule: TierRule) -> bool: ...
@overload
def is_verified(consistent: Numbers, inliers: Numbers, rule: TierRule) -> Truths: ...
def is_verified(consistent: Any, inliers: Any, rule: TierRule) -> Any:
    """Whether the matches prove one place: enough move with their neighbours, and they are most of the inliers.

    Of one pair, or of as many as the arrays hold.
    """
    return (consistent >= rule.min_consistent) & (consistent >= rule.min_consistency * inliers)


@overload
def is_strict(consistent: int, inliers: int, rule: TierRule) -> bool: ...
@overload
def is_strict(consistent: Numbers, inliers: Numbers, rule: TierRule) -> Truths: ...
def is_strict(consistent: Any, inliers: Any, rule: TierRule) -> Any:
    """Whether the evidence is strong enough to carry a scene on to further photos; of one pair or of arrays."""
    enough = (consistent >= STRICT_CONSISTENT) & (consistent >= STRICT_CONSISTENCY * inliers)
    return is_verified(consistent, inliers, rule) & enough


def grade(
    overlap: float, scale_ratio: float, consistent: int, inliers: int, clip_score: float | None, rule: TierRule
) -> tuple[Tier | None, str]:
    """Tier of a pair and the reason in words; None when the pair is not verified.

    `overlap` is Rolp in [0, 1], `scale_ratio` Rs in (0, 1], `inliers` those of the epipolar fit, `consistent` those of
    them whose neighbours move with them. `clip_score` is told in the reason of a pair that is not verified: embeddings
    alone were right for about half of such pairs, so it decides nothing.
    """
    if not is_verified(consistent, inliers, rule):
        score = "" if clip_score is None else f", embedding {clip_score:.2f}"
        if consistent < rule.min_consistent:
            return None, f"not verified: {consistent} consistent matches < {rule.min_consistent}{score}"
        share = consistent / inliers
        return None, f"not verified: {share:.2f} of the inliers agree < {rule.min_consistency:.2f}{score}"
    if overlap > rule.high_overlap and scale_ratio > rule.high_scale:
        return Tier.HIGH, (
            f"overlap {overlap:.2f} > {rule.high_overlap:.2f}, scale {scale_ratio:.2f} > {rule.high_scale:.2f}"
        )
    missed = (
        f"overlap {overlap:.2f} <= {rule.high_overlap:.2f}"
        if overlap <= rule.high_overlap
        else f"scale {scale_ratio:.2f} <= {rule.high_scale:.2f}"
    )
    if overlap > rule.medium_overlap and scale_ratio > rule.medium_scale:
        return Tier.MEDIUM, f"{missed}, yet above {rule.medium_overlap:.2f} and {rule.medium_scale:.2f}"
    missed = (
        f"overlap {overlap:.2f} <= {rule.medium_overlap:.2f}"
        if overlap <= rule.medium_overlap
        else f"scale {scale_ratio:.2f} <= {rule.medium_scale:.2f}"
    )
    return Tier.LOW, f"verified, {missed}"
