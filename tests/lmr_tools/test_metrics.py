"""Metrics against the published code's values, independent implementations, and the limits they must have."""

import math
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from lmr_tools import metrics, weights
from lmr_tools.metrics import luma, psnr_rgb, psnr_y, ssim_y
from lmr_tools.schema import LmrError

SIZES = [(61, 47), (40, 64), (19, 19)]


def pair(height: int, width: int, noise: float = 12.0) -> tuple[np.ndarray, np.ndarray]:
    """Smooth random pictures: a target and the same with noise."""
    random = np.random.default_rng([height, width])
    small = random.integers(0, 256, (height // 4 + 2, width // 4 + 2, 3))
    target = np.repeat(np.repeat(small, 4, 0), 4, 1)[:height, :width].astype(np.float64)
    noisy = np.clip(np.rint(target + random.normal(0, noise, target.shape)), 0, 255)
    return noisy.astype(np.uint8), target.astype(np.uint8)


def tensor(plane: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(plane.astype(np.float64)).reshape(1, plane.shape[0], plane.shape[1], -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("number", range(3))
def test_published_values(shared: Path, number: int) -> None:
    published = np.load(shared / "parity" / "metrics.npz")
    sr, target = published[f"{number}_sr_rgb"], published[f"{number}_gt_rgb"]
    assert psnr_rgb(sr, target) == pytest.approx(published[f"{number}_basicsr_psnr"], abs=1e-6)
    assert psnr_y(sr, target) == pytest.approx(published[f"{number}_basicsr_psnr_y"], abs=1e-6)
    assert ssim_y(sr, target) == pytest.approx(published[f"{number}_basicsr_ssim_y"], abs=1e-6)


@pytest.mark.parametrize("border", [0, 4])
@pytest.mark.parametrize("size", SIZES)
def test_against_torchmetrics(size: tuple[int, int], border: int) -> None:
    sr, target = pair(*size)
    inside = slice(border, size[0] - border), slice(border, size[1] - border)
    for value, x, y in (
        (psnr_rgb(sr, target, border), sr[inside], target[inside]),
        (psnr_y(sr, target, border), luma(sr)[inside], luma(target)[inside]),
    ):
        oracle = peak_signal_noise_ratio(tensor(x), tensor(y), data_range=255.0, dim=(1, 2, 3))
        assert value == pytest.approx(float(oracle), abs=2e-6)  # it takes the logarithm in float32
    _, full = structural_similarity_index_measure(
        tensor(luma(sr)[inside]), tensor(luma(target)[inside]), data_range=255.0, return_full_image=True
    )
    # torchmetrics pads; only its map's inner part saw nothing but the picture.
    assert ssim_y(sr, target, border) == pytest.approx(float(full[..., 5:-5, 5:-5].mean()), abs=1e-9)


def test_ssim_against_scikit_image() -> None:
    skimage = pytest.importorskip("skimage.metrics")
    sr, target = pair(61, 47)
    _, full = skimage.structural_similarity(
        luma(sr), luma(target), data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, full=True
    )
    assert ssim_y(sr, target, border=0) == pytest.approx(full[5:-5, 5:-5].mean(), abs=1e-9)


def test_y_is_studio_range() -> None:
    colours = np.array([[[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 0, 255]]], np.uint8)
    np.testing.assert_allclose(luma(colours)[0], [16.0, 235.0, 81.481, 40.966], rtol=0, atol=1e-9)


def test_equal_pictures_and_opposite_ones() -> None:
    sr, target = pair(40, 64)
    assert psnr_rgb(target, target) == psnr_y(target, target) == math.inf
    assert ssim_y(target, target) == pytest.approx(1.0, abs=1e-12)
    black, white = np.zeros_like(target), np.full_like(target, 255)
    assert psnr_rgb(black, white) == 0.0
    assert psnr_y(black, white) == pytest.approx(20 * math.log10(255 / 219))
    assert ssim_y(black, white) < 0.2
    assert psnr_y(sr, target) == psnr_y(target, sr)


def test_the_border_is_not_seen() -> None:
    sr, target = pair(40, 64)
    spoiled = sr.copy()
    spoiled[:4], spoiled[-4:], spoiled[:, :4], spoiled[:, -4:] = 0, 255, 255, 0
    for measure in (psnr_rgb, psnr_y, ssim_y):
        assert measure(spoiled, target) == measure(sr, target)
        assert measure(spoiled, target, border=3) != measure(sr, target, border=3)


def test_pictures_that_can_not_be_compared() -> None:
    sr, target = pair(40, 64)
    with pytest.raises(LmrError, match="SR is 64x39, the target 64x40: sizes must be equal"):
        psnr_rgb(sr[:-1], target)
    with pytest.raises(LmrError, match="SR is float64"):
        psnr_y(sr / 255, target)  # type: ignore[arg-type]
    with pytest.raises(LmrError, match=r"18x18 is too small: 11 pixels a side must be left inside a border of 4"):
        ssim_y(sr[:18, :18], target[:18, :18])
    with pytest.raises(LmrError, match="border -1"):
        ssim_y(sr, target, border=-1)


def fake_backbone(folder: Path, name: str) -> Path:
    """A stand-in with the shapes of torchvision's convolutions and random values."""
    from torchvision import models

    with torch.device("meta"):
        model = getattr(models, name)(weights=None)
    random = torch.Generator().manual_seed(0)
    shapes = {key: value.shape for key, value in model.state_dict().items() if key.startswith("features.")}
    state = {key: torch.randn(shape, generator=random) / 10 for key, shape in shapes.items()}
    path = folder / "hub" / "checkpoints" / weights.get(name).file
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    return path


def test_lpips_is_that_of_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loading done here, and the range and layout of what is fed, against the package fed by hand."""
    lpips = pytest.importorskip("lpips")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    state = torch.load(fake_backbone(tmp_path, "alexnet"), weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for key, value in oracle.net.state_dict().items():
        value.copy_(state["features." + key.split(".", 1)[1]])
    sr, target = pair(61, 47)
    expected = oracle(tensor(sr).float() / 255, tensor(target).float() / 255, normalize=True).item()
    before = torch.random.get_rng_state()
    compare = metrics.lpips("alex")
    assert torch.equal(torch.random.get_rng_state(), before)
    assert compare(sr, target) == pytest.approx(expected, rel=1e-5)
    assert compare(target, target) == 0.0
    with pytest.raises(LmrError, match="too small"):
        compare(sr[:30], target[:30])


@pytest.mark.skipif(
    "LMR_REAL_WEIGHTS" not in os.environ, reason="LMR_REAL_WEIGHTS names no TORCH_HOME with VGG16, AlexNet"
)
@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_real_lpips(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lpips = pytest.importorskip("lpips")
    monkeypatch.setenv("TORCH_HOME", os.environ["LMR_REAL_WEIGHTS"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        oracle = lpips.LPIPS(net=net, verbose=False)
    sr, target = pair(96, 80)
    expected = oracle(tensor(sr).float() / 255, tensor(target).float() / 255, normalize=True).item()
    assert metrics.lpips(net)(sr, target) == pytest.approx(expected, rel=1e-5)


def test_missing_lpips_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("LMR_HOME", str(tmp_path / "lmr"))
    with pytest.raises(LmrError, match=r"vgg16-397923af\.pth is missing; run `lmr weights fetch vgg16`"):
        metrics.lpips("vgg")
    path = fake_backbone(tmp_path / "torch", "alexnet")
    torch.save({"features.0.weight": torch.zeros(1)}, path)
    with pytest.raises(LmrError, match=r"alexnet-owt-7be5be79\.pth: not the weights that LPIPS needs"):
        metrics.lpips("alex")
