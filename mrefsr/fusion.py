"""Multi-reference attention (MAM) and spatial-aware filtering (SAFM): many references' features become one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrefsr.convolution import Conv, first_part, second_part

SLOPE = 0.1  # of the network's leaky ReLUs
# First weights of a reference's agreement in features and in pixels, and the constant. Where it meets the middle (what
# right and wrong references reach, measured on photos) the reference is as good as none; TEMPER turns it into logits.
TRUST = (1.0, 1.0, 0.0)
MIDDLE = (0.75, 0.85)
TEMPER = 20.0
BAND_BYTES = 32 << 20  # of a float32 tensor of one band


def lrelu(x: Tensor) -> Tensor:
    """The network's leaky ReLU, in place."""
    return F.leaky_relu_(x, SLOPE)


def conv_of_pair(conv: nn.Conv2d, a: Tensor, b: Tensor, slope: float = 1.0) -> Tensor:
    """leaky_relu(conv(torch.cat([a, b], 1)), slope) without the copy."""
    return second_part(conv, first_part(conv, a), b, slope)


class Band(NamedTuple):
    """Some rows of a map: `seen` with four more on either side, which two or three convolutions look at; `inner` is
    where `own` lies in `seen`."""

    own: slice
    seen: slice
    inner: slice


def bands(height: int, row_bytes: int) -> list[Band]:
    """Bands in which to make what has `row_bytes` a row and is not kept; one band where gradients keep everything."""
    rows = height if torch.is_grad_enabled() else max(4, BAND_BYTES // row_bytes // 4 * 4)
    found = []
    for top in range(0, height, rows):
        first, bottom = max(top - 4, 0), min(top + rows, height)
        found.append(Band(slice(top, bottom), slice(first, bottom + 4), slice(top - first, bottom - first)))
    return found


def join(parts: list[Tensor]) -> Tensor:
    """What was made in bands, as one map."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


class ReferenceSlot(NamedTuple):
    """Features of one reference for those items of the batch that have it."""

    features: Tensor  # R,C,H,W
    rows: Tensor | None  # int64 R: which items of the batch; None for all of them
    agreement: Tensor | None = None  # R,2,H,W: how well it agrees with the target; see `MultiReferenceFusion`


class MultiReferenceFusion(nn.Module):
    """MAM and SAFM of one scale. Tensor names are those of the published checkpoint.

    Attention over references is a softmax per pixel, so neither the number of references nor their order matters. It
    is summed up reference by reference: memory does not grow with their number. An item without any reference gets
    zeros in place of the attended features.

    weigh_agreement (not in the paper): a reference's logit gets learned multiples of its agreement and a learned
    constant, and a null reference with logit and value 0 takes part: what agrees with the target nowhere is refused.
    """

    def __init__(self, channels: int, reference_channels: int, width: int = 2, weigh_agreement: bool = False) -> None:
        super().__init__()
        self.trust = nn.Parameter(torch.tensor(TRUST)) if weigh_agreement else None
        value = reference_channels * width
        self.conv_emb1 = nn.Sequential(Conv(channels, reference_channels, 1), nn.PReLU())
        self.conv_emb2 = nn.Sequential(Conv(reference_channels, reference_channels), nn.PReLU())
        self.conv_ass = Conv(reference_channels, value)
        self.feat_fusion = Conv(channels + value, channels, 1)
        self.spatial_attn = Conv(channels + value, value, 1)
        self.spatial_attn_mul1 = Conv(value, value)
        self.spatial_attn_mul2 = Conv(value, value)
        self.spatial_attn_add1 = Conv(value, value)
        self.spatial_attn_add2 = Conv(value, value)

    def forward(self, target: Tensor, references: Iterable[ReferenceSlot]) -> tuple[Tensor, list[Tensor]]:
        """Fuse `target` B,C,H,W with the references' features, which may be made one by one while they are read.

        Returns the fused B,C,H,W and for each reference its attention B,1,H,W: float32, no gradient, zero where
        absent; the sum over references is 1 for every item that has one, or less where a null reference takes part.
        """
        height, width = target.shape[2:]
        # The published network works on multiples of 4, made by reflection at the bottom and right.
        target = _pad(target)
        attended, attention = self.attend(target, references)
        fused = []
        for _, seen, inner in bands(target.shape[2], attended[:, :, 0].numel() * 4):
            fused.append(self.filter(target[:, :, seen], attended[:, :, seen])[:, :, inner])
        return join(fused)[:, :, :height, :width], [weight[:, :, :height, :width] for weight in attention]

    def attend(self, target: Tensor, references: Iterable[ReferenceSlot]) -> tuple[Tensor, list[Tensor]]:
        """MAM: (sum over references of softmax(query . key / sqrt(C)) value, the softmax weights)."""
        query = self.conv_emb1[0](target, slope=self.conv_emb1[1].weight)
        size = (len(target), 1, *target.shape[2:])
        # softmax as a running sum. `peak`, the largest logit so far, only keeps exp() in range: it needs no gradient.
        peak = torch.full(size, torch.finfo(torch.float32).min, device=target.device)
        total = torch.zeros(size, device=target.device)
        if self.trust is not None:  # the null reference
            peak, total = torch.zeros_like(peak), torch.ones_like(total)
        attended = None
        logits = []
        for features, rows, agreement in references:
            padded = _pad(features)
            key = self.conv_emb2[0](padded, slope=self.conv_emb2[1].weight)
            logit = ((query if rows is None else query[rows]) * key).sum(1, keepdim=True, dtype=torch.float32)
            logit = logit * query.shape[1] ** -0.5
            if self.trust is not None:
                logit = logit + self._trusted(agreement)
            del features, key  # before the next tensor is made, here and below: they are the largest there are
            value = self.conv_ass(padded)
            if rows is not None:
                logit = torch.full(size, -torch.inf, device=logit.device).index_copy(0, rows, logit)
                value = value.new_zeros(len(target), *value.shape[1:]).index_copy(0, rows, value)
            logits.append(logit.detach())
            new_peak = torch.maximum(peak, logits[-1])
            fade, weight = torch.exp(peak - new_peak), torch.exp(logit - new_peak)
            total = total * fade + weight
            fade, weight = fade.to(value.dtype), weight.to(value.dtype)
            attended = value * weight if attended is None else attended.mul_(fade).addcmul_(value, weight)
            peak = new_peak
            del padded, value
        # Where there is a reference the total is at least 1, its largest term; without one it is 0.
        total = total.clamp_min(0.5)
        attention = [torch.exp(logit - peak) / total.detach() for logit in logits]
        if attended is None:
            attended = target.new_zeros(len(target), self.conv_ass.out_channels, *target.shape[2:])
        return attended.div_(total.to(attended.dtype)), attention

    def _trusted(self, agreement: Tensor | None) -> Tensor:
        """R,2,H,W -> what a reference's logit gains, R,1,H,W."""
        if agreement is None or self.trust is None:
            raise ValueError("a reference without its agreement: match it with the enlarged LR")
        agreement = _pad(agreement).float()
        gain: Tensor = self.trust[0] * (agreement[:, :1] - MIDDLE[0]) + self.trust[1] * (agreement[:, 1:] - MIDDLE[1])
        return TEMPER * gain + self.trust[2]

    def filter(self, target: Tensor, attended: Tensor) -> Tensor:
        """SAFM: the attended features are scaled and shifted by learned masks, then joined with the target's."""
        masks = conv_of_pair(self.spatial_attn, target, attended, SLOPE)
        scale = self.spatial_attn_mul2(self.spatial_attn_mul1(masks, slope=SLOPE)).sigmoid_()
        shift = self.spatial_attn_add2(self.spatial_attn_add1(masks, slope=SLOPE))
        del masks
        return conv_of_pair(self.feat_fusion, target, shift.addcmul_(attended, scale, value=2), SLOPE)


def _pad(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    if height % 4 == 0 and width % 4 == 0:
        return x
    return F.pad(x, (0, -width % 4, 0, -height % 4), mode="reflect")
