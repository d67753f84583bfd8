"""Training losses: reconstruction, perceptual, adversarial and the critic's, gradient penalty.

Every loss is a float32 scalar, under autocast too: features may come in half precision, differences, norms and means
are made in float32. The defaults are those of MRefSR's supplementary; `norm="official"` is what the published code does
where the two differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrefsr.convolution import Conv
from mrefsr.features import Backbone, load_vgg_weights, vgg_layers

Criterion = Literal["l1", "mse"]
Distance = Literal["fro", "l1"]
Norm = Literal["sample", "official"]
Adversarial = Literal["wgan", "vanilla", "lsgan", "hinge"]
CRITERIA: dict[Criterion, Callable[..., Tensor]] = {"l1": F.l1_loss, "mse": F.mse_loss}


def reconstruction(sr: Tensor, gt: Tensor, *, weight: Tensor | None = None, criterion: Criterion = "l1") -> Tensor:
    """Mean absolute ("l1") or squared ("mse") difference of B3HW images.

    With `weight` (B1HW or B3HW, >= 0) the mean is a weighted one: sum(weight * difference) / sum(weight).
    """
    difference = CRITERIA[criterion](sr.float(), gt.float(), reduction="none")
    if weight is None:
        return difference.mean()
    weight = weight.float().expand_as(difference)
    return (difference * weight).sum() / weight.sum().clamp_min(1e-12)


class PerceptualLoss(nn.Module):
    """Distance of two images in the features of a frozen ImageNet VGG.

    forward(sr, gt): B3HW, RGB in [0, 1]; gradients flow into `sr` alone, through `gt` VGG runs without them.

    backbone: as published "vgg19"; "vgg16" where only its weights are at hand.
    layers: {ReLU after which features are taken: its weight}.
    distance: "fro", the Frobenius norm of the difference, or "l1", its mean absolute value.
    norm: of "fro". "sample": one norm per image, averaged, so that the weight of the loss does not depend on the batch
        size. "official": one norm over the whole batch, as the published code has it; it grows with the root of the
        batch size.
    style: compare Gram matrices (divided by C H W) instead of features; only with "l1".
    signed: the images are in [-1, 1].
    normalize: subtract ImageNet's mean and divide by its deviation.
    weights: "imagenet", torchvision's file from its cache, else fetched; a path; None: left as initialised.

    Raises LmrError for a weight file that is missing or no VGG, ValueError for options that do not exist.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        *,
        backbone: Backbone = "vgg19",
        layers: Mapping[str, float] | None = None,
        distance: Distance = "fro",
        norm: Norm = "sample",
        style: bool = False,
        signed: bool = False,
        normalize: bool = True,
        weights: Path | Literal["imagenet"] | None = "imagenet",
    ) -> None:
        super().__init__()
        self.layers = dict(layers or {"relu5_1": 1.0})
        wrong = {"distance": (distance, ("fro", "l1")), "norm": (norm, ("sample", "official"))}
        for name, (value, allowed) in wrong.items():
            if value not in allowed:
                raise ValueError(f"{name} {value!r} is none of {', '.join(allowed)}")
        if style and distance != "l1":
            raise ValueError("the style loss compares Gram matrices by their mean difference: give distance='l1'")
        self.distance, self.norm, self.style = distance, norm, style
        self.signed, self.normalize = signed, normalize
        convolutions = vgg_layers(backbone, max(self.layers).replace("relu", "conv"))
        if missing := [name for name in self.layers if name.replace("relu", "conv") not in convolutions]:
            raise ValueError(f"{backbone} has no layer {missing[0]}")
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.model = nn.ModuleDict({name: Conv(cin, cout) for name, (_, cin, cout) in convolutions.items()})
        if weights is not None:
            load_vgg_weights(self, backbone, weights, layers=convolutions)
        self.requires_grad_(False).to(memory_format=torch.channels_last)

    def features(self, image: Tensor) -> dict[str, Tensor]:
        """{name of a ReLU in `layers`: its output}, B,C,H/2^k,W/2^k."""
        if self.signed:
            image = (image + 1) / 2
        x = (image - self.mean) / self.std if self.normalize else image
        x = x.contiguous(memory_format=torch.channels_last)
        taken, block = {}, "1"
        for name, convolution in self.model.items():
            if name[4] != block:
                x, block = F.max_pool2d(x, 2), name[4]
            x = convolution(x, slope=0)
            if (relu := name.replace("conv", "relu")) in self.layers:
                taken[relu] = x
        return taken

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """sr, gt B3HW -> the weighted sum of the layers' distances, a float32 scalar."""
        with torch.no_grad():
            wanted = self.features(gt)
        found = self.features(sr)
        parts = [weight * self._distance(found[name], wanted[name]) for name, weight in self.layers.items()]
        return torch.stack(parts).sum()

    def _distance(self, found: Tensor, wanted: Tensor) -> Tensor:
        with torch.autocast(found.device.type, enabled=False):
            found, wanted = found.float(), wanted.float()
            if self.style:
                found, wanted = _gram(found), _gram(wanted)
            difference = found - wanted
            if self.distance == "l1":
                return difference.abs().mean()
            if self.norm == "official":
                return _norm(difference[None])[0]
            return _norm(difference).mean()


def _norm(x: Tensor) -> Tensor:
    """B... -> B: the Euclidean norm of each item; its gradient at 0 is 0."""
    norm: Tensor = torch.linalg.vector_norm(x.flatten(1), dim=1)
    return norm


def _gram(features: Tensor) -> Tensor:
    """B,C,H,W -> B,C,C: inner products of channels, divided by C H W."""
    flat = features.flatten(2)
    return flat @ flat.transpose(1, 2) / (flat.shape[1] * flat.shape[2])


def adversarial_loss(scores: Tensor, *, kind: Adversarial = "wgan") -> Tensor:
    """What the generator lowers: it wants its pictures' `scores` (any shape) high. "wgan" and "hinge": -mean.

    "vanilla" reads scores as logits, "lsgan" wants them at 1; both are for a critic without a sigmoid.
    """
    scores = scores.float()
    if kind in ("wgan", "hinge"):
        return -scores.mean()
    return critic_loss(scores, real=True, kind=kind)


def critic_loss(scores: Tensor, *, real: bool, kind: Adversarial = "wgan") -> Tensor:
    """What the critic lowers, for the scores of real pictures or of restored ones; a step adds both.

    "wgan": mean(restored) - mean(real), which needs `gradient_penalty` beside it.
    """
    return _CRITIC[kind](scores.float(), real)


_CRITIC: dict[Adversarial, Callable[[Tensor, bool], Tensor]] = {
    "wgan": lambda scores, real: -scores.mean() if real else scores.mean(),
    "vanilla": lambda scores, real: F.softplus(-scores if real else scores).mean(),
    "lsgan": lambda scores, real: (scores - float(real)).square().mean(),
    "hinge": lambda scores, real: F.relu(1 - scores if real else 1 + scores).mean(),
}


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    sr: Tensor,
    gt: Tensor,
    *,
    generator: torch.Generator | None = None,
    alpha: Tensor | None = None,
    weight: float = 10.0,
) -> Tensor:
    """weight * mean of (||gradient of critic at x|| - 1)^2 over the batch, x = alpha gt + (1 - alpha) sr (WGAN-GP).

    sr, gt B3HW; `alpha` B111 in [0, 1], or drawn uniformly from `generator` (a CPU one serves every device). Gradients
    go into the critic's parameters alone. Runs in float32 whatever the autocast: a norm's second derivative does not
    survive half precision. Raises ValueError when neither or both of `generator` and `alpha` are given.
    """
    if (generator is None) == (alpha is None):
        raise ValueError("give either a generator for alpha or alpha itself")
    with torch.autocast(gt.device.type, enabled=False), torch.enable_grad():
        sr, gt = sr.detach().float(), gt.detach().float()
        if alpha is None:
            assert generator is not None
            alpha = torch.rand(len(gt), 1, 1, 1, generator=generator, device=generator.device)
        alpha = alpha.to(gt)
        x = (alpha * gt + (1 - alpha) * sr).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x).float().sum(), x, create_graph=True)
        return weight * (_norm(gradient) - 1).square().mean()
