"""Refined matches: known shifts are found, pieces give the same, and what does not agree is refused from the start."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lmr_tools.schema import LmrError
from mrefsr import refinement
from mrefsr.config import MODEL_PRESETS, ModelConfig
from mrefsr.fusion import MultiReferenceFusion, ReferenceSlot
from mrefsr.model import MRefSR
from mrefsr.refinement import refine_matches

TINY = MODEL_PRESETS["mrefsr-tiny"]


def smooth(height: int, width: int, seed: int) -> Tensor:
    """1,3,H,W in [0, 1], without detail finer than a few pixels."""
    coarse = torch.rand(1, 3, height // 4 + 2, width // 4 + 2, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(coarse, (height, width), mode="bicubic", align_corners=False).clamp_(0, 1)


def own_place(height: int, width: int) -> Tensor:
    """The index that matches every patch with the patch at its own place."""
    return torch.arange((height - 2) * (width - 2)).view(1, height - 2, width - 2)


@pytest.mark.parametrize(("down", "right"), [(0, 0), (1, -2), (-2, 1), (2, 2)])
def test_finds_a_shift_of_whole_pixels(down: int, right: int) -> None:
    picture = smooth(56, 64, 1)
    enlarged, reference = picture[:, :, 4:-4, 4:-4], torch.roll(picture, (down, right), (2, 3))[:, :, 4:-4, 4:-4]
    # Brightness and contrast of a reference do not matter.
    flow, fit = refine_matches(own_place(12, 14), 12, enlarged, 0.5 * reference + 0.2)
    inner = flow[:, 1:-1, 1:-1]
    assert (inner[..., 0] * 4 - right).abs().max() < 0.25
    assert (inner[..., 1] * 4 - down).abs().max() < 0.25
    assert fit[:, 1:-1, 1:-1].min() > 0.99


def test_finds_a_shift_of_half_a_pixel() -> None:
    picture = smooth(56, 64, 2)
    half = (picture + torch.roll(picture, 1, 3)) / 2
    flow, _ = refine_matches(own_place(12, 14), 12, picture[:, :, 4:-4, 4:-4], half[:, :, 4:-4, 4:-4])
    assert (flow[:, 1:-1, 1:-1, 0] * 4 - 0.5).abs().mean() < 0.1


def test_pieces_and_items_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    enlarged, blurred = (
        torch.cat([smooth(40, 36, n) for n in range(3)]),
        torch.cat([smooth(44, 60, n) for n in range(3)]),
    )
    index = torch.randint(0, 9 * 13, (3, 8, 7), generator=torch.Generator().manual_seed(0))
    whole = refine_matches(index, 13, enlarged, blurred)
    monkeypatch.setattr(refinement, "CHUNK", 17)
    for mine, theirs in zip(refine_matches(index, 13, enlarged, blurred), whole, strict=True):
        torch.testing.assert_close(mine, theirs)
    for n in range(3):
        alone = refine_matches(index[n : n + 1], 13, enlarged[n : n + 1], blurred[n : n + 1])
        torch.testing.assert_close(alone[0], whole[0][n : n + 1])


def test_flat_pictures_agree_with_nothing_and_stay_where_they_are() -> None:
    flow, fit = refine_matches(own_place(6, 6), 4, torch.full((1, 3, 24, 24), 0.5), torch.full((1, 3, 24, 24), 0.5))
    assert fit.abs().max() < 1e-3
    assert bool(flow.isfinite().all())


def slot(features: float, pixels: float, seed: int, rows: Tensor | None = None) -> ReferenceSlot:
    values = torch.randn(2 if rows is None else len(rows), 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    agreement = torch.tensor([features, pixels]).view(1, 2, 1, 1).expand(len(values), 2, 8, 8)
    return ReferenceSlot(0.01 * values, rows, agreement)


@torch.no_grad()
def test_the_null_reference_takes_what_does_not_agree() -> None:
    head = MultiReferenceFusion(16, 16, 1, weigh_agreement=True)
    target = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(9))
    right, wrong = slot(0.95, 0.98, 1), slot(0.55, 0.6, 2)
    alone, (share,) = head.attend(target, [right])
    assert share.min() > 0.9
    refused, (share,) = head.attend(target, [wrong])
    assert share.max() < 0.01 and refused.abs().max() < 0.01 * alone.abs().max()
    both, shares = head.attend(target, [right, wrong])
    assert torch.cat(shares, 1).sum(1).max() <= 1 + 1e-6
    torch.testing.assert_close(both, alone, atol=1e-3, rtol=0)
    swapped, _ = head.attend(target, [wrong, right])
    torch.testing.assert_close(swapped, both)
    # An item that lacks the reference gets what it would get without any.
    first, (share,) = head.attend(target, [slot(0.95, 0.98, 1, torch.tensor([1]))])
    assert not first[0].any() and not share[0].any() and bool(first[1].any())
    with pytest.raises(ValueError, match="without its agreement"):
        head.attend(target, [ReferenceSlot(right.features, None)])


def test_only_where_it_is_asked_for() -> None:
    assert not ModelConfig().refine_matches and TINY.refine_matches
    assert not any("trust" in name for name in MRefSR(ModelConfig(channels=8, blocks=(1, 1, 1))).state_dict())
    with pytest.raises(LmrError, match="refine_matches"):
        ModelConfig(refine_matches=1)  # type: ignore[arg-type]
    model = MRefSR(TINY)
    with pytest.raises(ValueError, match="enlarged LR"):
        model.match(model.encode_input(smooth(24, 24, 0)), model.encode_reference(smooth(24, 24, 0)))
