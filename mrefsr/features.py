"""VGG features: conv3_1 for matching (two copies, input and reference), relu3_1 / relu2_1 / relu1_1 for transfer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lmr_tools.schema import LmrError
from lmr_tools.weight_fetch import fetch
from mrefsr.convolution import Conv

Backbone = Literal["vgg16", "vgg19"]

# VGG16 and VGG19 are the same network up to conv3_1; the number is the layer's place in torchvision's `features`.
LAYERS = {"conv1_1": (0, 3, 64), "conv1_2": (2, 64, 64), "conv2_1": (5, 64, 128), "conv2_2": (7, 128, 128),
          "conv3_1": (10, 128, 256)}  # fmt: skip
VGG_BLOCKS: dict[Backbone, tuple[int, ...]] = {"vgg16": (2, 2, 3, 3, 3), "vgg19": (2, 2, 4, 4, 4)}
VGG_WIDTHS = (64, 128, 256, 512, 512)


class VGGFeatures(nn.Module):
    """VGG up to conv3_1 on RGB images in [0, 1], B3HW, normalised inside by ImageNet's mean and deviation."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))
        self.model = nn.ModuleDict({name: Conv(cin, cout) for name, (_, cin, cout) in LAYERS.items()})

    def relu1_1(self, image: Tensor) -> Tensor:
        """B3HW -> B,64,H,W. One cheap convolution: it may be computed again rather than kept."""
        return self.model["conv1_1"]((image - self.mean) / self.std, slope=0)  # type: ignore[no-any-return]

    def _relu2_1(self, image: Tensor) -> Tensor:
        x = self.model["conv1_2"](self.relu1_1(image), slope=0)
        return self.model["conv2_1"](F.max_pool2d(x, 2), slope=0)  # type: ignore[no-any-return]

    def _conv3_1(self, relu2_1: Tensor) -> Tensor:
        x = self.model["conv2_2"](relu2_1, slope=0)
        return self.model["conv3_1"](F.max_pool2d(x, 2))  # type: ignore[no-any-return]

    def forward(self, image: Tensor) -> Tensor:
        """conv3_1 without its ReLU: B3HW -> B,256,H//4,W//4. This is what patches are matched on."""
        return self._conv3_1(self._relu2_1(image))

    def transfer(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """(relu3_1, relu2_1): B,256,H//4,W//4 and B,128,H//2,W//2."""
        relu2_1 = self._relu2_1(image)
        return F.relu_(self._conv3_1(relu2_1)), relu2_1


class MatchingExtractor(nn.Module):
    """Two VGG16 copies that learn to see through the difference in resolution: `image1` is the enlarged LR, `image2`
    a reference (C2-Matching, CVPR 2021). Names of the parts are those of the published checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.feature_extraction_image1 = VGGFeatures()
        self.feature_extraction_image2 = VGGFeatures()

    def forward(self, image1: Tensor, image2: Tensor) -> tuple[Tensor, Tensor]:
        """conv3_1 of either image by its own copy; not normalised."""
        return self.feature_extraction_image1(image1), self.feature_extraction_image2(image2)


def vgg_layers(backbone: Backbone, last: str) -> dict[str, tuple[int, int, int]]:
    """{convolution: (place in torchvision's `features`, channels in, out)} in order, up to `last`, such as conv5_1.

    Raises ValueError when the network has no layer of that name.
    """
    layers, place, inputs = {}, 0, 3
    for block, (convolutions, channels) in enumerate(zip(VGG_BLOCKS[backbone], VGG_WIDTHS), start=1):
        for number in range(1, convolutions + 1):
            name = f"conv{block}_{number}"
            layers[name] = (place, inputs, channels)
            if name == last:
                return layers
            place, inputs = place + 2, channels  # a ReLU stands between
        place += 1  # the pooling
    raise ValueError(f"{backbone} has no layer {last}")


def load_vgg_weights(
    module: nn.Module,
    backbone: Backbone,
    weights: Path | Literal["imagenet"] = "imagenet",
    *,
    layers: Mapping[str, tuple[int, int, int]] = LAYERS,
) -> None:
    """Fill `module` (a `VGGFeatures`, or with `layers` another module whose `model` holds those) from a torchvision VGG
    file. "imagenet" is torchvision's own, from its cache, else fetched as `lmr weights fetch` does.

    Raises LmrError when the file is missing and can not be fetched, or does not hold a VGG.
    """
    path = fetch(backbone) if weights == "imagenet" else Path(weights)
    try:
        # mmap: the file's 500 MB of classifier layers are never read
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise LmrError(f"{path}: no such file of {backbone} weights") from None
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, ... on a damaged file
        kind = type(error).__name__
        raise LmrError(f"{path}: not a readable weight file ({kind}); delete it and fetch it again") from error
    own, found = module.state_dict(), {}
    for layer, (index, _, _) in layers.items():
        for part in ("weight", "bias"):
            name, theirs = f"model.{layer}.{part}", f"features.{index}.{part}"
            value = state.get(theirs) if isinstance(state, dict) else None
            if not isinstance(value, Tensor) or value.shape != own[name].shape:
                shape = tuple(own[name].shape)
                raise LmrError(f"{path}: holds no {theirs} of shape {shape}, so it is not a torchvision VGG")
            found[name] = value
    module.load_state_dict(found, strict=False)


def load_imagenet_extractor(extractor: MatchingExtractor) -> None:
    """Fill both copies with ImageNet's VGG16; see `load_vgg_weights`."""
    for copy in (extractor.feature_extraction_image1, extractor.feature_extraction_image2):
        load_vgg_weights(copy, "vgg16")
