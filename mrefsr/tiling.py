"""Large images in bounded memory: references encoded strip by strip, the restoration scale by scale and tile by tile.

Both are exact, not blended: every strip and tile sees as much of its surroundings as the network looks at, computes it
too and throws it away, so the result is that of the whole image up to float rounding. Going scale by scale keeps the
surroundings small: through all three scales the network sees over a hundred LR pixels, in one scale about forty pixels
of that scale (ten LR pixels at x4, where most of the work is).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mrefsr.config import ModelConfig
from mrefsr.fusion import BAND_BYTES
from mrefsr.model import MatchedReference, MRefSR, ReferenceFeatures
from mrefsr.network import ScaleReference

# Full-resolution rows that a strip sees beyond its own: VGG up to conv3_1 looks 12 pixels around, the blurring of
# references (down and up x4) 16 more. Strips begin at multiples of 4, so pooling and blurring fall on the same pixels.
OVERLAP = 32
STRIP_PIXELS = 1 << 19
VGG_FLOATS = 100  # a pixel of a strip at the widest place
BANDS = 5  # tensors of one band alive at once
STEP = 4  # tiles begin at multiples of it: there the fusion's padding to multiples of 4 is the whole image's
SMALLEST_TILE = 16  # LR pixels; below it, `auto` gives up
SAFETY = 1.2  # what the allocator and the convolutions' scratch take beyond the tensors
Box = tuple[int, int, int, int]  # top, bottom, left, right in LR pixels


@dataclass(frozen=True, kw_only=True)
class Window:
    """One tile: `core` is what it contributes, `seen` what it looks at."""

    core: Box
    seen: Box


Plan = tuple[list[Window], list[Window], list[Window]]  # for x1, x2, x4


def halos(config: ModelConfig) -> tuple[int, int, int]:
    """How far around a pixel each scale of the network looks, in LR pixels: three convolutions for the offsets, three
    in the fusion, two in each residual block, then the tail."""
    reach = (6 + 2 * blocks + (2 if index == 2 else 1) for index, blocks in enumerate(config.blocks))
    first, second, third = (math.ceil(pixels / 2**index) for index, pixels in enumerate(reach))
    return first, second, third


def bytes_per_pixel(config: ModelConfig, references: int, itemsize: int) -> tuple[float, float, float]:
    """Estimated memory of restoring at x1, x2, x4, for each LR pixel that a tile sees.

    Counts the tensors alive at the widest place, while a reference's value is attended to; what the network makes in
    bands is in `kept_bytes`.
    """

    def at(index: int) -> float:
        values = 2 * config.channels + (3 + 2 * config.attention_width) * config.reference_channels[index]
        return SAFETY * (values * itemsize + 18 * 4 + 3 * references * 4) * 4.0**index

    return at(0), at(1), at(2)


def kept_bytes(
    config: ModelConfig, lr_size: Sequence[int], reference_sizes: Sequence[Sequence[int]], itemsize: int
) -> float:
    """Estimated memory besides the tiles: what is kept of the references, and the most that comes and goes meanwhile.

    Sizes are (height, width) in pixels. The VGG's part is that of one strip; the network's, the features between two
    scales as a whole.
    """
    pixels = [math.prod(size) for size in reference_sizes]
    low = math.prod(lr_size)
    largest = max(pixels, default=0)
    kept = sum(pixels) * (48 * itemsize + 3 * 4) + len(pixels) * low * 18 * 4
    # Matching features of one reference and of the input, each with the matcher's copy of it.
    strip = min(max(largest, 16 * low), STRIP_PIXELS + STRIP_PIXELS // 4)
    matching = (2 * 16 * largest + 2 * 256 * low + VGG_FLOATS * strip) * 4
    # relu1_1 as it is, divided by its scale, and in float32 for the sampling.
    sampling = 64 * largest * (itemsize * (1 + (config.feature_scale[2] != 1)) + (4 if itemsize < 4 else 0))
    between = low * (20 * config.channels * itemsize + 4 * 48 * 4)
    return SAFETY * (kept + max(matching if pixels else 0, sampling + between)) + BANDS * BAND_BYTES


def plan_tiles(config: ModelConfig, height: int, width: int, budget: float, per_pixel: Sequence[float]) -> Plan | None:
    """Tiles for every scale that each fit into `budget` bytes; None where not even the smallest ones do.

    `per_pixel` is from `bytes_per_pixel`. A scale that fits as a whole is one tile.
    """
    plans = []
    for halo, cost in zip(halos(config), per_pixel, strict=True):
        if cost * height * width <= budget:
            plans.append(_windows(height, width, max(height, width), halo))
            continue
        core = int(math.sqrt(max(budget, 0) / cost)) - 2 * halo - STEP  # a tile's beginning moves to a multiple of STEP
        if core < SMALLEST_TILE:
            return None
        plans.append(_windows(height, width, core // STEP * STEP, halo))
    return plans[0], plans[1], plans[2]


def fixed_tiles(config: ModelConfig, height: int, width: int, tile: int | None, per_pixel: Sequence[float]) -> Plan:
    """Tiles of `tile` LR pixels a side at x4, rounded up to a multiple of 4; None: one tile.

    The coarser scales take less memory for an LR pixel but see farther: their tiles are larger, in as much memory.
    """
    sides = [max(height, width)] * 3
    if tile is not None:
        reach = halos(config)
        tile = max(1, math.ceil(tile / STEP)) * STEP
        seen = [(tile + 2 * reach[2]) * math.sqrt(per_pixel[2] / cost) for cost in per_pixel]
        sides = [max(tile, int(s - 2 * halo) // STEP * STEP) for s, halo in zip(seen, reach, strict=True)]
    first, second, third = (
        _windows(height, width, side, halo) for side, halo in zip(sides, halos(config), strict=True)
    )
    return first, second, third


def _windows(height: int, width: int, side: int, halo: int) -> list[Window]:
    """Cores of at most about side x side, all of about the same size, that cover the image without overlap."""
    rows, columns = _spans(height, side), _spans(width, side)
    return [
        Window(core=(*row, *column), seen=(*_widen(row, halo, height), *_widen(column, halo, width)))
        for row, column in itertools.product(rows, columns)
    ]


def _spans(length: int, side: int) -> list[tuple[int, int]]:
    each = math.ceil(length / math.ceil(length / side) / STEP) * STEP
    return [(start, min(start + each, length)) for start in range(0, length, each)]


def _widen(span: tuple[int, int], halo: int, length: int) -> tuple[int, int]:
    return max(0, span[0] - halo) // STEP * STEP, min(length, span[1] + halo)


@torch.no_grad()
def encode_input(model: MRefSR, enlarged: Tensor, strip_pixels: int = STRIP_PIXELS) -> Tensor:
    """`model.encode_input` in strips: 1,3,4h,4w -> float32 1,256,h,w."""
    return _joined(enlarged, strip_pixels, lambda strip: {"features": model.encode_input(strip)})["features"]


@torch.no_grad()
def encode_reference(model: MRefSR, image: Tensor, strip_pixels: int = STRIP_PIXELS) -> ReferenceFeatures:
    """`model.encode_reference` in strips: 1,3,H,W with H and W multiples of 4, in [0, 1]."""

    def encode(strip: Tensor) -> dict[str, Tensor]:
        features = model.encode_reference(strip)
        return {name: getattr(features, name) for name in ("matching", "relu3_1", "relu2_1")}

    parts = _joined(image, strip_pixels, encode)
    return ReferenceFeatures(**parts, image=image)


def _joined(image: Tensor, strip_pixels: int, encode: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Tensor]:
    """`encode` on overlapping strips, the middle of each copied into place."""
    height, width = image.shape[2:]
    rows = max(OVERLAP, strip_pixels // width // STEP * STEP)
    if rows + 2 * OVERLAP >= height:
        return encode(image)
    whole: dict[str, Tensor] = {}
    for top in range(0, height, rows):
        bottom, first, last = min(top + rows, height), max(0, top - OVERLAP), min(height, top + rows + OVERLAP)
        for name, part in encode(image[:, :, first:last]).items():
            step = (last - first) // part.shape[2]
            if name not in whole:
                whole[name] = _empty_like(part, height // step, part.shape[3])
            own = part[:, :, (top - first) // step : (bottom - first) // step]
            whole[name][:, :, top // step : bottom // step] = own
    return whole


@torch.no_grad()
def restore_scale(
    model: MRefSR,
    index: int,
    x: Tensor,
    references: Sequence[MatchedReference],
    windows: Sequence[Window],
    step: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Scale `index` (0, 1, 2) of the network by the tiles of its plan; `step` is called after each of them.

    x 1,C,H,W at x1, x2, x4 of the LR. Returns the features for the next scale (after the last, the residual image), and
    each reference's attention, averaged over every LR pixel: float32 N,h,w.
    """
    height, width = x.shape[2] >> index, x.shape[3] >> index
    shares = torch.zeros(len(references), height, width, device=x.device)
    after = 2 ** min(index + 1, 2)  # scale of what comes out
    whole: Tensor | None = None
    for window in windows:
        (top, _, left, _), core = window.seen, window.core
        tiles = _of_window(model, index, references, window.seen)
        part, attention = model.network.dyn_agg_restore(index, _cut(x, window.seen, 2**index), tiles, (top, left))
        inner = (core[0] - top, core[1] - top, core[2] - left, core[3] - left)
        for number, share in enumerate(attention):
            _cut(shares[None, number : number + 1], core, 1).copy_(_cut(F.avg_pool2d(share, 2**index), inner, 1))
        if len(windows) == 1:
            whole = part
        else:
            whole = _empty_like(part, after * height, after * width) if whole is None else whole
            _cut(whole, core, after).copy_(_cut(part, inner, after))
        step()
    assert whole is not None
    return whole, shares


def _of_window(
    model: MRefSR, index: int, references: Sequence[MatchedReference], seen: Box
) -> Iterator[ScaleReference]:
    top, bottom, left, right = seen
    for reference in references:
        if index == 0:
            features = reference.features.relu3_1
        elif index == 1:
            features = reference.features.relu2_1
        else:
            # 64 channels at full size are more than all else that is kept of a reference, and one convolution of
            # three channels: making it again for a tile costs less than the tile's own work on it.
            features = model.transfer.relu1_1(reference.features.image)
        agreement = reference.agreement
        if agreement is not None:
            agreement = agreement[:, :, top:bottom, left:right]
        yield ScaleReference(features, reference.taps[:, :, top:bottom, left:right], reference.rows, agreement)


def _empty_like(part: Tensor, height: int, width: int) -> Tensor:
    size = (*part.shape[:2], height, width)
    return torch.empty(size, dtype=part.dtype, device=part.device, memory_format=torch.channels_last)


def _cut(x: Tensor, box: Box, scale: int) -> Tensor:
    top, bottom, left, right = (edge * scale for edge in box)
    return x[:, :, top:bottom, left:right]
