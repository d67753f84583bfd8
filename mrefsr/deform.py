"""Modulated 3x3 deformable convolution (DCNv2), with a fast way on CPUs.

The arithmetic is that of `torchvision.ops.deform_conv2d`, which does the work on every other device. Its CPU operator
builds all columns of a sample at once, a value at a time; here a block of columns is gathered channels last, multiplied
with the weight while it is in the cache, and forgotten. The backward pass gathers the columns again.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lmr_tools.schema import LmrError

TAPS = 9
COLUMN_BYTES = 2 << 20  # of one block of columns; the same for any number of threads, so that results are, too
TASKS = 8  # pieces of a block in the backward pass: groups, and where these are few, several samples at a time
INDEX_LIMIT = 2**31  # the kernels count the values of one sample in 32 bits


def deform_conv2d(
    input_BCHW: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    flow: Tensor | None = None,
    padding: int = 1,
) -> Tensor:
    """3x3 deformable convolution, stride 1, dilation 1; bilinear samples, zeros outside the input.

    Output pixel (y, x) sums over the taps (i, j) the input at (y - padding + i, x - padding + j) + offset, times mask,
    times weight. The number of offset groups G follows from the offset's channels; each takes C / G channels in turn.

    Args:
        input_BCHW: (B, C, H, W). In the channels_last memory format it is read in place and the output has that format
            too; otherwise a channels-last copy of one sample at a time is made.
        offset: (B, G * 18, Ho, Wo), (y, x) per tap (row by row) per group, in pixels. The output is on this grid, which
            may be larger or smaller than a convolution's own (H + 2 * padding - 2, W + 2 * padding - 2).
        weight: (O, C, 3, 3).
        bias: (O,).
        mask: (B, G * 9, Ho, Wo), a factor for each sample; None means 1.
        flow: (B, 9, Ho, Wo, 2), (x, y) per tap as `mrefsr.matching.tap_flow` gives it, integers or floats; added to the
            offset of every group without making a tensor of that size. It gets no gradient.
        padding: as in a convolution.

    Returns:
        (B, O, Ho, Wo) in the input's type.

    float32 and float64 are computed as they are, everything narrower in float32 and cast back: a bfloat16 position is
    off by pixels. Gradients reach input, offset, mask, weight and bias, once (no double backward). On CPUs the result
    does not depend on the number of threads as far as the kernels go; torch's matrix product may round differently.

    Raises:
        LmrError: shapes that do not fit, an empty batch or image, tensors on several devices.

    Source: Zhu et al., "Deformable ConvNets v2", CVPR 2019; borders as in `torchvision.ops.deform_conv2d`.
    """
    _check(input_BCHW, offset, weight, bias, mask, flow)
    kind = torch.float64 if input_BCHW.dtype == torch.float64 else torch.float32
    x, offset, weight = input_BCHW.to(kind), offset.to(kind), weight.to(kind)
    bias = None if bias is None else bias.to(kind)
    mask = None if mask is None else mask.to(kind)
    sample = x.shape[1] * x.shape[2] * x.shape[3]
    if x.device.type == "cpu" and kind == torch.float32 and sample < INDEX_LIMIT:
        out: Tensor = _DeformConv.apply(x, offset, mask, flow, weight, bias, padding)
    else:
        out = _by_torchvision(x, offset, mask, flow, weight, bias, padding)
    return out.to(input_BCHW.dtype)


def _check(
    x: Tensor, offset: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None, flow: Tensor | None
) -> None:
    def refuse(reason: str) -> None:
        shown = {"input": x, "offset": offset, "weight": weight, "bias": bias, "mask": mask, "flow": flow}
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in shown.items() if value is not None)
        raise LmrError(f"deform_conv2d: {reason} (got {shapes})")

    if x.dim() != 4 or offset.dim() != 4 or weight.dim() != 4:
        refuse("input, offset and weight need four dimensions")
    if x.numel() == 0 or offset.numel() == 0:
        refuse("the batch or the image is empty; give at least one sample and one pixel")
    batch, channels = x.shape[:2]
    groups, rest = divmod(offset.shape[1], 2 * TAPS)
    grid = tuple(offset.shape[2:])
    if tuple(weight.shape[1:]) != (channels, 3, 3) or weight.shape[0] == 0:
        refuse(f"the weight must be (O, {channels}, 3, 3)")
    if rest or channels % max(groups, 1):
        refuse("the offset needs 18 channels per group, and the input's channels must divide evenly among the groups")
    if offset.shape[0] != batch:
        refuse("input and offset need the same batch size")
    if mask is not None and tuple(mask.shape) != (batch, groups * TAPS, *grid):
        refuse(f"the mask must be {(batch, groups * TAPS, *grid)}")
    if flow is not None and tuple(flow.shape) != (batch, TAPS, *grid, 2):
        refuse(f"the flow must be {(batch, TAPS, *grid, 2)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        refuse(f"the bias must be ({weight.shape[0]},)")
    if any(tensor is not None and tensor.device != x.device for tensor in (offset, weight, bias, mask, flow)):
        refuse("all tensors must lie on one device")


def _by_torchvision(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    flow: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
) -> Tensor:
    """The same from torchvision's operator. It wants the grid that belongs to the input: pad whichever is smaller."""
    import torchvision.ops  # costs seconds, and CPUs seldom need it

    if flow is not None:
        per_tap = flow.to(offset.dtype).flip(-1).permute(0, 1, 4, 2, 3).flatten(1, 2)  # B, 18, Ho, Wo
        offset = offset + per_tap.repeat(1, offset.shape[1] // (2 * TAPS), 1, 1)
    height, width = offset.shape[2:]
    down, right = height - (x.shape[2] + 2 * padding - 2), width - (x.shape[3] + 2 * padding - 2)
    x = _grow(x, down, right)
    offset = _grow(offset, -down, -right)
    mask = None if mask is None else _grow(mask, -down, -right)
    out: Tensor = torchvision.ops.deform_conv2d(x, offset, weight, bias, padding=padding, mask=mask)
    return out[:, :, :height, :width]


def _grow(x: Tensor, down: int, right: int) -> Tensor:
    if down <= 0 and right <= 0:
        return x
    return torch.nn.functional.pad(x, (0, max(right, 0), 0, max(down, 0)))


class _DeformConv(torch.autograd.Function):
    """CPU, float32. Saves its inputs only."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, offset: Tensor, mask: Tensor | None, flow: Tensor | None, weight: Tensor,
        bias: Tensor | None, padding: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, offset, mask, flow, weight)
        ctx.padding = padding
        return _forward(x, offset, mask, flow, weight, bias, padding)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, offset, mask, flow, weight = ctx.saved_tensors
        wants_x, wants_offset, wants_mask, _, wants_weight, wants_bias, _ = ctx.needs_input_grad
        d_bias = gradient.sum((0, 2, 3)) if wants_bias else None
        d_x = d_offset = d_mask = d_weight = None
        if wants_x or wants_offset or wants_mask or wants_weight:
            d_x, d_offset, d_mask, d_weight = _backward(gradient, x, offset, mask, flow, weight, ctx.padding, wants_x)
        return d_x, d_offset, d_mask if wants_mask else None, None, d_weight, d_bias, None


def _forward(
    x: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    flow: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    padding: int,
) -> Tensor:
    from mrefsr import deform_cpu

    gather = deform_cpu.gather_kernel()
    (batch, groups, height, width), outputs = _sizes(offset), weight.shape[0]
    matrix = _to_matrix(weight, groups).T.contiguous()
    columns = torch.empty(_rows_per_block(len(matrix), 1, height * width), len(matrix))
    products = torch.empty(len(columns), outputs)
    addend = torch.zeros(outputs) if bias is None else bias.detach()
    buffer = torch.empty(x.shape[2] * x.shape[3], x.shape[1])
    out = torch.empty((batch, outputs, height, width), memory_format=_layout(x))
    for b in range(batch):
        features, geometry = _channels_last(x[b], buffer).numpy(), _geometry(b, offset, mask, flow)
        pixels_out = out[b].view(outputs, -1).T  # possible in both layouts
        for first, last in _spans(height * width, len(columns)):
            _share(
                functools.partial(
                    gather, features, *geometry, columns.view(-1).numpy(), *deform_cpu.scratch(),
                    *x.shape[1:], width, padding, groups, first, first + start, first + stop,
                )
                for start, stop in _spans(last - first, -(-(last - first) // torch.get_num_threads()))
            )  # fmt: skip
            # The product wants its result in rows of outputs; what is copied to another layout still is in the cache.
            pixels_out[first:last] = torch.addmm(addend, columns[: last - first], matrix, out=products[: last - first])
    return out


def _backward(
    gradient: Tensor, x: Tensor, offset: Tensor, mask: Tensor | None, flow: Tensor | None, weight: Tensor, padding: int,
    wants_x: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    from mrefsr import deform_cpu

    scatter = deform_cpu.scatter_kernel()
    batch, groups, height, width = _sizes(offset)
    matrix = _to_matrix(weight, groups)
    d_matrix = torch.zeros_like(matrix)
    d_offset = torch.empty(offset.shape)
    d_mask = torch.empty(batch, groups * TAPS, height, width)
    d_x = torch.empty_like(x, memory_format=_layout(x)) if wants_x else None
    together = min(batch, -(-TASKS // groups))
    buffer = torch.empty(together, x.shape[2] * x.shape[3], x.shape[1])
    d_buffer = torch.empty_like(buffer) if wants_x else torch.empty(together, 0)
    columns = torch.empty(together, _rows_per_block(matrix.shape[1], together, height * width), matrix.shape[1])
    for begin in range(0, batch, together):
        samples = range(begin, min(begin + together, batch))
        features = [_channels_last(x[b], rows) for b, rows in zip(samples, buffer)]
        geometry = [_geometry(b, offset, mask, flow) for b in samples]
        d_buffer.zero_()
        flat = [gradient[b].reshape(len(matrix), -1) for b in samples]  # O, pixels
        for first, last in _spans(height * width, columns.shape[1]):
            calls = []
            for n, b in enumerate(samples):
                block = torch.mm(flat[n][:, first:last].T, matrix, out=columns[n, : last - first])
                pieces = -(-torch.get_num_threads() // len(samples))
                calls += [
                    functools.partial(
                        scatter, features[n].numpy(), *geometry[n], block.view(-1).numpy(), *deform_cpu.scratch(),
                        d_buffer[n].view(-1).numpy(), d_offset[b].numpy(), d_mask[b].numpy(),
                        *x.shape[1:], width, padding, groups, first, last, *span,
                    )
                    for span in _spans(groups, -(-groups // pieces))
                ]  # fmt: skip
            _share(calls)
            for n in range(len(samples)):
                d_matrix.addmm_(flat[n][:, first:last], columns[n, : last - first])
        if d_x is not None:
            for b, rows in zip(samples, d_buffer):
                d_x[b].view(len(rows.T), -1).copy_(rows.T)
    return d_x, d_offset, d_mask, _from_matrix(d_matrix, groups)


def _sizes(offset: Tensor) -> tuple[int, int, int, int]:
    """Batch, groups, output height and width."""
    return offset.shape[0], offset.shape[1] // (2 * TAPS), offset.shape[2], offset.shape[3]


def _rows_per_block(length: int, together: int, pixels: int) -> int:
    return min(max(COLUMN_BYTES // (4 * length * together), 64), pixels)


def _spans(total: int, step: int) -> list[tuple[int, int]]:
    return [(start, min(start + step, total)) for start in range(0, total, step)]


def _layout(x: Tensor) -> torch.memory_format:
    last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _channels_last(sample: Tensor, buffer: Tensor) -> Tensor:
    """C, H, W -> (H * W * C,): a view where the sample already lies so, else copied to `buffer` (H * W, C)."""
    rows = sample.detach().permute(1, 2, 0)
    return rows.view(-1) if rows.is_contiguous() else buffer.copy_(sample.detach().flatten(1).T).view(-1)


def _geometry(b: int, offset: Tensor, mask: Tensor | None, flow: Tensor | None) -> tuple[Any, Any, Any]:
    """Offset, mask and flow of one sample for the kernels, which take any strides: what is absent has stride 0."""
    height, width = offset.shape[2:]
    factor = torch.ones(1).expand(offset.shape[1] // 2, height, width) if mask is None else mask[b].detach()
    added = torch.zeros(1).expand(TAPS, height, width, 2) if flow is None else flow[b].detach().float()
    return offset[b].detach().numpy(), factor.numpy(), added.numpy()


def _to_matrix(weight: Tensor, groups: int) -> Tensor:
    """O, C, 3, 3 -> O, C * 9 in the kernels' order of columns: group, tap, channel of the group."""
    return weight.detach().reshape(len(weight), groups, -1, TAPS).transpose(2, 3).reshape(len(weight), -1)


def _from_matrix(matrix: Tensor, groups: int) -> Tensor:
    return matrix.view(len(matrix), groups, TAPS, -1).transpose(2, 3).reshape(len(matrix), -1, 3, 3)


def _share(calls: Iterable[Callable[[], None]]) -> None:
    """Runs the calls at once, each in a thread; the kernels hold no GIL."""
    calls = list(calls)
    if len(calls) == 1 or torch.get_num_threads() == 1:
        for call in calls:
            call()
        return
    # numba's own threads would be a second OpenMP pool beside torch's. A pool does not survive a fork, hence the pid.
    list(_pool(os.getpid(), torch.get_num_threads()).map(lambda call: call(), calls))


@functools.lru_cache(maxsize=1)
def _pool(pid: int, threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="deform")
