"""The oracle is `torchvision.ops.deform_conv2d`, values and gradients; what goes beyond it is checked by identities."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numba
import pytest
import torch
import torchvision.ops
from torch import Tensor
from torch.nn import functional

from lmr_tools.schema import LmrError
from mrefsr import deform, deform_cpu
from mrefsr.deform import deform_conv2d

TOLERANCE = 2e-6  # of float32 sums, relative to the largest value; wrong arithmetic is off by 1e-2 and more
Case = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # input, offset, mask, weight, bias


def make_case(
    batch: int,
    channels: int,
    outputs: int,
    groups: int,
    height: int,
    width: int,
    *,
    padding: int = 1,
    spread: float = 2,
) -> Case:
    """Offsets of all kinds: fractional, integer (on the grid and on the border), and far outside."""
    generator = torch.Generator().manual_seed(height * 1000 + width * 10 + groups)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    grid = (height + 2 * padding - 2, width + 2 * padding - 2)
    offset = normal(batch, groups * 18, *grid) * spread
    kind = torch.randint(0, 6, offset.shape, generator=generator)
    offset = torch.where(kind == 0, offset.round(), offset)
    offset = torch.where(kind == 1, offset * 1e3, offset)
    offset[:, :2].flatten()[:2] = torch.tensor([1e30, -1e30])
    mask = normal(batch, groups * 9, *grid)
    weight = normal(outputs, channels, 3, 3) * (channels * 9) ** -0.5
    return normal(batch, channels, height, width), offset, mask, weight, normal(outputs)


def results(function: object, case: Case, **options: object) -> list[Tensor]:
    """Output and the gradients of the five arguments under a fixed, uneven outward gradient."""
    leaves = [tensor.detach().clone(memory_format=torch.preserve_format).requires_grad_() for tensor in case]
    x, offset, mask, weight, bias = leaves
    out = function(x, offset, weight, bias, mask=mask, **options)  # type: ignore[operator]
    outwards = torch.sin(torch.arange(out.numel(), dtype=out.dtype)).view(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, outwards)]


def assert_close(actual: list[Tensor], expected: list[Tensor], tolerance: float = TOLERANCE) -> None:
    for name, a, e in zip(("output", "input", "offset", "mask", "weight", "bias"), actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype, name
        assert (a - e).abs().max() <= tolerance * e.abs().max(), name


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    ("batch", "channels", "outputs", "groups", "height", "width", "padding"),
    [
        (2, 16, 16, 1, 13, 17, 1),
        (1, 64, 64, 8, 21, 70, 1),  # wider than a tile
        (3, 24, 7, 2, 9, 130, 1),  # 12 channels in a group: a vector and a rest
        (2, 12, 5, 4, 5, 5, 1),  # fewer channels than a vector
        (9, 8, 3, 1, 6, 4, 1),  # more samples than go together
        (1, 6, 4, 2, 1, 1, 1),
        (1, 8, 4, 1, 4, 1, 2),
        (2, 8, 4, 1, 7, 8, 0),
    ],
)
def test_agrees_with_torchvision(
    batch: int, channels: int, outputs: int, groups: int, height: int, width: int, padding: int, channels_last: bool
) -> None:
    x, *rest = make_case(batch, channels, outputs, groups, height, width, padding=padding)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    case = (x, *rest)
    expected = results(torchvision.ops.deform_conv2d, case, padding=padding)  # type: ignore[arg-type]
    actual = results(deform_conv2d, case, padding=padding)  # type: ignore[arg-type]
    assert_close(actual, expected)
    assert expected[0].abs().max() > 0.1
    if height * width > 1:
        assert all(gradient.abs().max() > 0 for gradient in expected[1:])
    layout = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    assert actual[0].is_contiguous(memory_format=layout) and actual[1].is_contiguous(memory_format=layout)


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make_case(2, 16, 8, 2, 20, 30)
    whole = results(deform_conv2d, case)
    monkeypatch.setattr(deform, "COLUMN_BYTES", 1)  # 64 pixels at a time, across the ends of rows
    assert_close(results(deform_conv2d, case), whole, 1e-6)


def test_borders_exactly() -> None:
    """One tap on a 2x2 image of ones, moved in steps of a quarter: a tent that falls to zero one pixel outside."""
    places = torch.arange(-8, 13) / 4
    offset = torch.zeros(1, 18, 1, len(places))
    offset[0, 8, 0] = places  # y of the central tap
    offset[0, 9, 0] = -torch.arange(len(places))  # x of every output pixel back to column 0
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1
    out = deform_conv2d(torch.ones(1, 1, 2, 2), offset, weight)
    expected = (1 + places).clamp(0, 1) * (places <= 0) + (places > 0) * (2 - places).clamp(0, 1)
    torch.testing.assert_close(out[0, 0, 0], expected, atol=0, rtol=0)


def test_zero_offset_is_a_convolution() -> None:
    x, offset, _, weight, bias = make_case(2, 16, 8, 2, 11, 12)
    out = deform_conv2d(x, torch.zeros_like(offset), weight, bias)
    torch.testing.assert_close(out, functional.conv2d(x, weight, bias, padding=1), atol=1e-5, rtol=0)


def test_without_mask_and_bias() -> None:
    x, offset, mask, weight, _ = make_case(2, 16, 8, 2, 11, 12)
    leaves = [tensor.requires_grad_() for tensor in (x, offset, weight)]
    actual = torch.autograd.grad(deform_conv2d(*leaves).square().sum(), leaves)
    expected = torch.autograd.grad(torchvision.ops.deform_conv2d(*leaves, padding=1).square().sum(), leaves)
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).abs().max() <= 5e-6 * e.abs().max()
    assert torch.equal(deform_conv2d(*leaves), deform_conv2d(*leaves, mask=torch.ones_like(mask)))


@pytest.mark.parametrize("frozen", [("x",), ("x", "mask"), ("offset", "mask"), ("x", "offset", "mask", "weight")])
def test_gradients_only_where_wanted(frozen: tuple[str, ...]) -> None:
    names = ("x", "offset", "mask", "weight", "bias")
    case = make_case(2, 16, 8, 2, 11, 12)
    everything = dict(zip(names, results(deform_conv2d, case)[1:], strict=True))
    leaves = {name: value.clone().requires_grad_(name not in frozen) for name, value in zip(names, case, strict=True)}
    x, offset, mask, weight, bias = leaves.values()
    out = deform_conv2d(x, offset, weight, bias, mask=mask)
    out.backward(torch.sin(torch.arange(float(out.numel()))).view(out.shape))  # type: ignore[no-untyped-call]
    for name, leaf in leaves.items():
        if name in frozen:
            assert leaf.grad is None
        else:
            assert torch.equal(leaf.grad, everything[name]), name  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize("integers", [torch.int64, torch.int16, torch.float32])
def test_flow_is_an_added_offset(kind: torch.dtype, integers: torch.dtype) -> None:
    case = tuple(tensor.to(kind) for tensor in make_case(2, 16, 8, 2, 11, 12))
    x, offset, mask, weight, bias = case
    flow = torch.randint(-9, 10, (2, 9, 11, 12, 2), generator=torch.Generator().manual_seed(0)).to(integers)
    summed = offset.clone()
    for group in range(2):
        for tap in range(9):
            summed[:, group * 18 + 2 * tap] += flow[:, tap, :, :, 1]  # y
            summed[:, group * 18 + 2 * tap + 1] += flow[:, tap, :, :, 0]  # x
    expected = results(deform_conv2d, (x, summed, mask, weight, bias))
    assert_close(results(deform_conv2d, case, flow=flow), expected, 0)  # type: ignore[arg-type]
    assert not torch.equal(expected[0], deform_conv2d(x, offset, weight, bias, mask=mask))


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(("height", "width"), [(5, 20), (20, 5), (5, 5), (20, 21)])
def test_grid_of_another_size(kind: torch.dtype, height: int, width: int) -> None:
    """Zeros around the input change nothing, so the same grid on a padded input is the oracle."""
    _, *rest = (tensor.to(kind) for tensor in make_case(2, 16, 8, 2, 20, 21, spread=5))
    x = make_case(2, 16, 8, 2, height, width)[0].to(kind)
    padded = functional.pad(x, (0, 21 - width, 0, 20 - height))
    expected = results(torchvision.ops.deform_conv2d, (padded, *rest), padding=1)  # type: ignore[arg-type]
    expected[1] = expected[1][:, :, :height, :width]
    assert_close(results(deform_conv2d, (x, *rest)), expected)  # type: ignore[arg-type]
    cut = tuple(tensor[:, :, :4, :3] for tensor in rest[:2])
    small = deform_conv2d(x, cut[0], rest[2], rest[3], mask=cut[1])
    assert (small - expected[0][:, :, :4, :3]).abs().max() <= TOLERANCE * expected[0].abs().max()


def test_float64_gradients_numerically() -> None:
    x, offset, mask, weight, bias = (tensor.double() for tensor in make_case(1, 4, 2, 2, 3, 3))
    offset = (
        offset.clamp(-4, 4).floor() + 0.2 + 0.6 * torch.rand_like(offset, generator=torch.Generator().manual_seed(0))
    )
    leaves = [tensor.requires_grad_() for tensor in (x, offset, weight, bias, mask)]
    assert torch.autograd.gradcheck(lambda x, o, w, b, m: deform_conv2d(x, o, w, b, mask=m), leaves)


def test_float32_gradients_against_float64() -> None:
    """The kernels against the same arithmetic in float64, which torchvision does."""
    case = make_case(2, 32, 16, 4, 12, 30)
    expected = [tensor.float() for tensor in results(deform_conv2d, tuple(tensor.double() for tensor in case))]  # type: ignore[arg-type]
    # A position of 1000 pixels has lost 1e-4 of a pixel; such samples lie outside, but nearer ones lose some too.
    assert_close(results(deform_conv2d, case), expected, 2e-5)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_narrow_types_are_computed_in_float32(kind: torch.dtype) -> None:
    narrow = [tensor.to(kind) for tensor in make_case(1, 16, 8, 2, 11, 12)]
    x, offset, mask, weight, bias = (tensor.float() for tensor in narrow)
    expected = deform_conv2d(x, offset, weight, bias, mask=mask)
    x, _, mask, weight, bias = narrow
    assert torch.equal(deform_conv2d(x, offset, weight, bias, mask=mask), expected.to(kind))  # a float32 offset stays
    case = make_case(1, 16, 8, 2, 11, 12)
    gradients = results(deform_conv2d, case)
    with torch.autocast("cpu", dtype=kind):  # changes nothing, not even in the backward pass
        assert_close(results(deform_conv2d, case), gradients, 0)


def test_no_device_at_all() -> None:
    case = [tensor.to("meta") for tensor in make_case(2, 16, 8, 2, 11, 12)]
    x, offset, mask, weight, bias = case
    assert deform_conv2d(x, offset, weight, bias, mask=mask).shape == (2, 8, 11, 12)


def test_any_strides() -> None:
    case = make_case(2, 16, 8, 2, 11, 12)
    expected = results(deform_conv2d, case)
    x, offset, mask, weight, bias = case
    both = torch.cat([offset, mask], 1)
    for shape in (torch.contiguous_format, torch.channels_last):  # a part of a convolution's output, as in MRefSR
        whole = both.contiguous(memory_format=shape)
        parts = whole[:, :36], whole[:, 36:]
        strided = x.repeat_interleave(2, 3)[..., ::2]
        assert not parts[0].is_contiguous() and not strided.is_contiguous()
        out = deform_conv2d(strided, parts[0], weight.mT.contiguous().mT, bias, mask=parts[1])
        assert torch.equal(out, expected[0])


def test_threads_change_nothing() -> None:
    case = make_case(3, 32, 16, 2, 20, 40)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(deform_conv2d, case))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert_close(other, found[0], 1e-6)


def test_kernels_are_bitwise_the_same_however_they_are_shared_out() -> None:
    x, offset, mask, *_ = (tensor[0] for tensor in make_case(1, 32, 16, 4, 9, 33))
    flow = torch.zeros(9, 9, 33, 2)
    channels_last = x.permute(1, 2, 0).contiguous().view(-1).numpy()
    sizes = (32, 9, 33, 33, 1, 4)

    def run(pixels: list[tuple[int, int]], groups: list[tuple[int, int]]) -> list[Tensor]:
        columns, d_x = torch.zeros(9 * 33 * 32 * 9), torch.zeros(x.numel())
        d_offset, d_mask = torch.zeros(offset.shape), torch.zeros(mask.shape)
        shared = (channels_last, offset.numpy(), mask.numpy(), flow.numpy(), columns.numpy())
        for span in pixels:
            deform_cpu.gather_kernel()(*shared, *deform_cpu.scratch(), *sizes, 0, *span)
        gathered = columns.clone()
        for group in groups:
            gradients = (d_x.numpy(), d_offset.numpy(), d_mask.numpy())
            deform_cpu.scatter_kernel()(*shared, *deform_cpu.scratch(), *gradients, *sizes, 0, 9 * 33, *group)
        assert torch.equal(columns, gathered)  # the way back leaves the columns themselves
        return [gathered, d_x, d_offset, d_mask]

    one = run([(0, 297)], [(0, 4)])
    for a, b in zip(one, run([(150, 297), (0, 7), (7, 150)], [(3, 4), (0, 1), (1, 3)]), strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0


def test_several_callers_at_once() -> None:
    cases = [make_case(1, 16, 8, 2, 10, 10 + n) for n in range(6)]
    expected = [results(deform_conv2d, case) for case in cases]
    with ThreadPoolExecutor(3) as pool:
        for actual, wanted in zip(pool.map(lambda case: results(deform_conv2d, case), cases), expected, strict=True):
            assert_close(actual, wanted, 1e-6)


def test_not_a_number_is_seen() -> None:
    x, offset, mask, weight, bias = make_case(1, 16, 8, 2, 10, 10)
    offset[0, 5, 4, 4] = torch.nan
    out = deform_conv2d(x, offset, weight, bias, mask=mask)
    assert out[0, :, 4, 4].isnan().all() and out.isnan().sum() == 8


def test_second_derivative_is_refused() -> None:
    x, offset, mask, weight, bias = (tensor.requires_grad_() for tensor in make_case(1, 8, 4, 1, 5, 5))
    (gradient,) = torch.autograd.grad(
        deform_conv2d(x, offset, weight, bias, mask=mask).square().sum(), [x], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()  # type: ignore[no-untyped-call]


def _without_batch(case: Case) -> Case:
    x, offset, mask, weight, bias = case
    return x[:0], offset[:0], mask[:0], weight, bias


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_batch, "the batch or the image is empty"),
        (lambda c: (c[0][:, :, :0], *c[1:]), "the batch or the image is empty"),
        (lambda c: (c[0], c[1][:, :17], *c[2:]), "18 channels per group"),
        (lambda c: (c[0][:, :7], c[1], c[2], c[3][:, :7], c[4]), "divide evenly"),
        (lambda c: (c[0], c[1][:1], *c[2:]), "same batch size"),
        (lambda c: (c[0], c[1], c[2][:, :9], *c[3:]), r"the mask must be \(2, 18, 5, 5\)"),
        (lambda c: (*c[:3], c[3][..., :2], c[4]), r"the weight must be \(O, 8, 3, 3\)"),
        (lambda c: (*c[:4], c[4][:3]), r"the bias must be \(4,\)"),
        (lambda c: (c[0][0], *c[1:]), "four dimensions"),
        (lambda c: (c[0].to("meta"), *c[1:]), "one device"),
    ],
)
def test_bad_shapes_are_one_clear_line(change: object, message: str) -> None:
    x, offset, mask, weight, bias = change(make_case(2, 8, 4, 2, 5, 5))  # type: ignore[operator]
    with pytest.raises(LmrError, match=message) as caught:
        deform_conv2d(x, offset, weight, bias, mask=mask)
    assert "\n" not in str(caught.value)


def test_bad_flow() -> None:
    x, offset, mask, weight, bias = make_case(2, 8, 4, 2, 5, 5)
    with pytest.raises(LmrError, match=r"the flow must be \(2, 9, 5, 5, 2\)"):
        deform_conv2d(x, offset, weight, bias, mask=mask, flow=torch.zeros(2, 5, 5, 2))


def test_import_compiles_nothing() -> None:
    code = "import sys, mrefsr.deform; assert 'numba' not in sys.modules; import mrefsr.deform_cpu as d; "
    code += "assert not d.gather_kernel.cache_info().currsize and not d.scatter_kernel.cache_info().currsize"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_compiles_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def jit(*args: object, cache: bool = False, **options: object) -> object:
        def compile_it(function: object) -> object:
            if cache:
                raise RuntimeError("cannot cache function: no locator available")  # numba's words
            return function

        return compile_it

    monkeypatch.setattr(numba, "njit", jit)
    assert deform_cpu._compile(deform_cpu.gather, None) is deform_cpu.gather


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_works_after_a_fork() -> None:
    code = (
        "import os, torch\n"
        "from mrefsr import deform\n"
        "torch.set_num_threads(2)\n"
        "done = []\n"
        "deform._share([lambda: done.append(1), lambda: done.append(2)])\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    deform._share([lambda: done.append(3), lambda: done.append(4)])\n"
        "    os._exit(sum(done))\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 10\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=900)
