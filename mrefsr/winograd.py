"""3x3 convolution on CPUs with a quarter of the multiplications (Winograd's F(4x4, 3x3), Lavin & Gray, CVPR 2016).

Six by six input pixels and the 3x3 weights are transformed, multiplied element by element (a matrix product over the
channels for each of the 36 elements) and transformed back to 4x4 output pixels. The interpolation points 0, +-3/4,
+-3/2 and infinity keep the rounding error at that of the direct convolution; with the usual 0, +-1, +-2 it is twice
as large.

The work goes block by block of tiles, so that the values in between stay in the cache. Float32; nothing here carries
gradients: `mrefsr.convolution` does.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mrefsr.matching_cpu import LANES, ROWS
from mrefsr.winograd_cpu import P, Q, convolve, transform_tiles

BLOCK_BYTES = 1 << 20  # transformed values of one block
GRADIENT_BYTES = 32 << 20  # the same for the weight's gradient, whose product is the better the more tiles it has


@cache
def _weight_matrix() -> Tensor:
    """(36, 9): the 3x3 weights at the 6x6 points."""
    points = [0.0, P, -P, Q, -Q]
    lines = []
    for point in points:
        product = np.prod([point - other for other in points if other != point])
        lines.append([point**k / product for k in range(3)])
    line = np.array([*lines, [0.0, 0.0, 1.0]])
    return torch.from_numpy(np.kron(line, line)).float()


def _transform_weight(weight: Tensor) -> Tensor:
    """OI33 -> flat 36 x units x I x LANES: for `_row_product`, the outputs filled up with zeros to whole units."""
    outputs, inputs = weight.shape[:2]
    whole, rest = divmod(outputs, LANES)
    by_tap = weight.detach().permute(2, 3, 1, 0)
    lanes = torch.zeros(3, 3, whole + bool(rest), inputs, LANES)
    lanes[:, :, :whole].copy_(by_tap[..., : whole * LANES].view(3, 3, inputs, whole, LANES).transpose(2, 3))
    if rest:
        lanes[:, :, whole, :, :rest].copy_(by_tap[..., whole * LANES :])
    flat = lanes.view(9, -1)
    return torch.mm(_weight_matrix(), flat, out=_empty(36, flat.shape[1])).view(-1)


def _empty(*shape: int) -> Tensor:
    """Like torch.empty, float32. numpy asks for large pages, torch does not: a fresh 64 MB cost 10 ms instead of 50."""
    return torch.from_numpy(np.empty(shape, np.float32))


def conv3x3(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    slope: float = 1.0,
    block: int | None = None,
) -> Tensor:
    """leaky_relu(conv2d(x, weight, bias, padding=1) + addend, slope), float32 on the CPU.

    x BIHW and addend BOHW, best in channels-last memory; weight OI33, I and O multiples of 8. Returns BOHW,
    channels-last.
    """
    batch, depth, height, width = x.shape
    outputs = weight.shape[0]
    flat = _flat(x)
    added = np.zeros(0, np.float32) if addend is None else _flat(addend)
    biases = np.zeros(outputs, np.float32) if bias is None else bias.detach().numpy()
    transformed = _transform_weight(weight)
    y = _empty(batch, height, width, outputs)
    flat_y = y.view(-1).numpy()
    tiles = _count(x)
    if block is None:
        block = BLOCK_BYTES // (36 * 4 * (depth + outputs))
    block = max(1, block // ROWS) * ROWS

    def run(part: tuple[int, int]) -> None:
        units = -(-outputs // LANES)
        convolve(
            flat, height, width, depth, transformed.numpy(), units, biases, added, np.float32(slope), flat_y, outputs,
            block, *part,
        )  # fmt: skip

    _share(run, 0, tiles)
    # Not a view, which autograd would not let the caller change in place.
    y = y.permute(0, 3, 1, 2)
    return torch.empty(0).set_(y.untyped_storage(), 0, y.shape, y.stride())


def weight_gradient(x: Tensor, gradient: Tensor, *, block: int | None = None) -> Tensor:
    """Gradient of a loss with respect to the weight, O,I,3,3, from x BIHW and the gradient BOHW at the output."""
    inputs, outputs = x.shape[1], gradient.shape[1]
    tiles = _count(x)
    block = min(tiles, max(1, block or GRADIENT_BYTES // (36 * 4 * (inputs + outputs))))
    flat_x, flat_g = _flat(x), _flat(gradient)
    of_x, of_g = _empty(36, block, inputs), _empty(36, block, outputs)
    total = _empty(36, outputs, inputs).zero_()
    for start in range(0, tiles, block):
        end = min(start + block, tiles)

        def run(part: tuple[int, int], start: int = start) -> None:
            for flat, values, side, depth in ((flat_x, of_x, 6, inputs), (flat_g, of_g, 4, outputs)):
                window = np.zeros(side * side * depth, np.float32)
                here = values.view(-1)[(part[0] - start) * depth :].numpy()
                transform_tiles(flat, *x.shape[2:], depth, side, *part, window, here, block * depth)

        _share(run, start, end)
        total.baddbmm_(of_g[:, : end - start].transpose(1, 2), of_x[:, : end - start])
    by_tap = torch.mm(_weight_matrix().T, total.view(36, -1)).view(3, 3, outputs, inputs)
    return by_tap.permute(2, 3, 0, 1).contiguous()


def _count(x: Tensor) -> int:
    return x.shape[0] * (-(-x.shape[2] // 4)) * (-(-x.shape[3] // 4))


def _share(run: Callable[[tuple[int, int]], None], first: int, last: int) -> None:
    """`run` on first..last, cut into one part for each of torch's threads; the kernels hold no GIL."""
    step = -(-(last - first) // torch.get_num_threads())
    parts = [(start, min(start + step, last)) for start in range(first, last, step)]
    if len(parts) == 1:
        run(parts[0])
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        list(pool.map(run, parts))


def _flat(x: Tensor) -> Any:
    """BCHW as a flat array in the order BHWC; no copy when it is channels-last already."""
    return x.detach().permute(0, 2, 3, 1).contiguous().view(-1).numpy()
