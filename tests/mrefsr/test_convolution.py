"""The fused and the Winograd convolution against torch's own in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mrefsr import winograd
from mrefsr.convolution import Conv, conv2d, first_part, second_part

SIZES = [
    (2, 16, 8, 5, 9),
    (1, 24, 216, 12, 8),
    (3, 64, 40, 1, 1),
    (1, 32, 16, 3, 22),
    (1, 40, 48, 13, 6),
    (2, 16, 512, 4, 7),
]


def tensors(batch: int, inputs: int, outputs: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, inputs, height, width, generator=generator)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator) / (9 * inputs) ** 0.5
    return (
        x,
        weight,
        torch.randn(outputs, generator=generator),
        torch.randn(batch, outputs, height, width, generator=generator),
    )


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, addend: Tensor | None, slope: float) -> Tensor:
    y = F.conv2d(x.double(), weight.double(), None if bias is None else bias.double(), padding=weight.shape[2] // 2)
    return F.leaky_relu(y if addend is None else y + addend.double(), slope)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("with_bias", "with_addend", "slope"), [(False, False, 1.0), (True, False, 0.1), (True, True, 0.0)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_winograd_is_the_convolution(
    size: tuple[int, int, int, int, int], with_bias: bool, with_addend: bool, slope: float, layout: torch.memory_format
) -> None:
    x, weight, b, a = tensors(*size)
    bias, addend = b if with_bias else None, a if with_addend else None
    got = winograd.conv3x3(x.contiguous(memory_format=layout), weight, bias, addend=addend, slope=slope)
    expected = exact(x, weight, bias, addend, slope)
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=0)


def test_winograd_rounds_like_a_plain_sum() -> None:
    """Against products added one by one in float32: a library's own convolution rounds otherwise on every machine."""
    x, weight, _, _ = tensors(1, 256, 64, 32, 32)
    expected = exact(x, weight, None, None, 1.0)
    columns, rows = F.unfold(x, 3, padding=1)[0], weight.flatten(1)
    total = torch.zeros(64, 32 * 32)
    for tap in range(len(columns)):
        total += rows[:, tap : tap + 1] * columns[tap : tap + 1]
    error = (winograd.conv3x3(x, weight, None) - expected).square().mean().sqrt()
    plain = (total.view_as(expected) - expected).square().mean().sqrt()
    assert error < 3 * plain


def test_winograd_does_not_depend_on_threads_or_blocks() -> None:
    x, weight, bias, addend = tensors(2, 16, 24, 21, 30)
    threads = torch.get_num_threads()
    results = []
    try:
        for count, block in ((1, None), (1, 6), (3, None), (2, 24)):
            torch.set_num_threads(count)
            results.append(winograd.conv3x3(x, weight, bias, addend=addend, slope=0.1, block=block))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_rows_of_a_larger_image_are_read_in_place() -> None:
    x, weight, bias, _ = tensors(1, 16, 8, 24, 10)
    x = x.contiguous(memory_format=torch.channels_last)
    part = winograd.conv3x3(x[:, :, 4:20], weight, bias)
    whole = winograd.conv3x3(x, weight, bias)
    assert torch.equal(part[:, :, 4:-4], whole[:, :, 8:16])


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("size", [(40, 40), (6, 5)])  # large enough for the Winograd kernel, and not
@pytest.mark.parametrize("slope", [1.0, 0.0, 0.1, torch.tensor([0.3])])
def test_layers_agree_with_and_without_gradients(kernel: int, size: tuple[int, int], slope: float | Tensor) -> None:
    x, _, _, addend = tensors(1, 16, 16, *size)
    conv = Conv(16, 16, kernel)
    expected = exact(x, conv.weight, conv.bias, addend, float(slope)).detach()
    torch.testing.assert_close(conv(x, addend, slope).double(), expected, atol=1e-5, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(conv(x, addend, slope).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_convolution_of_two_maps_splits(kernel: int) -> None:
    a, b = tensors(2, 16, 8, 7, 6)[0], tensors(2, 24, 8, 7, 6)[0]
    conv = Conv(40, 8, kernel)
    expected = exact(torch.cat([a, b], 1), conv.weight, conv.bias, None, 0.1)
    torch.testing.assert_close(second_part(conv, first_part(conv, a), b, 0.1).double(), expected, atol=1e-5, rtol=0)


def test_every_input_gets_its_gradient() -> None:
    """Whichever of them asks for one: the Winograd kernel has none and must not be taken then."""
    x, weight, bias, addend = tensors(1, 16, 16, 40, 40)
    slope = torch.tensor([0.3])
    given = {"x": x, "weight": weight, "bias": bias, "addend": addend, "slope": slope}
    for name, value in given.items():
        leaf = value.clone().requires_grad_()
        now = given | {name: leaf}
        y = conv2d(now["x"], now["weight"], now["bias"], addend=now["addend"], slope=now["slope"])
        (got,) = torch.autograd.grad(y.square().sum(), leaf)
        twin = value.double().requires_grad_()
        now = {k: v.double() for k, v in given.items()} | {name: twin}
        z = F.conv2d(now["x"], now["weight"], now["bias"], padding=1) + now["addend"]
        (expected,) = torch.autograd.grad(F.prelu(z, now["slope"]).square().sum(), twin)
        torch.testing.assert_close(got.double(), expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("block", [None, 1, 5])
def test_winograd_weight_gradient(size: tuple[int, int, int, int, int], block: int | None) -> None:
    x, weight, _, gradient = tensors(*size)
    twin = weight.double().requires_grad_()
    (expected,) = torch.autograd.grad((exact(x, twin, None, None, 1.0) * gradient).sum(), twin)
    got = winograd.weight_gradient(x, gradient, block=block)
    assert got.shape == weight.shape
    torch.testing.assert_close(got.double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=0)
