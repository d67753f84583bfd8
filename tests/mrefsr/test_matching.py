"""Matching against a float64 brute force, against the published numbers, and against itself on every backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from lmr_tools.schema import LmrError
from mrefsr import matching, matching_cpu
from mrefsr.matching import (
    PatchSizeError,
    flow_from_index,
    match_batch,
    match_patches,
    normalize_channels,
    tap_flow,
)

CPU_BACKENDS = ["numba", "torch"]


def random_features(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


def patches(features: Tensor, stride: int = 1) -> Tensor:
    """(patches, 9 C) in float64."""
    return functional.unfold(features.double()[None], 3, stride=stride)[0].T


def brute_force(
    feat_in: Tensor, feat_ref: Tensor, *, input_stride: int = 1, ref_stride: int = 1, norm_ref: bool = True
) -> Tensor:
    """Every score before the input's norm, (input patches, reference patches), float64: the definition, written out."""
    p, q = patches(feat_in, input_stride), patches(feat_ref, ref_stride)
    return p @ q.T / ((q.norm(dim=1) + 1e-5) if norm_ref else 1)


def grid_index(rows: int, columns: int) -> Tensor:
    return torch.arange(rows * columns).view(rows, columns)


def assert_exact(index: Tensor, value: Tensor, scores: Tensor, norm_in: Tensor | None) -> None:
    """The chosen patch is as good as the best, and the value is its score."""
    divisor = 1 if norm_in is None else norm_in + 1e-5
    chosen = scores.gather(1, index.reshape(-1, 1))[:, 0] / divisor
    assert (chosen >= scores.max(1).values / divisor - 5e-6).all()
    assert (value.reshape(-1) - chosen).abs().max() <= 1e-5
    assert index.dtype == torch.int64
    assert value.dtype == torch.float32


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("shape", [(8, 3, 3, 3, 3), (5, 3, 9, 12, 3), (16, 11, 14, 8, 19), (256, 13, 10, 9, 17)])
def test_random_features_get_the_brute_force_indices(backend: str, shape: tuple[int, ...]) -> None:
    channels, h, w, h2, w2 = shape
    feat_in = normalize_channels(random_features(sum(shape), channels, h, w))
    feat_ref = normalize_channels(random_features(sum(shape) + 1, channels, h2, w2))
    index, value = match_patches(feat_in, feat_ref, backend=backend)
    scores = brute_force(feat_in, feat_ref)
    assert index.shape == value.shape == (h - 2, w - 2)
    assert torch.equal(index.reshape(-1), scores.argmax(1))
    assert_exact(index, value, scores, patches(feat_in).norm(dim=1))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    channels=st.integers(1, 12),
    sizes=st.tuples(*[st.integers(3, 21)] * 4),
    smooth=st.booleans(),
    norm_ref=st.booleans(),
    norm_input=st.booleans(),
)
def test_any_size_and_any_flags_are_exact(
    backend: str, seed: int, channels: int, sizes: tuple[int, ...], smooth: bool, norm_ref: bool, norm_input: bool
) -> None:
    features = []
    for number, (height, width) in enumerate((sizes[:2], sizes[2:])):
        made = random_features(seed + number, 1, channels, height, width)
        if smooth:  # neighbours alike, so that many candidates are close
            made = functional.avg_pool2d(functional.pad(made, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        features.append(normalize_channels(made[0]))
    index, value = match_patches(*features, normalize_ref=norm_ref, normalize_input=norm_input, backend=backend)
    scores = brute_force(*features, norm_ref=norm_ref)
    assert_exact(index, value, scores, patches(features[0]).norm(dim=1) if norm_input else None)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    strides=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    sizes=st.tuples(*[st.integers(3, 17)] * 4),
)
def test_strides_are_exact(seed: int, strides: tuple[int, int], sizes: tuple[int, ...]) -> None:
    feat_in = normalize_channels(random_features(seed, 6, *sizes[:2]))
    feat_ref = normalize_channels(random_features(seed + 1, 6, *sizes[2:]))
    index, value = match_patches(feat_in, feat_ref, input_stride=strides[0], ref_stride=strides[1])
    assert index.shape == tuple((side - 3) // strides[0] + 1 for side in sizes[:2])
    scores = brute_force(feat_in, feat_ref, input_stride=strides[0], ref_stride=strides[1])
    assert_exact(index, value, scores, patches(feat_in, strides[0]).norm(dim=1))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), tile=st.tuples(st.integers(3, 7), st.integers(3, 7)), copies=st.integers(2, 4))
def test_of_equal_patches_the_first_is_taken(backend: str, seed: int, tile: tuple[int, int], copies: int) -> None:
    """The reference repeats one tile, so every patch of it occurs several times, at other columns modulo the kernel."""
    one = normalize_channels(random_features(seed, 7, *tile))
    feat_ref = one.repeat(1, copies, copies)
    index, value = match_patches(one, feat_ref, backend=backend)
    y, x = index // (feat_ref.shape[2] - 2), index % (feat_ref.shape[2] - 2)
    assert torch.equal(y, torch.arange(tile[0] - 2)[:, None].expand_as(y))
    assert torch.equal(x, torch.arange(tile[1] - 2).expand_as(x))
    assert (value - 1).abs().max() <= 1e-5


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_zeros_and_constants_take_the_first_patch(backend: str) -> None:
    some, zeros, ones = random_features(0, 8, 9, 7), torch.zeros(8, 9, 7), torch.ones(8, 9, 7)
    for feat_in, feat_ref, expected in ((some, zeros, 0.0), (zeros, some, 0.0), (ones, ones, 1.0), (zeros, zeros, 0.0)):
        index, value = match_patches(feat_in, feat_ref, backend=backend)
        assert not index.any()
        assert (value - expected).abs().max() <= 1e-5
        assert not torch.signbit(value).any()


def test_the_number_of_threads_changes_nothing() -> None:
    feat_in, feat_ref = random_features(1, 12, 23, 30), random_features(2, 12, 19, 27)
    feat_ref[:, 10:] = feat_ref[:, 1:10]  # ties between the shares of two threads
    one = match_patches(feat_in, feat_ref, backend="numba", threads=1)
    for threads in (2, 3, 64):
        index, value = match_patches(feat_in, feat_ref, backend="numba", threads=threads)
        assert torch.equal(index, one[0])
        assert torch.equal(value, one[1])
    smallest = match_patches(feat_in[:, :3, :3], feat_ref[:, :3, :3], backend="numba", threads=2)
    assert smallest[0].tolist() == [[0]]


def test_shares_cover_every_row_offset_once() -> None:
    for height, height_ref, parts in ((3, 3, 4), (9, 3, 2), (3, 20, 3), (40, 40, 2), (125, 60, 7)):
        shares = matching_cpu._shares(height, height_ref, parts)
        assert [delta for share in shares for delta in range(*share)] == list(range(3 - height, height_ref - 2))
        assert len(shares) <= parts


def test_torch_agrees_with_numba_in_any_banding(monkeypatch: pytest.MonkeyPatch) -> None:
    feat_in = normalize_channels(random_features(3, 32, 20, 24))
    feat_ref = normalize_channels(random_features(4, 32, 26, 18))
    expected, expected_value = match_patches(feat_in, feat_ref, backend="numba")
    for block in (1, 24 * 18 * 5, 1 << 20):  # elements: one reference row at a time, five, all
        monkeypatch.setattr(matching, "TORCH_BLOCK", block)
        index, value = match_patches(feat_in, feat_ref, backend="torch")
        assert torch.equal(index, expected)
        assert (value - expected_value).abs().max() <= 1e-5
        whole = torch.from_numpy(np.random.default_rng(5).integers(-3, 4, (9, 20, 18))).float()
        tied = torch.cat((whole[:, :13], whole), 1)  # whole numbers: no rounding, so equal patches tie across bands
        assert torch.equal(match_patches(whole[:, :13], tied, backend="torch")[0], grid_index(11, 16))


def test_memory_layout_type_and_gradients_of_the_input_do_not_matter() -> None:
    feat_in, feat_ref = random_features(5, 8, 12, 11), random_features(6, 8, 9, 14)
    expected, expected_value = match_patches(feat_in, feat_ref)
    sliced = torch.zeros(8, 24, 11)
    sliced[:, ::2] = feat_in
    channels_last = feat_ref.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        index, value = match_patches(sliced[:, ::2].requires_grad_(), channels_last)
        plain = match_patches(feat_in, feat_ref, backend="torch")
    assert torch.equal(index, expected)
    assert torch.equal(value, expected_value)
    assert torch.equal(plain[0], expected)
    assert not value.requires_grad
    half_in, half_ref = feat_in.half(), feat_ref.half()
    half = match_patches(half_in, half_ref)
    assert all(torch.equal(a, b) for a, b in zip(half, match_patches(half_in.float(), half_ref.float()), strict=True))
    assert half[1].dtype == torch.float32
    double = match_patches(feat_in.double(), feat_ref.double())
    assert torch.equal(double[0], expected)
    assert double[1].dtype == torch.float32


def test_bad_arguments_are_named() -> None:
    good = torch.ones(4, 5, 6)
    with pytest.raises(PatchSizeError, match=r"input features of 6x2 \(width x height\) are smaller than a 3x3 patch"):
        match_patches(good[:, :2], good)
    with pytest.raises(PatchSizeError, match="reference features of 2x5"):
        match_patches(good, good[:, :, :2])
    assert issubclass(PatchSizeError, LmrError)
    assert issubclass(PatchSizeError, ValueError)
    with pytest.raises(ValueError, match=r"must be floating \(C, H, W\)"):
        match_patches(good[0], good)
    with pytest.raises(ValueError, match=r"must be floating \(C, H, W\)"):
        match_patches(good, good.int())
    with pytest.raises(ValueError, match="input has 3 feature channels, reference 4"):
        match_patches(good[:3], good)
    with pytest.raises(ValueError, match="meta"):
        match_patches(good, good.to("meta"))
    with pytest.raises(ValueError, match="strides must be at least 1"):
        match_patches(good, good, ref_stride=0)
    with pytest.raises(ValueError, match="'gpu' is unknown"):
        match_patches(good, good, backend="gpu")
    with pytest.raises(ValueError, match="no strides"):
        match_patches(good, good, input_stride=2, backend="numba")


def test_batch_equals_single_matches_and_skips_padding() -> None:
    feat_in = normalize_channels(random_features(7, 2, 8, 9, 10))
    same_size = normalize_channels(random_features(8, 2, 3, 8, 7, 12))
    mask = torch.tensor([[True, True, False], [True, False, True]])
    same_size[~mask] = float("nan")  # padding is not looked at
    index, value = match_batch(feat_in, same_size, mask)
    assert index.shape == value.shape == (2, 3, 7, 8)
    for b in range(2):
        for n in range(3):
            expected = match_patches(feat_in[b], same_size[b, n]) if mask[b, n] else (torch.zeros(7, 8),) * 2
            assert torch.equal(index[b, n], expected[0].long())
            assert torch.equal(value[b, n], expected[1])
    unequal = [normalize_channels(random_features(9 + n, 2, 8, 5 + n, 9 - n)) for n in range(3)]
    index, value = match_batch(feat_in, unequal)
    for n, ref in enumerate(unequal):
        expected = match_patches(feat_in[1], ref[1])
        assert torch.equal(index[1, n], expected[0])
        assert torch.equal(value[1, n], expected[1])
    assert match_batch(feat_in, same_size[:, :0])[0].shape == (2, 0, 7, 8)
    with pytest.raises(ValueError, match="mask"):
        match_batch(feat_in, same_size, mask.T)
    with pytest.raises(ValueError, match="batch size"):
        match_batch(feat_in, same_size[:1])


def test_flow_points_from_each_patch_to_its_match() -> None:
    scene = normalize_channels(random_features(20, 6, 30, 34))
    feat_in, feat_ref = scene[:, 8:20, 4:18], scene[:, 5:27, 1:33]
    index, value = match_patches(feat_in, feat_ref)
    flow = flow_from_index(index, feat_ref.shape[2] - 2)
    assert flow.dtype == torch.int32
    assert (flow == torch.tensor([3, 3], dtype=torch.int32)).all()
    assert (value - 1).abs().max() <= 1e-5
    index = torch.tensor([[[7, 0]], [[7, 0]]])
    widths = torch.tensor([5, 3])[:, None, None]
    assert flow_from_index(index, widths).tolist() == [[[[2, 1], [-1, 0]]], [[[1, 2], [-1, 0]]]]


@settings(max_examples=20, deadline=None)
@given(scale=st.sampled_from([1, 2, 4]), height=st.integers(1, 5), width=st.integers(1, 5), seed=st.integers(0, 99))
def test_tap_flow_is_the_shifted_flow(scale: int, height: int, width: int, seed: int) -> None:
    flow = torch.from_numpy(np.random.default_rng(seed).integers(-9, 10, (2, height, width, 2)))
    taps = tap_flow(flow, scale)
    assert taps.shape == (2, 9, (height + 2) * scale, (width + 2) * scale, 2)
    for tap in range(9):
        for y in range(taps.shape[2]):
            for x in range(taps.shape[3]):
                row, column = y // scale - tap // 3, x // scale - tap % 3
                known = 0 <= row < height and 0 <= column < width
                expected = flow[:, row, column] * scale if known else torch.zeros(2, 2)
                assert torch.equal(taps[:, tap, y, x], expected.long())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("shape", [(256, 40, 40, 40, 40), (256, 125, 125, 125, 125), (16, 11, 300, 8, 290)])
def test_cuda_agrees_with_the_cpu(backend: str, shape: tuple[int, ...]) -> None:
    channels, h, w, h2, w2 = shape
    feat_in = normalize_channels(random_features(30, channels, h, w))
    feat_ref = normalize_channels(random_features(31, channels, h2, w2))
    expected, expected_value = match_patches(feat_in, feat_ref, backend="numba")
    index, value = match_patches(feat_in.cuda(), feat_ref.cuda(), backend=backend)
    assert torch.equal(index.cpu(), expected)
    assert (value.cpu() - expected_value).abs().max() <= 1e-5


MATCH_CASES: dict[str, dict[str, Any]] = {
    "s24x20": {},
    "s40x40": {},
    "s17x29": {},
    "raw": {},
    "raw_nonorm": {"normalize_ref": False, "normalize_input": False},
    "raw_defaults": {"normalize_input": False},
    "refsize": {},
    "stride2": {"input_stride": 2, "ref_stride": 2},
}


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("case", MATCH_CASES)
def test_published_matches(shared: Path, case: str, backend: str) -> None:
    file = np.load(shared / "parity" / "match.npz")
    source = "raw" if case.startswith("raw") else case
    feat_in, feat_ref = (torch.from_numpy(file[f"{source}_{side}"]) for side in ("in", "ref"))
    options = MATCH_CASES[case]
    if "ref_stride" in options and backend == "numba":
        backend = "torch"
    index, value = match_patches(feat_in, feat_ref, **options, backend=backend)
    assert np.array_equal(index.numpy(), file[f"{case}_idx"])
    # Unnormalised values reach several hundred: one part in ten million there.
    assert np.abs(value.numpy() - file[f"{case}_val"]).max() <= 1e-5 * max(1, np.abs(file[f"{case}_val"]).max() / 10)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("case", "seed", "channels", "size"), [("s40x40c256", 70, 256, 40), ("s160x160c4", 80, 4, 160)]
)
def test_published_large_matches(shared: Path, case: str, seed: int, channels: int, size: int, backend: str) -> None:
    file = np.load(shared / "parity" / "match_large_ties.npz")
    feat_in = random_features(seed, channels, size, size)
    feat_ref = 0.6 * feat_in.roll((2, 3), (1, 2)) + 0.4 * random_features(seed + 1, channels, size, size)
    index, value = match_patches(normalize_channels(feat_in), normalize_channels(feat_ref), backend=backend)
    decidable = file[f"{case}_margin"] > 1e-6
    assert np.array_equal(index.numpy()[decidable], file[f"{case}_idx"][decidable])
    assert np.abs(value.numpy() - file[f"{case}_val"]).max() <= 1e-5


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_published_ties(shared: Path, backend: str) -> None:
    file = np.load(shared / "parity" / "match_large_ties.npz")
    tile = [torch.from_numpy(file[f"tie_tile_{side}"]) for side in ("in", "ref")]
    zeros = torch.zeros(8, 9, 7)
    for case, pair in {
        "tie_tile": tile,
        "tie_zero": [random_features(91, 8, 9, 7), zeros],
        "tie_zeroin": [zeros, random_features(92, 8, 9, 7)],
    }.items():
        index, _ = match_patches(pair[0], pair[1], backend=backend)
        assert np.array_equal(index.numpy(), file[f"{case}_idx"])


@pytest.mark.parametrize("case", ["s24x20", "s21x18"])
def test_published_tap_flows(shared: Path, case: str) -> None:
    file = np.load(shared / "parity" / "pre_offset.npz")
    feat_in, feat_ref = (normalize_channels(torch.from_numpy(file[f"{case}_{name}"])) for name in ("f1", "f2"))
    index, _ = match_batch(feat_in, [feat_ref])
    flow = flow_from_index(index[:, 0], feat_ref.shape[-1] - 2)
    for name, scale in (("relu3_1", 1), ("relu2_1", 2), ("relu1_1", 4)):
        assert np.array_equal(tap_flow(flow, scale).numpy(), file[f"{case}_{name}"])
