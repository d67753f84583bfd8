"""The restoration network: content extractor, then three scales of dynamic aggregation, fusion, residual blocks.

Module names are those of the published checkpoint (Zhang et al., ICCV 2023), so that its tensors load by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mrefsr.config import VGG_CHANNELS, ModelConfig
from mrefsr.convolution import Conv, first_part, second_part
from mrefsr.deform import deform_conv2d
from mrefsr.fusion import SLOPE, MultiReferenceFusion, ReferenceSlot, bands, join, lrelu

RECOMPUTED_BLOCKS = 4  # residual blocks whose inner values are made again together
SCALES = ("small", "medium", "large")  # x1, x2, x4 of the LR; matched with relu3_1, relu2_1, relu1_1


class ScaleReference(NamedTuple):
    """What one scale reads of one reference, for those items of the batch that have it."""

    features: Tensor  # R,C,H',W'; VGG features of the scale, on the reference's own grid
    taps: Tensor  # R,9,h,w,2: matched displacement (x, y) of the nine taps, in LR pixels on the LR grid
    rows: Tensor | None  # int64 R: which items of the batch; None for all of them
    agreement: Tensor | None = None  # R,2,h,w on the LR grid, where matches are refined


class ResidualBlock(nn.Module):
    """x + conv(relu(conv(x)))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = Conv(channels, channels)
        self.conv2 = Conv(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x, slope=0), addend=x)  # type: ignore[no-any-return]


class ContentExtractor(nn.Module):
    """LR image B3hw -> content features B,C,h,w."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.conv_first = Conv(3, channels)
        self.body = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))

    def forward(self, lr: Tensor) -> Tensor:
        return self.body(self.conv_first(lr, slope=SLOPE))  # type: ignore[no-any-return]


class DynamicAggregation(nn.Module):
    """Modulated 3x3 deformable convolution whose offsets start from the matched displacement."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels, channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels))
        bound = 1 / math.sqrt(channels * 9)
        nn.init.uniform_(self.weight, -bound, bound)
        self.conv_offset_mask = Conv(channels, groups * 27)

    def forward(
        self, reference: Tensor, hints: Tensor, taps: Tensor, scale: int = 1, origin: tuple[int, int] = (0, 0)
    ) -> Tensor:
        """Gather `reference` R,C,H',W' onto the grid of `hints` R,C,H,W.

        `taps` R,9,H/scale,W/scale,2: matched displacement (x, y) of each tap on the LR grid and in its pixels; the
        learned offsets of every group are added to it. `origin` (y, x): place of the corner, in LR pixels.
        """
        gathered = []
        for own, seen, inner in bands(hints.shape[2], len(hints) * hints.shape[3] * self.groups * 27 * 4):
            # float32 whatever the autocast: a bfloat16 coordinate is wrong by pixels.
            predicted = self.conv_offset_mask(hints[:, :, seen])[:, :, inner].float()
            offset, mask = predicted.split([self.groups * 18, self.groups * 9], 1)
            top, bottom = own.start // scale, own.stop // scale
            flow = _taps_at_scale(taps[:, :, top:bottom], scale, (origin[0] + top, origin[1]))
            gathered.append(deform_conv2d(reference, offset, self.weight, self.bias, mask=mask.sigmoid(), flow=flow))
        return join(gathered)


def _taps_at_scale(taps: Tensor, scale: int, origin: tuple[int, int]) -> Tensor:
    """R,9,h,w,2 on the LR grid -> R,9,h*scale,w*scale,2 in pixels of the scale, seen from `origin` (y, x)."""
    taps = ((taps + torch.tensor(origin[::-1], device=taps.device)) * scale).float()
    return taps.repeat_interleave(scale, 2).repeat_interleave(scale, 3)


def _align(features: Tensor, origin: tuple[int, int], size: torch.Size) -> Tensor:
    """The part of `features` that lies under a window of `size` at `origin` (y, x); zeros beyond their border."""
    (top, left), (height, width) = origin, size
    part = features[:, :, top : top + height, left : left + width]
    if part.shape[2:] == size:
        return part
    return F.pad(part, (0, width - part.shape[3], 0, height - part.shape[2]))


class DynamicRestoration(nn.Module):
    """Three scales: gather every reference's features, fuse them with the content, residual blocks, enlarge x2."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        channels = config.channels
        self.feature_scale = config.feature_scale
        for scale, vgg, reference, blocks in zip(
            SCALES, VGG_CHANNELS, config.reference_channels, config.blocks, strict=True
        ):
            if reference != vgg:
                self.add_module(f"{scale}_reduce", Conv(vgg, reference, 1))
            self.add_module(f"{scale}_offset_conv1", Conv(channels + reference, reference))
            self.add_module(f"{scale}_offset_conv2", Conv(reference, reference))
            self.add_module(f"{scale}_dyn_agg", DynamicAggregation(reference, config.offset_groups))
            head = MultiReferenceFusion(channels, reference, config.attention_width, config.refine_matches)
            self.add_module(f"head_{scale}", head)
            self.add_module(f"body_{scale}", nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks))))
            self.add_module(f"tail_{scale}", _tail(channels, last=scale == SCALES[-1]))

    def forward(
        self,
        index: int,
        x: Tensor,
        references: Iterable[ScaleReference],
        origin: tuple[int, int] = (0, 0),
        recompute: bool = False,
    ) -> tuple[Tensor, list[Tensor]]:
        """Scale `index` (0, 1, 2) of the network.

        `x` B,C,H,W at x1, x2, x4 of the LR. `references` are read once and may be made one by one. `origin` (y, x) is
        the place of x's corner on the whole image's LR grid, where x is a tile. `recompute`: see `MRefSR.forward`.
        Returns the features for the next scale (after the last: the residual image B,3,H,W) and each reference's
        attention B,1,H,W.
        """
        scale = SCALES[index]
        gathered = self._gather(index, x, references, origin, recompute)
        fused, attention = self._part(f"head_{scale}")(x, gathered)
        body = self._part(f"body_{scale}")
        for first in range(0, len(body), RECOMPUTED_BLOCKS):
            fused = _call(recompute, body[first : first + RECOMPUTED_BLOCKS], fused)
        return self._part(f"tail_{scale}")(fused.add_(x)), attention

    def _gather(
        self, index: int, x: Tensor, references: Iterable[ScaleReference], origin: tuple[int, int], recompute: bool
    ) -> Iterator[ReferenceSlot]:
        of_content = None
        for features, taps, rows, agreement in references:
            if of_content is None:
                of_content = first_part(self._part(f"{SCALES[index]}_offset_conv1"), x)  # the same for all references
            present = of_content if rows is None else of_content[rows]
            gathered = _call(recompute, self._gather_one, index, present, features, taps, origin)
            del features, present  # before the fusion works on what was gathered
            if agreement is not None:
                agreement = agreement.repeat_interleave(2**index, 2).repeat_interleave(2**index, 3)
            yield ReferenceSlot(gathered, rows, agreement)
            del gathered

    def _gather_one(
        self, index: int, of_content: Tensor, features: Tensor, taps: Tensor, origin: tuple[int, int]
    ) -> Tensor:
        scale, factor = SCALES[index], 2**index
        if self.feature_scale[index] != 1:
            features = features / self.feature_scale[index]
        if hasattr(self, f"{scale}_reduce"):
            features = self._part(f"{scale}_reduce")(features)
        aligned = _align(features, (origin[0] * factor, origin[1] * factor), of_content.shape[2:])
        hints = second_part(self._part(f"{scale}_offset_conv1"), of_content, aligned, SLOPE)
        hints = self._part(f"{scale}_offset_conv2")(hints, slope=SLOPE)
        return lrelu(self._part(f"{scale}_dyn_agg")(features, hints, taps, factor, origin))

    def _part(self, name: str) -> Any:
        return self.get_submodule(name)


def _call(recompute: bool, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`; with `recompute` its inner values are not kept but made again in the backward pass."""
    if not recompute or not torch.is_grad_enabled():
        return function(*arguments)
    result: Tensor = checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return result


def _tail(channels: int, *, last: bool) -> nn.Sequential:
    if last:
        half = channels // 2
        return nn.Sequential(Conv(channels, half), nn.LeakyReLU(SLOPE, inplace=True), Conv(half, 3))
    return nn.Sequential(Conv(channels, channels * 4), nn.PixelShuffle(2), nn.LeakyReLU(SLOPE, inplace=True))


class RestorationNet(nn.Module):
    """The trained part of MRefSR; the published one has 350 tensors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.content_extractor = ContentExtractor(config.channels, config.content_blocks)
        self.dyn_agg_restore = DynamicRestoration(config)
