"""What a model is made of: `ModelConfig` and the named presets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lmr_tools.schema import LmrError

VGG_CHANNELS = (256, 128, 64)  # relu3_1, relu2_1, relu1_1 of VGG16 and VGG19 alike


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of an MRefSR network. Triples go from the coarse scale to the fine one: x1, x2, x4.

    The defaults are the published network (Zhang et al., ICCV 2023): 23.7 M parameters in 350 tensors.
    """

    channels: int = 64
    content_blocks: int = 16
    blocks: tuple[int, int, int] = (16, 16, 16)
    backbone: Literal["vgg16", "vgg19"] = "vgg19"  # transfer features relu3_1, relu2_1, relu1_1
    # Channels that the network reads from each reference; where they differ from VGG's own, a 1x1 convolution reduces.
    reference_channels: tuple[int, int, int] = VGG_CHANNELS
    # The transfer features are divided by these numbers (about their root mean square) before anything else.
    feature_scale: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset_groups: int = 8
    attention_width: int = 2  # channels of the attended value, as a multiple of the reference channels
    base: Literal["bilinear", "bicubic"] = "bilinear"  # the enlarged LR that the network's residual is added to
    # Match on references brought down and up x4, so that both sides have lost the same detail.
    blur_references: bool = False
    # Refine matches to a fraction of a pixel, and let what agrees poorly lose against a null reference.
    refine_matches: bool = False
    initialisation: Literal["normal", "kaiming"] = "normal"  # see mrefsr.parameters.initialise

    def __post_init__(self) -> None:
        choices = {
            "backbone": ("vgg16", "vgg19"),
            "base": ("bilinear", "bicubic"),
            "initialisation": ("normal", "kaiming"),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise LmrError(f"model.{name}: {getattr(self, name)!r} is none of {', '.join(allowed)}")
        for name in ("blur_references", "refine_matches"):
            if not isinstance(getattr(self, name), bool):
                raise LmrError(f"model.{name}: {getattr(self, name)!r} is neither true nor false")
        for name in ("channels", "content_blocks", "offset_groups", "attention_width"):
            _check_number(name, getattr(self, name), int)
        for name, kind in (("blocks", int), ("reference_channels", int), ("feature_scale", float)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or len(values) != 3:
                raise LmrError(f"model.{name}: {values!r} is not three numbers, one for each of x1, x2, x4")
            for value in values:
                _check_number(name, value, kind)
        if self.channels % 2:
            raise LmrError(f"model.channels: {self.channels} is odd, the last layers halve it")
        for channels in self.reference_channels:
            if channels % self.offset_groups:
                raise LmrError(
                    f"model.reference_channels: {channels} do not split into {self.offset_groups} offset groups"
                )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """The config that `dataclasses.asdict` wrote (lists count as tuples). Unknown keys are refused by name."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise LmrError(f"model.{unknown[0]}: no such key of a model configuration")
        tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**tuples)


def _check_number(name: str, value: object, kind: type) -> None:
    allowed = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, allowed) or not 0 < value < 1e6:
        raise LmrError(f"model.{name}: {value!r} is not a positive {'whole ' if kind is int else ''}number")


MODEL_PRESETS: dict[str, ModelConfig] = {
    "mrefsr": ModelConfig(),
    # Learns on one CPU core in minutes. VGG16 serves for matching and for transfer, so one weight file is enough.
    "mrefsr-tiny": ModelConfig(
        channels=16,
        content_blocks=4,
        blocks=(3, 2, 1),
        backbone="vgg16",
        reference_channels=(16, 16, 16),
        feature_scale=(3.11, 1.61, 0.53),
        offset_groups=1,
        attention_width=1,
        base="bicubic",
        blur_references=True,
        refine_matches=True,
        initialisation="kaiming",
    ),
}
