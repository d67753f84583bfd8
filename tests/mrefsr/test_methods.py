"""The compared networks against the published ones (parity files) and against plain loops."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmr_tools.schema import LmrError
from mrefsr.fusion import ReferenceSlot
from mrefsr.methods.c2_matching import SingleReferenceHead, c2_matching
from mrefsr.methods.esrgan import RRDBNet
from mrefsr.methods.masa import MASA, match, transfer
from tests import parity_adapter


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def image(array: npt.NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(array.astype(np.float32) / 255).permute(0, 3, 1, 2).contiguous()


@pytest.mark.parametrize(("kind", "tensors", "millions"), [("rrdb", 702, 16.7), ("masa", 210, 4.0), ("c2", 296, 8.9)])
def test_networks_have_the_published_tensors(shared: Path, kind: str, tensors: int, millions: float) -> None:
    with torch.device("meta"):
        nets: dict[str, nn.Module] = {"rrdb": RRDBNet(), "masa": MASA(), "c2": c2_matching().network}
    published = {name: shape for name, shape, _ in json.loads((shared / f"parity/keys_{kind}.json").read_text())}
    state = nets[kind].state_dict()
    assert {name: list(value.shape) for name, value in state.items()} == published
    assert len(state) == tensors
    assert sum(value.numel() for value in state.values()) / 1e6 == pytest.approx(millions, abs=0.05)


def test_rrdb_agrees_with_the_published_network(shared: Path) -> None:
    z = np.load(shared / "parity/rrdb.npz")
    np.testing.assert_allclose(parity_adapter.rrdb(image(z["lq"])), z["output"], rtol=0, atol=5e-4)


@pytest.mark.parametrize("case", ["", "big_"])
def test_masa_agrees_with_the_published_network(shared: Path, case: str) -> None:
    z = np.load(shared / "parity/masa.npz")
    inputs = (image(z[case + name]) for name in ("lq", "ref", "ref_down"))
    np.testing.assert_allclose(parity_adapter.masa(*inputs), z[case + "output"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("case", ["", "odd_"])
def test_c2_matching_agrees_with_the_published_network(shared: Path, case: str) -> None:
    z = np.load(shared / "parity/c2.npz")
    inputs = (image(z[case + name]) for name in ("lq", "up", "ref"))
    np.testing.assert_allclose(parity_adapter.c2(*inputs), z[case + "output"], rtol=0, atol=3e-5)


# MASA's matching in plain loops, float64.


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten().double(), b.flatten().double()
    return float(a @ b / (a.norm().clamp_min(1e-12) * b.norm().clamp_min(1e-12)))


def patch(feature: Tensor, y: int, x: int, dilation: int) -> Tensor:
    """3x3 patch of a C,H,W feature around (y, x); zero outside."""
    padded = F.pad(feature, (dilation,) * 4)
    return padded[:, y : y + 2 * dilation + 1 : dilation, x : x + 2 * dilation + 1 : dilation]


def best(score: dict[tuple[int, int], float]) -> tuple[int, int]:
    return max(score, key=lambda place: score[place])


def slow_match(lr: Tensor, ref: Tensor) -> Iterator[tuple[int, int, dict[tuple[int, int], float]]]:
    """For each LR pixel of C,H,W (y, x) its window's candidates: {top-left corner: similarity}."""
    height, width = lr.shape[1:]
    rows, columns = height // 8, width // 8
    h, w = height // rows, width // columns
    tall = min(2 * int(ref.shape[1] // (2 * rows) * 1.5) + 3, ref.shape[1])
    wide = min(2 * int(ref.shape[2] // (2 * columns) * 1.5) + 3, ref.shape[2])
    rim = F.pad(lr[None], (1, 1, 1, 1), mode="replicate")[0]
    for row in range(rows):
        for column in range(columns):
            block = rim[:, row * h : row * h + h + 2, column * w : column * w + w + 2]
            cy, cx = (h + 2) // 2, (w + 2) // 2
            score = {
                (y, x): sum(cosine(patch(block, cy, cx, d), patch(ref, y, x, d)) for d in (1, 2, 3))
                for y in range(ref.shape[1])
                for x in range(ref.shape[2])
            }
            centre = best(score)
            top = min(max(centre[0] - tall // 2, 0), ref.shape[1] - tall)
            left = min(max(centre[1] - wide // 2, 0), ref.shape[2] - wide)
            for y in range(h):
                for x in range(w):
                    here = block[:, y : y + 3, x : x + 3]
                    yield (
                        row * h + y,
                        column * w + x,
                        {
                            (ry, rx): cosine(here, ref[:, ry : ry + 3, rx : rx + 3])
                            for ry in range(top, top + tall - 2)
                            for rx in range(left, left + wide - 2)
                        },
                    )


@pytest.mark.parametrize(("lr_size", "ref_size"), [((16, 12), (9, 8)), ((8, 16), (12, 5)), ((10, 8), (3, 3))])
def test_masa_matching_agrees_with_plain_loops(lr_size: tuple[int, int], ref_size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(3)
    lr, ref = torch.randn(4, *lr_size, generator=generator), torch.randn(4, *ref_size, generator=generator)
    origin, weight = match(lr[None], ref[None])
    h, w = origin.shape[3:]
    for y, x, score in slow_match(lr, ref):
        place = (0, y // h, x // w, y % h, x % w)
        assert divmod(int(origin[place]), ref_size[1]) == best(score)
        assert float(weight[place]) == pytest.approx(max(score.values()), abs=1e-5)


@pytest.mark.parametrize("scale", [1, 2, 4])
def test_masa_transfer_agrees_with_plain_loops(scale: int) -> None:
    generator = torch.Generator().manual_seed(scale)
    batch, rows, columns, h, w, ref_height, ref_width = 2, 2, 1, 4, 5, 6, 7
    feature = torch.randn(batch, 3, scale * ref_height, scale * ref_width, generator=generator)
    tops = torch.randint(ref_height - 2, (batch, rows, columns, h, w), generator=generator)
    lefts = torch.randint(ref_width - 2, (batch, rows, columns, h, w), generator=generator)
    weight = torch.rand(batch, rows, columns, h, w, generator=generator)
    expected = torch.zeros(batch, 3, scale * rows * h, scale * columns * w)
    for b, row, column in np.ndindex(batch, rows, columns):
        total, count = torch.zeros(3, scale * (h + 2), scale * (w + 2)), torch.zeros(scale * (h + 2), scale * (w + 2))
        for y, x in np.ndindex(h, w):
            top, left = scale * int(tops[b, row, column, y, x]), scale * int(lefts[b, row, column, y, x])
            window = slice(scale * y, scale * (y + 3)), slice(scale * x, scale * (x + 3))
            total[:, *window] += feature[b, :, top : top + 3 * scale, left : left + 3 * scale]
            count[window] += 1
        mean = (total / count)[:, scale:-scale, scale:-scale]
        enlarged = F.interpolate(weight[b, row, column][None, None], scale_factor=scale, mode="bilinear")[0]
        y, x = scale * row * h, scale * column * w
        expected[b, :, y : y + scale * h, x : x + scale * w] = mean * enlarged
    got = transfer(feature, tops * ref_width + lefts, weight, scale=scale)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("size", [(5, 7), (8, 13), (21, 18), (12, 28)])
def test_masa_takes_any_lr_size_as_if_its_edge_were_repeated(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    net = MASA(nf=8)
    lr, ref = torch.rand(1, 3, *size), torch.rand(1, 3, 36, 28)
    down = F.avg_pool2d(ref, 4)
    sr = net(lr, ref, down)
    assert sr.shape == (1, 3, 4 * size[0], 4 * size[1])
    padded = [side if side in (8, 12) else -(-side // 8) * 8 for side in size]
    lr = F.pad(lr, (0, padded[1] - size[1], 0, padded[0] - size[0]), mode="replicate")
    assert torch.equal(sr, net(lr, ref, down)[..., : 4 * size[0], : 4 * size[1]])


def test_masa_batches_like_single_pictures() -> None:
    torch.manual_seed(0)
    net = MASA(nf=8)
    lr, ref = torch.rand(2, 3, 16, 24), torch.rand(2, 3, 64, 48)
    down = F.avg_pool2d(ref, 4)
    alone = torch.cat([net(lr[i : i + 1], ref[i : i + 1], down[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(net(lr, ref, down), alone, rtol=0, atol=1e-5)


def test_masa_refuses_references_it_can_not_use() -> None:
    net = MASA(nf=4)
    lr = torch.rand(1, 3, 8, 8)
    with pytest.raises(LmrError, match="a reference of 40x8 pixels: MASA needs 12x12 or more"):
        net(lr, torch.rand(1, 3, 8, 40), torch.rand(1, 3, 2, 10))
    with pytest.raises(ValueError, match="is not 4x its small copy"):
        net(lr, torch.rand(1, 3, 42, 40), torch.rand(1, 3, 10, 10))


def test_c2_matching_head_is_one_convolution_on_both() -> None:
    torch.manual_seed(0)
    head = SingleReferenceHead(4, 6)
    target, gathered = torch.randn(3, 4, 5, 5), torch.randn(3, 6, 5, 5)
    conv = head.get_submodule("0")
    plain = F.leaky_relu(conv(torch.cat([target, gathered], 1)), 0.1)
    fused, (attention,) = head(target, iter([ReferenceSlot(gathered, None)]))
    torch.testing.assert_close(fused, plain)
    assert torch.equal(attention, torch.ones(3, 1, 5, 5))
    # the second item of three has no reference
    rows = torch.tensor([0, 2])
    fused, (attention,) = head(target, [ReferenceSlot(gathered[rows], rows)])
    alone = F.leaky_relu(conv(torch.cat([target[1:2], torch.zeros(1, 6, 5, 5)], 1)), 0.1)
    torch.testing.assert_close(fused, torch.cat([plain[:1], alone, plain[2:]]))
    assert attention[:, 0, 0, 0].tolist() == [1, 0, 1]
    fused, attention = head(target, [])
    torch.testing.assert_close(fused[1:2], alone)
    assert attention == []
    with pytest.raises(ValueError, match="2 references: C2-Matching takes one"):
        head(target, [ReferenceSlot(gathered, None)] * 2)


def test_c2_matching_takes_references_of_other_sizes_and_none() -> None:
    torch.manual_seed(0)
    model = c2_matching().eval()  # random weights
    lr, up = torch.rand(1, 3, 8, 6), torch.rand(1, 3, 32, 24)
    for refs in (torch.rand(1, 1, 3, 48, 20), torch.rand(1, 0, 3, 32, 24)):
        sr = model(lr, up, refs)
        assert sr.shape == (1, 3, 32, 24)
        assert bool(sr.isfinite().all())


def test_rrdb_takes_any_size() -> None:
    net = RRDBNet(features=4, blocks=1, growth=2)
    for size in ((1, 1), (3, 7)):
        assert net(torch.rand(1, 3, *size)).shape == (1, 3, 4 * size[0], 4 * size[1])
