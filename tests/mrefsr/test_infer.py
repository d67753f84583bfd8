"""Inference on pictures: against the model itself, tiled against whole, and what it refuses."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from lmr_tools.images import downscale, resize, upscale
from lmr_tools.schema import LmrError
from mrefsr import infer, memory, tiling
from mrefsr.config import ModelConfig
from mrefsr.infer import super_resolve, super_resolve_with_shares
from mrefsr.model import MatchedReference, MRefSR
from tests.mrefsr.test_model import TINY, picture, random_model

# The published structure (groups, value width, bilinear base, references not blurred), thin and shallow.
THIN = ModelConfig(
    channels=8, content_blocks=1, blocks=(1, 1, 1), reference_channels=(32, 24, 16), offset_groups=8, attention_width=2
)
CPU = torch.device("cpu")
Image = npt.NDArray[np.uint8]


def photo(height: int, width: int, seed: int) -> Image:
    return np.asarray((picture(height, width, seed).permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


def low(height: int, width: int, seed: int = 0) -> Image:
    return downscale(photo(4 * height, 4 * width, seed))


def tensor(image: Image) -> Tensor:
    return torch.tensor(image).permute(2, 0, 1)[None] / 255


@pytest.fixture(scope="module")
def tiny() -> MRefSR:
    return random_model(TINY)


@pytest.fixture(scope="module")
def thin() -> MRefSR:
    return random_model(THIN)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_is_the_model_between_uint8_and_uint8(tiny: MRefSR, count: int) -> None:
    lr, references = low(13, 10), [photo(48, 36, n + 1) for n in range(count)]
    with torch.no_grad():
        stacked = torch.stack([tensor(r)[0] for r in references])[None] if count else torch.zeros(1, 0, 3, 12, 12)
        expected = tiny(tensor(lr), tensor(upscale(lr)), stacked)[0].permute(1, 2, 0)
    result = super_resolve_with_shares(tiny, lr, references)
    assert result.image.dtype == np.uint8
    assert result.image.shape == (52, 40, 3)
    assert result.shares.shape == (count, 13, 10)
    assert np.array_equal(result.image, (expected.clamp(0, 1) * 255).round().numpy().astype(np.uint8))
    if count:  # the rest is the null reference's, which refuses what does not agree
        assert result.shares.min() >= 0 and 0 < result.shares.sum(0).min() <= result.shares.sum(0).max() <= 1 + 1e-5


def test_shares_sum_to_one_without_a_null_reference(thin: MRefSR) -> None:
    shares = super_resolve_with_shares(thin, low(13, 10), [photo(48, 36, 1), photo(40, 52, 2)]).shares
    np.testing.assert_allclose(shares.sum(0), 1, atol=1e-5)


SIZES = [
    ((3, 3), [(1, 1)]),
    ((5, 4), [(5, 90), (12, 12)]),
    ((17, 6), [(33, 50)]),
    ((8, 8), [(13, 3), (200, 30), (31, 33)]),
]


@pytest.mark.parametrize(("size", "references"), SIZES)
def test_any_sizes_with_references_made_up_by_reflection(
    tiny: MRefSR, size: tuple[int, int], references: list[tuple[int, int]]
) -> None:
    lr, given = low(*size), [photo(*shape, n + 1) for n, shape in enumerate(references)]
    result = super_resolve(tiny, lr, given)
    assert result.shape == (4 * size[0], 4 * size[1], 3)
    grown = []
    for original in given:
        height, width = (max(12, side + -side % 4) for side in original.shape[:2])
        grow = (0, height - original.shape[0]), (0, width - original.shape[1]), (0, 0)
        grown.append(np.pad(original, grow, mode="reflect"))
    assert all(side % 4 == 0 and side >= 12 for r in grown for side in r.shape[:2])
    assert np.array_equal(result, super_resolve(tiny, lr, grown))


def test_order_of_references_does_not_matter(tiny: MRefSR) -> None:
    lr, references = low(11, 12), [photo(40 + 4 * n, 44, n + 1) for n in range(3)]
    first = super_resolve_with_shares(tiny, lr, references)
    second = super_resolve_with_shares(tiny, lr, references[::-1])
    assert np.abs(first.image.astype(int) - second.image).max() <= 1
    np.testing.assert_allclose(first.shares, second.shares[::-1], atol=1e-5)


def restored(model: MRefSR, lr: Image, references: list[Image], tile: int | None) -> tuple[Tensor, Tensor]:
    """The float image (without the enlarged LR) and the sum of shares, by tiles."""
    with torch.no_grad():
        enlarged = tensor(upscale(lr))
        features = model.encode_input(enlarged)
        matched = [model.match(features, model.encode_reference(tensor(r)), enlarged) for r in references]
        per_pixel = tiling.bytes_per_pixel(model.config, len(references), 4)
        x = model.network.content_extractor(tensor(lr).contiguous(memory_format=torch.channels_last))
        shares = torch.zeros(len(references), *lr.shape[:2])
        for index, windows in enumerate(tiling.fixed_tiles(model.config, *lr.shape[:2], tile, per_pixel)):
            assert tile is None or len(windows) > 1
            x, of_scale = tiling.restore_scale(model, index, x, matched, windows)
            shares += of_scale
    return x, shares


@pytest.mark.parametrize("name", ["tiny", "thin"])
def test_tiles_equal_the_whole(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model: MRefSR = request.getfixturevalue(name)
    lr, references = low(27, 23), [photo(64, 96, 1), photo(120, 40, 2)]  # at x1 and x2 no multiples of 4
    whole, shares = restored(model, lr, references, None)
    monkeypatch.setattr(tiling, "bytes_per_pixel", lambda *_: (1.0, 1.0, 1.0))  # coarse scales in small tiles too
    tiled, shares_tiled = restored(model, lr, references, 12)
    torch.testing.assert_close(tiled, whole, atol=1e-4, rtol=0)  # a quarter of a grey level would be 1e-3
    torch.testing.assert_close(shares_tiled, shares, atol=1e-5, rtol=0)
    monkeypatch.setattr(tiling, "halos", lambda config: (0, 0, 0))
    seams, _ = restored(model, lr, references, 12)
    assert (seams - whole).abs().max() > 1e-2  # so the test would notice tiles that see too little


def test_pictures_by_tiles_differ_by_rounding_only(tiny: MRefSR) -> None:
    lr, references = low(37, 42), [photo(90, 130, 1)]
    whole = super_resolve(tiny, lr, references, tile=None).astype(int)
    for tile in (9, 20):
        difference = np.abs(super_resolve(tiny, lr, references, tile=tile) - whole)
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize(
    ("height", "width", "side", "halo"), [(46, 39, 12, 7), (3, 3, 4, 40), (64, 65, 16, 0), (50, 9, 8, 3)]
)
def test_tiles_cover_the_image_once(height: int, width: int, side: int, halo: int) -> None:
    covered = np.zeros((height, width), int)
    for window in tiling._windows(height, width, side, halo):
        top, bottom, left, right = window.core
        assert 0 < bottom - top <= side
        assert 0 < right - left <= side
        covered[top:bottom, left:right] += 1
        assert window.seen[0] % 4 == window.seen[2] % 4 == 0
        assert window.seen[0] <= max(0, top - halo)
        assert window.seen[1] == min(height, bottom + halo)
        assert window.seen[2] <= max(0, left - halo)
        assert window.seen[3] == min(width, right + halo)
    assert (covered == 1).all()


@pytest.mark.parametrize("name", ["tiny", "thin"])
def test_features_by_strips_equal_the_whole(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model: MRefSR = request.getfixturevalue(name)
    image = tensor(photo(204, 40, 3))
    whole, of_input = model.encode_reference(image), model.encode_input(image)
    strips = []
    plain = model.encode_reference
    monkeypatch.setattr(model, "encode_reference", lambda strip: strips.append(strip.shape[2]) or plain(strip))
    by_strips = tiling.encode_reference(model, image, strip_pixels=40 * 36)
    assert len(strips) == 6
    assert max(strips) == 36 + 2 * tiling.OVERLAP
    for part in ("matching", "relu3_1", "relu2_1"):
        torch.testing.assert_close(getattr(by_strips, part), getattr(whole, part), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(tiling.encode_input(model, image, strip_pixels=40 * 36), of_input, atol=1e-5, rtol=1e-5)


def test_a_reference_is_encoded_and_matched_once_whatever_the_tiles(
    tiny: MRefSR, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    for name in ("encode_reference", "match"):
        plain = getattr(tiny, name)
        monkeypatch.setattr(tiny, name, lambda *given, name=name, plain=plain: calls.append(name) or plain(*given))
    steps: list[tuple[int, int, str]] = []
    references = [photo(40, 40, 1), photo(60, 30, 2)]
    super_resolve_with_shares(tiny, low(30, 30), references, tile=8, progress=lambda *step: steps.append(step))
    assert calls == ["encode_reference", "match"] * 2
    assert steps[-1][0] == steps[-1][1] > 10
    assert all(a[0] <= b[0] and a[1] == b[1] for a, b in itertools.pairwise(steps))


def test_auto_cuts_the_image_up_when_memory_is_short(tiny: MRefSR, monkeypatch: pytest.MonkeyPatch) -> None:
    lr, references = low(60, 52), [photo(80, 100, 1)]
    seen: list[int] = []
    plain = tiling.restore_scale

    def restore_scale(
        model: MRefSR, index: int, x: Tensor, refs: list[MatchedReference], windows: list[tiling.Window], _: object
    ) -> object:
        seen.append(len(windows))
        return plain(model, index, x, refs, windows)

    monkeypatch.setattr(tiling, "restore_scale", restore_scale)
    monkeypatch.setattr(infer, "free_memory", lambda device: 1e12)
    whole = super_resolve(tiny, lr, references)
    assert seen == [1, 1, 1]
    kept = tiling.kept_bytes(TINY, (60, 52), [(80, 100)], 4)
    tile = tiling.bytes_per_pixel(TINY, 1, 4)[2] * 40 * 40
    monkeypatch.setattr(infer, "free_memory", lambda device: (kept + tile) / infer.SHARE_OF_MEMORY)
    tiled = super_resolve(tiny, lr, references)
    assert seen[3:5] == [1, 1]
    assert seen[5] > 1
    assert np.abs(tiled.astype(int) - whole).max() <= 1
    monkeypatch.setattr(infer, "free_memory", lambda device: kept)
    with pytest.raises(LmrError, match=r"not enough memory: an LR of 52x60 and 1 references .*--max-reference-side"):
        super_resolve(tiny, lr, references)
    assert np.array_equal(super_resolve(tiny, lr, references, tile=None), whole)


def test_half_precision_stays_close(tiny: MRefSR) -> None:
    lr, references = low(9, 8), [photo(36, 32, 1)]
    whole = super_resolve(tiny, lr, references).astype(int)
    difference = np.abs(super_resolve(tiny, lr, references, dtype=torch.bfloat16, tile=4) - whole)
    assert 0 < difference.mean() < 4


def test_large_references_are_brought_down_when_told(tiny: MRefSR) -> None:
    lr, large = low(10, 10), photo(100, 60, 1)
    small = super_resolve(tiny, lr, [resize(large, 36, 60)])
    assert np.array_equal(super_resolve(tiny, lr, [large], max_reference_side=60), small)
    assert np.array_equal(super_resolve(tiny, lr, [large], max_reference_side=100), super_resolve(tiny, lr, [large]))
    assert not np.array_equal(super_resolve(tiny, lr, [large]), small)


def test_bad_input_is_told_in_one_line(tiny: MRefSR, monkeypatch: pytest.MonkeyPatch) -> None:
    good, reference = low(8, 8), photo(32, 32, 1)
    with pytest.raises(LmrError, match="LR of 9x2 pixels is smaller than one 3x3 patch; give a larger picture"):
        super_resolve(tiny, photo(2, 9, 0), [reference])
    with pytest.raises(LmrError, match=r"LR is float64 \(8, 8, 3\), not an RGB picture"):
        super_resolve(tiny, good / 255, [reference])
    with pytest.raises(LmrError, match=r"a reference is uint8 \(32, 32\), not an RGB picture"):
        super_resolve(tiny, good, [reference[:, :, 0]])
    with pytest.raises(LmrError, match="at least 12 pixels a side, not 8"):
        super_resolve(tiny, good, [reference], max_reference_side=8)
    with pytest.raises(LmrError, match="tile 0: give a side"):
        super_resolve(tiny, good, [reference], tile=0)

    def out_of_memory(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate\nand more")

    monkeypatch.setattr(tiny, "match", out_of_memory)
    with pytest.raises(LmrError, match="memory on cpu ran out: give a smaller --tile") as caught:
        super_resolve(tiny, good, [reference])
    assert "\n" not in str(caught.value)


def test_device_is_chosen_or_refused() -> None:
    assert infer.choose_device("cpu") == CPU
    assert infer.choose_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(LmrError, match="--device qpu: not usable here"):
        infer.choose_device("qpu")


@pytest.mark.parametrize(
    ("line", "place", "names"),
    [
        ("0::/job/step", "job", ("memory.max", "memory.current", "inactive_file")),
        (
            "4:cpu,memory:/job/step",
            "memory/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
    ],
)
def test_free_memory_keeps_to_the_limit_of_a_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, place: str, names: tuple[str, str, str]
) -> None:
    """Where no container hides the groups: the limit is that of a group between the process's own and the top."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "OWN_GROUPS", tmp_path / "own")
    (tmp_path / "meminfo").write_text("MemAvailable:  700 kB\n")
    (tmp_path / "own").write_text(f"9:name=systemd:/elsewhere\n{line}\n")
    (tmp_path / place / "step").mkdir(parents=True)
    limit, used, cache = names
    for folder, most in ((tmp_path / place, "500000"), (tmp_path / place / "step", "max")):
        (folder / limit).write_text(f"{most}\n")
        (folder / used).write_text("400000\n")
        (folder / "memory.stat").write_text(f"anon 5\n{cache} 100000\n")
    assert memory.free_memory(CPU) == 200000
    (tmp_path / place / limit).write_text("300000\n")
    assert memory.free_memory(CPU) == 0


def test_free_memory_keeps_to_the_containers_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "none")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\nMemAvailable:  700 kB\n")
    assert memory.free_memory(CPU) == 700 * 1024
    (tmp_path / "meminfo").write_text("MemTotal:  900 kB\n")
    assert memory.free_memory(CPU) > 1e8  # from the system's own counts
    (tmp_path / "meminfo").write_text("MemAvailable:  700 kB\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("400000\n")
    (tmp_path / "memory.stat").write_text("anon 5\ninactive_file 100000\n")
    assert memory.free_memory(CPU) == 700 * 1024
    (tmp_path / "memory.max").write_text("500000\n")
    assert memory.free_memory(CPU) == 200000
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    for name, text in (("limit_in_bytes", "90000"), ("usage_in_bytes", "80000"), ("stat", "total_inactive_file 1000")):
        (tmp_path / "memory" / f"memory.{name}").write_text(text)
    assert memory.free_memory(CPU) == 11000
