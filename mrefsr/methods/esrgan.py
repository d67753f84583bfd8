"""RRDBNet, the single-image network of ESRGAN (Wang et al., 2018): x4 from the LR picture alone.

Its weights are in circulation under three namings of the same tensors: `original` (2018: model.0, model.1.sub.N),
`esrgan` (RRDB_trunk.N.RDB1, trunk_conv, upconv1, HRconv; used here) and `basicsr` (body.N.rdb1, conv_body, conv_up1,
conv_hr). The published weights expect LR made with MATLAB's bicubic, not Pillow's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SCALE = 4
MAX_BLOCKS = 64  # published networks have 6 or 23; a file must not talk the program into building a million
MAX_CHANNELS = 256

_ORIGINAL = {"model.0": "conv_first", "model.3": "upconv1", "model.6": "upconv2", "model.8": "HRconv"}
_ORIGINAL["model.10"] = "conv_last"
_ORIGINAL_DENSE = re.compile(r"model\.1\.sub\.(\d+)\.RDB([123])\.conv([1-5])\.0")
_ORIGINAL_TRUNK = re.compile(r"model\.1\.sub\.\d+")  # the convolution after the last block counts as one more block
_BASICSR = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}
_BASICSR_DENSE = re.compile(r"body\.(\d+)\.rdb([123])\.conv([1-5])")
_DENSE = r"RRDB_trunk.\1.RDB\2.conv\3"


def rename(names: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Which naming a state dict uses, and {its name: name here}; a name that fits nothing is kept as it is.

    >>> rename(["body.0.rdb1.conv2.weight", "conv_hr.bias"])[1]
    {'body.0.rdb1.conv2.weight': 'RRDB_trunk.0.RDB1.conv2.weight', 'conv_hr.bias': 'HRconv.bias'}
    """
    names = list(names)
    if any(name.startswith("model.") for name in names):
        return "original", {name: _renamed(name, _ORIGINAL, _ORIGINAL_DENSE) for name in names}
    if any(name.startswith(("body.", "conv_body.")) for name in names):
        return "basicsr", {name: _renamed(name, _BASICSR, _BASICSR_DENSE) for name in names}
    return "esrgan", {name: name for name in names}


def _renamed(name: str, table: dict[str, str], dense: re.Pattern[str]) -> str:
    layer, dot, kind = name.rpartition(".")
    if dense.fullmatch(layer):
        return dense.sub(_DENSE, layer) + dot + kind
    if table is _ORIGINAL and _ORIGINAL_TRUNK.fullmatch(layer):
        return f"trunk_conv.{kind}"
    return table.get(layer, layer) + dot + kind


def config_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """RRDBNet's arguments, read from {name here: shape}; what can not be read keeps the published size.

    Sizes are capped, so that the network a hostile file describes can always be built.
    """
    features, growth, blocks = 64, 32, 23
    first, dense = shapes.get("conv_first.weight", ()), shapes.get("RRDB_trunk.0.RDB1.conv1.weight", ())
    if len(first) == 4 and 1 <= first[0] <= MAX_CHANNELS:
        features = first[0]
    if len(dense) == 4 and 1 <= dense[0] <= MAX_CHANNELS:
        growth = dense[0]
    found = {match[1] for name in shapes if (match := re.match(r"RRDB_trunk\.(0|[1-9]\d{0,3})\.", name))}
    if 1 <= len(found) <= MAX_BLOCKS:
        blocks = len(found)
    return {"features": features, "blocks": blocks, "growth": growth}


class DenseBlock(nn.Module):
    """Five convolutions, each reading all outputs before it; the last one is added at a fifth of its strength."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(features, growth, 3, padding=1)
        self.conv2 = nn.Conv2d(features + growth, growth, 3, padding=1)
        self.conv3 = nn.Conv2d(features + 2 * growth, growth, 3, padding=1)
        self.conv4 = nn.Conv2d(features + 3 * growth, growth, 3, padding=1)
        self.conv5 = nn.Conv2d(features + 4 * growth, features, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features to features of the same shape."""
        seen = x_BCHW
        for layer in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat([seen, F.leaky_relu(layer(seen), 0.2)], 1)
        return torch.add(x_BCHW, self.conv5(seen), alpha=0.2)


class RRDB(nn.Module):
    """Residual in residual: three dense blocks, added at a fifth of their strength."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.RDB1 = DenseBlock(features, growth)
        self.RDB2 = DenseBlock(features, growth)
        self.RDB3 = DenseBlock(features, growth)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Features to features of the same shape."""
        return torch.add(x_BCHW, self.RDB3(self.RDB2(self.RDB1(x_BCHW))), alpha=0.2)


class RRDBNet(nn.Module):
    """The x4 network; the defaults are the published one (702 tensors, 16.7 M parameters)."""

    def __init__(self, *, features: int = 64, blocks: int = 23, growth: int = 32) -> None:
        super().__init__()
        if not (1 <= blocks <= MAX_BLOCKS and 1 <= features <= MAX_CHANNELS and 1 <= growth <= MAX_CHANNELS):
            raise ValueError(f"RRDBNet of {blocks} blocks, {features} features, growth {growth}")
        self.conv_first = nn.Conv2d(3, features, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*(RRDB(features, growth) for _ in range(blocks)))
        self.trunk_conv = nn.Conv2d(features, features, 3, padding=1)
        self.upconv1 = nn.Conv2d(features, features, 3, padding=1)
        self.upconv2 = nn.Conv2d(features, features, 3, padding=1)
        self.HRconv = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, 3, 3, padding=1)

    def forward(self, lr_BCHW: Tensor) -> Tensor:
        """LR, RGB float B3HW in [0, 1], any size -> SR, B3(4H)(4W), not clamped."""
        x = self.conv_first(lr_BCHW)
        x = x + self.trunk_conv(self.RRDB_trunk(x))
        for layer in (self.upconv1, self.upconv2):
            x = F.leaky_relu(layer(F.interpolate(x, scale_factor=2, mode="nearest")), 0.2)
        sr: Tensor = self.conv_last(F.leaky_relu(self.HRconv(x), 0.2))
        return sr
