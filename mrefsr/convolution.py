"""The convolution of every layer: torch's, or on CPUs the Winograd kernel where that is faster."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Conv(nn.Conv2d):
    """A convolution that keeps height and width, with what usually follows it done in the same pass."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)

    def forward(self, x: Tensor, addend: Tensor | None = None, slope: float | Tensor = 1.0) -> Tensor:
        """leaky_relu(conv(x) + addend, slope); see `conv2d`."""
        return conv2d(x, self.weight, self.bias, addend=addend, slope=slope)


def first_part(conv: nn.Conv2d, a: Tensor) -> Tensor:
    """The part of `conv(torch.cat([a, b], 1))` that depends on `a` only, bias included; `second_part` completes it."""
    return conv2d(a, conv.weight[:, : a.shape[1]], conv.bias)


def second_part(conv: nn.Conv2d, first: Tensor, b: Tensor, slope: float = 1.0) -> Tensor:
    """leaky_relu(conv(torch.cat([a, b], 1)), slope), where `first` is `first_part(conv, a)`."""
    return conv2d(b, conv.weight[:, -b.shape[1] :], None, addend=first, slope=slope)


def conv2d(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, addend: Tensor | None = None, slope: float | Tensor = 1.0
) -> Tensor:
    """leaky_relu(conv2d(x, weight, bias) + addend, slope) with the padding that keeps height and width.

    x BIHW, weight OIkk, addend BOHW. `slope` 1 means no activation, 0 ReLU; a tensor of one element is a learned slope.
    """
    if _by_winograd(x, weight, bias, addend):
        learned = isinstance(slope, Tensor) and torch.is_grad_enabled()
        y: Tensor = _WinogradConv.apply(x, weight, bias, addend, 1.0 if learned else float(slope))
        return F.prelu(y, slope) if learned else y  # type: ignore[arg-type]
    y = F.conv2d(x, weight, bias, padding=weight.shape[2] // 2)
    if addend is not None:
        y = y.add_(addend)
    if isinstance(slope, Tensor):
        return F.prelu(y, slope)
    if slope == 0:
        return F.relu_(y)
    return y if slope == 1 else F.leaky_relu_(y, slope)


def _by_winograd(x: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    """Only in float32 on a CPU, and with enough pixels to pay for the transforms of the weights."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    outputs, inputs, kernel, _ = weight.shape
    return (
        all(tensor.dtype == torch.float32 for tensor in (x, weight, *others) if tensor is not None)
        and kernel == 3
        and min(inputs, outputs) >= 16
        and inputs % 8 == 0
        and outputs % 8 == 0
        and x.shape[0] * x.shape[2] * x.shape[3] >= 6 * max(inputs, outputs)
    )


class _WinogradConv(torch.autograd.Function):
    """leaky_relu(conv(x) + addend, slope) on a CPU, in float32. No double backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, slope: float
    ) -> Tensor:
        from mrefsr import winograd

        y = winograd.conv3x3(x, weight, bias, addend=addend, slope=slope)
        # The sign of the result is that of what went into the leaky ReLU.
        ctx.save_for_backward(x, weight, None if slope == 1 else y)
        ctx.slope = slope
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        from mrefsr import winograd

        x, weight, y = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, wants_addend, _ = ctx.needs_input_grad
        if y is not None:
            gradient = torch.where(y > 0, gradient, gradient * ctx.slope)
        d_x = winograd.conv3x3(gradient, weight.flip(2, 3).transpose(0, 1)) if wants_x else None
        d_weight = winograd.weight_gradient(x, gradient) if wants_weight else None
        d_bias = gradient.sum((0, 2, 3)) if wants_bias else None
        return d_x, d_weight, d_bias, gradient if wants_addend else None, None
