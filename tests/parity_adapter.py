"""The adapter that shared/parity/check.py asks for: its docstring lists the functions and their layouts.

Every function calls the package's public functions; nothing is computed here a second time.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lmr_tools import metrics
from lmr_tools.images import upscale
from lmr_tools.metrics import psnr_rgb, psnr_y
from lmr_tools.protocol import Item
from lmr_tools.testsets import plan_testset, read_items
from mrefsr.config import MODEL_PRESETS
from mrefsr.discriminator import Discriminator
from mrefsr.features import MatchingExtractor, VGGFeatures
from mrefsr.fusion import MultiReferenceFusion, ReferenceSlot
from mrefsr.losses import PerceptualLoss, adversarial_loss, critic_loss, reconstruction
from mrefsr.losses import gradient_penalty as penalty_of
from mrefsr.matching import flow_from_index, match_patches, normalize_channels, tap_flow
from mrefsr.methods.c2_matching import c2_matching
from mrefsr.methods.esrgan import RRDBNet
from mrefsr.methods.masa import MASA
from mrefsr.model import MRefSR

PARITY = Path(__file__).resolve().parents[2] / "shared" / "parity"
SCALES = {"relu3_1": 1, "relu2_1": 2, "relu1_1": 4}


@cache
def _fill() -> ModuleType:
    spec = importlib.util.spec_from_file_location("parity_fill", PARITY / "fill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def match(
    feat_in: Tensor, feat_ref: Tensor, input_stride: int, ref_stride: int, is_norm: bool, norm_input: bool
) -> tuple[Tensor, Tensor]:
    return match_patches(
        feat_in,
        feat_ref,
        input_stride=input_stride,
        ref_stride=ref_stride,
        normalize_ref=is_norm,
        normalize_input=norm_input,
    )


def pre_offset(f1: Tensor, f2: Tensor) -> dict[str, Tensor]:
    flows = []
    for of_input, of_ref in zip(normalize_channels(f1), normalize_channels(f2), strict=True):
        index, _ = match_patches(of_input, of_ref)
        flows.append(flow_from_index(index, of_ref.shape[2] - 2))
    return {name: tap_flow(torch.stack(flows), scale) for name, scale in SCALES.items()}


def extractor(image1: Tensor, image2: Tensor) -> tuple[Tensor, Tensor]:
    net = _fill().fill(MatchingExtractor()).eval()
    with torch.no_grad():
        return net(image1, image2)  # type: ignore[no-any-return]


@cache
def _transfer() -> VGGFeatures:
    return _fill().fill(VGGFeatures(), _transfer_name).eval()  # type: ignore[no-any-return]


def _transfer_name(own: str) -> str:
    """The transfer VGG's name inside the published correspondence module."""
    return "vgg." + own.replace("model.", "vgg_net.")


def vgg_ref(image: Tensor) -> dict[str, Tensor]:
    net = _transfer()
    with torch.no_grad():
        relu3_1, relu2_1 = net.transfer(image)
        return {"relu1_1": net.relu1_1(image), "relu2_1": relu2_1, "relu3_1": relu3_1}


@cache
def _model() -> MRefSR:
    model = MRefSR(MODEL_PRESETS["mrefsr"])
    for part in (model.network, model.extractor):
        _fill().fill(part)
    _fill().fill(model.transfer, _transfer_name)
    return model


def mrefsr(lq: Tensor, up: Tensor, refs: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return _model().eval()(lq, up, torch.stack(list(refs), 1))  # type: ignore[no-any-return]


def mrefsr_grads(lq: Tensor, up: Tensor, refs: Sequence[Tensor], hr: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model = _model().train()
    loss = torch.nn.functional.l1_loss(model(lq, up, torch.stack(list(refs), 1)), hr)
    names, parameters = zip(*model.network.named_parameters(), strict=True)
    return loss.detach(), dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def fusion(ref_nf: int, target: Tensor, refs: Sequence[Tensor]) -> Tensor:
    net = _fill().fill(MultiReferenceFusion(64, ref_nf)).eval()
    with torch.no_grad():
        fused, _ = net(target, [ReferenceSlot(ref, None) for ref in refs])
    return fused  # type: ignore[no-any-return]


@cache
def _c2() -> MRefSR:
    model = c2_matching()
    for part in (model.network, model.extractor):
        _fill().fill(part)
    _fill().fill(model.transfer, _transfer_name)
    return model.eval()


def c2(lq: Tensor, up: Tensor, ref: Tensor) -> Tensor:
    with torch.no_grad():
        return _c2()(lq, up, ref[:, None])  # type: ignore[no-any-return]


def masa(lq: Tensor, ref: Tensor, ref_down: Tensor) -> Tensor:
    net = _fill().fill(MASA()).eval()
    with torch.no_grad():
        return net(lq, ref, ref_down)  # type: ignore[no-any-return]


def rrdb(lq: Tensor) -> Tensor:
    net = _fill().fill(RRDBNet()).eval()
    with torch.no_grad():
        return net(lq)  # type: ignore[no-any-return]


# What the published options mean here; l1 and mse are no perceptual losses. "fro" there is one norm over the batch.
PERCEPTUAL: dict[str, dict[str, Any]] = {
    "percep_fro_official": {"layers": {"relu5_1": 1e-4}, "norm": "official"},
    "percep_l1_relu5_1": {"distance": "l1"},
    "percep_fro_normimg": {"norm": "official", "signed": True},
    "percep_fro_multi": {"layers": {"relu1_1": 0.05, "relu3_1": 0.2, "relu5_1": 0.1}, "norm": "official"},
    "style_l1": {"layers": {"relu3_1": 10.0, "relu5_1": 10.0}, "distance": "l1", "style": True},
    "percep_fro_noinputnorm": {"norm": "official", "normalize": False},
}


def loss(name: str, sr: Tensor, gt: Tensor, weight: Tensor) -> Tensor:
    if name in PERCEPTUAL:
        net = PerceptualLoss(weights=None, **PERCEPTUAL[name])
        return _fill().fill(net, _transfer_name)(sr, gt)  # type: ignore[no-any-return]
    criterion, _, weighted = name.partition("_")
    if weighted:
        return 0.5 * reconstruction(sr, gt, weight=weight, criterion=criterion)  # type: ignore[arg-type]
    return reconstruction(sr, gt, criterion=criterion)  # type: ignore[arg-type]


def _critic(train: bool) -> Discriminator:
    return _fill().fill(Discriminator()).train(train)  # type: ignore[no-any-return]


def disc(x: Tensor, train: bool) -> Tensor:
    with torch.no_grad():
        return _critic(train)(x)  # type: ignore[no-any-return]


def gan(kind: Any, score: Tensor, real: bool, is_disc: bool, weight: float) -> Tensor:
    return critic_loss(score, real=real, kind=kind) if is_disc else weight * adversarial_loss(score, kind=kind)


def gradient_penalty(sr: Tensor, gt: Tensor, alpha: Tensor, train: bool) -> tuple[Tensor, dict[str, Tensor | None]]:
    critic = _critic(train)
    value = penalty_of(critic, sr, gt, alpha=alpha, weight=10)
    names, parameters = zip(*critic.named_parameters(), strict=True)
    gradients = torch.autograd.grad(value, parameters, allow_unused=True)
    return value.detach(), dict(zip(names, gradients, strict=True))


def psnr(sr: np.ndarray, gt: np.ndarray, y: bool) -> float:
    return psnr_y(sr, gt) if y else psnr_rgb(sr, gt)


def ssim_y(sr: np.ndarray, gt: np.ndarray) -> float:
    return metrics.ssim_y(sr, gt)


def lmr_item(folder: str) -> dict[str, np.ndarray]:
    return _official_item("lmr", Path(folder))


def cufed_item(folder: str) -> dict[str, np.ndarray]:
    return _official_item("cufed5", Path(folder))


def _official_item(benchmark: str, folder: Path) -> dict[str, np.ndarray]:
    entries = plan_testset(benchmark, folder).entries
    ((_, item),) = read_items(entries, benchmark=benchmark, protocol="official")
    assert isinstance(item, Item)
    pictures = {"img_in": item.target, "img_in_lq": item.lr, "img_in_up": upscale(item.lr)}
    chw = {name: picture.transpose(2, 0, 1) for name, picture in pictures.items()}
    return chw | {"img_ref_list": np.stack([picture.transpose(2, 0, 1) for picture in item.references])}
