"""How close a super-resolved picture is to its target: PSNR, SSIM and LPIPS, with border and Y rule stated once.

Pictures are RGB uint8 (H, W, 3) of equal size. PSNR and SSIM cut `border` pixels off every side first and compute in
float64, as the published numbers do (border 4). LPIPS sees the whole picture, in [-1, 1] as the `lpips` package wants
it (it adds ImageNet's normalisation itself); the backbone's file is found through `weights`, nothing is downloaded.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from lmr_tools import weights
from lmr_tools.schema import LmrError

if TYPE_CHECKING:
    from lmr_tools.schema import Image

Plane = npt.NDArray[np.float64]  # H, W
Compare = Callable[["Image", "Image"], float]  # (SR, target)

BORDER = 4
# BT.601, studio range: black is 16, white 235.
Y_OFFSET = 16.0
Y_WEIGHTS = (65.481, 128.553, 24.966)
SSIM_WINDOW, SSIM_SIGMA = 11, 1.5
SSIM_C1, SSIM_C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# LPIPS net: its backbone and its linear heads in the table of weights.
LPIPS_NETS = {"alex": ("alexnet", "lpips-alex"), "vgg": ("vgg16", "lpips-vgg")}
HEADS = ("lin0.", "lin1.", "lin2.", "lin3.", "lin4.")
LPIPS_SMALLEST = {"alex": 31, "vgg": 16}  # pixels a side that survive the backbone's pooling


def luma(image: Image) -> Plane:
    """Y of BT.601 in studio range, [16, 235], not rounded."""
    return Y_OFFSET + image.astype(np.float64) @ (np.array(Y_WEIGHTS) / 255)


def psnr_rgb(sr: Image, target: Image, border: int = BORDER) -> float:
    """PSNR in dB over all three channels at once; infinite for equal pictures. LmrError when sizes do not fit."""
    sr, target = _cut(sr, target, border)
    return _psnr(sr.astype(np.float64), target.astype(np.float64))


def psnr_y(sr: Image, target: Image, border: int = BORDER) -> float:
    """PSNR in dB of `luma` against a peak of 255; infinite for equal Y. LmrError when sizes do not fit."""
    sr, target = _cut(sr, target, border)
    return _psnr(luma(sr), luma(target))


def _psnr(sr: npt.NDArray[np.float64], target: npt.NDArray[np.float64]) -> float:
    error = float(np.mean((sr - target) ** 2))
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim_y(sr: Image, target: Image, border: int = BORDER) -> float:
    """Structural similarity of `luma`, at most 1: 11x11 Gaussian of sigma 1.5, K1 0.01, K2 0.03, L 255.

    Only places where the whole window lies inside the picture count. LmrError when sizes do not fit.
    """
    sr, target = _cut(sr, target, border, smallest=SSIM_WINDOW)
    x, y = luma(sr), luma(target)
    mean_x, mean_y = _smooth(x), _smooth(y)
    variances = _smooth(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = _smooth(x * y) - mean_x * mean_y
    means = (2 * mean_x * mean_y + SSIM_C1) / (mean_x**2 + mean_y**2 + SSIM_C1)
    return float(np.mean(means * (2 * covariance + SSIM_C2) / (variances + SSIM_C2)))


def _smooth(plane: Plane) -> Plane:
    distance = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    kernel = np.exp(-(distance**2) / (2 * SSIM_SIGMA**2))
    kernel /= kernel.sum()
    rim = SSIM_WINDOW // 2
    smooth: Plane = cv2.sepFilter2D(plane, -1, kernel, kernel)[rim:-rim, rim:-rim]
    return smooth


def _cut(sr: Image, target: Image, border: int, smallest: int = 1) -> tuple[Image, Image]:
    for name, picture in (("SR", sr), ("target", target)):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise LmrError(f"{name} is {picture.dtype} {picture.shape}, not an RGB picture of uint8 (H, W, 3)")
    height, width = target.shape[:2]
    if sr.shape != target.shape:
        raise LmrError(f"SR is {sr.shape[1]}x{sr.shape[0]}, the target {width}x{height}: sizes must be equal")
    if border < 0:
        raise LmrError(f"border {border}: give 0 or more pixels")
    if min(height, width) - 2 * border < smallest:
        raise LmrError(
            f"{width}x{height} is too small: {smallest} pixels a side must be left inside a border of {border}"
        )
    inside = slice(border, height - border), slice(border, width - border)
    return sr[inside], target[inside]


def lpips(net: str, device: str = "cpu") -> Compare:
    """LPIPS 0.1 (Zhang et al., 2018) with backbone `alex` or `vgg`: 0 for equal pictures, larger is worse.

    Returns a function of (SR, target). LmrError when a weight file is missing, naming it and the way out.
    """
    import torch

    backbone, heads = LPIPS_NETS[net]
    backbone_path, heads_path = weights.backbone(backbone), weights.find(weights.get(heads))
    if heads_path is None:
        raise LmrError(
            f"{heads}: {weights.destination(weights.get(heads))} is missing; pip install lpips, which ships it"
        )
    from lpips import LPIPS, ScalingLayer

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")  # the package still calls torchvision by its old arguments
        # Built without weights, which it would download, and without drawing random ones.
        metric = LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    metric.scaling_layer = ScalingLayer()  # constants, which the meta device has no room for
    _fill(metric, {_file_name(name): name for name in metric.net.state_dict(prefix="net.")}, backbone_path)
    _fill(metric, {name: name for name in metric.state_dict() if name.startswith(HEADS)}, heads_path)
    metric.to(device).eval()

    def compare(sr: Image, target: Image) -> float:
        pictures = _cut(sr, target, border=0, smallest=LPIPS_SMALLEST[net])
        tensors = [torch.tensor(p).to(device).permute(2, 0, 1)[None].float() / 127.5 - 1 for p in pictures]
        with torch.no_grad():
            return float(metric(*tensors))

    return compare


def _file_name(name: str) -> str:
    """net.slice2.5.weight is layer 5 of torchvision's `features`, whatever the slice."""
    return "features." + name.split(".", 2)[2]


def _fill(metric: Any, names: Mapping[str, str], path: Path) -> None:
    """Load {name in the file: name in the metric} from a state dict; LmrError when one is missing or misshapen."""
    import torch

    state, own = torch.load(path, map_location="cpu", weights_only=True), metric.state_dict()
    for name, to in names.items():
        if name not in state or state[name].shape != own[to].shape:
            raise LmrError(f"{path}: not the weights that LPIPS needs ({name} is missing or of another shape)")
    metric.load_state_dict({to: state[name] for name, to in names.items()}, strict=False, assign=True)
