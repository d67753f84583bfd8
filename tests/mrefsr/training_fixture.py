"""What the tests of training share: a dataset, stand-ins for pretrained weights, and a short recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lmr_tools.stream import open_samples
from mrefsr.features import vgg_layers
from mrefsr.machines import Machine
from mrefsr.recipes import TrainConfig, train_config
from mrefsr.train import Data
from mrefsr.training_state import Training, new_training

ALONE = Machine(device=torch.device("cpu"))
SHORT = {
    "steps": 4, "batch": 4, "crop": 32, "warmup": 1, "checkpoint_every": 2, "validate_every": 100, "log_every": 1,
    "validate_groups": 2, "pictures": 1,
}  # fmt: skip


def fake_weights(torch_home: Path) -> None:
    """Random tensors under the names of torchvision's VGG16 and VGG19, as far as they are read: a stand-in."""
    generator = torch.Generator().manual_seed(3)
    folder = torch_home / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    for backbone, file in (("vgg16", "vgg16-397923af.pth"), ("vgg19", "vgg19-dcbb9e9d.pth")):
        state = {}
        for place, inputs, outputs in vgg_layers(backbone, "conv3_1").values():  # type: ignore[arg-type]
            scale = (2 / (inputs * 9)) ** 0.5
            state[f"features.{place}.weight"] = torch.randn(outputs, inputs, 3, 3, generator=generator) * scale
            state[f"features.{place}.bias"] = torch.zeros(outputs)
        torch.save(state, folder / file)


def short(**overrides: Any) -> TrainConfig:
    """The tiny preset, a few steps of it."""
    return train_config("tiny", None, SHORT | overrides)


def begin(**overrides: Any) -> Training:
    """A run of `short` before its first step."""
    return new_training(short(**overrides), ALONE.device)


def data_of(dataset: Path) -> Data:
    """Its splits."""
    return Data(train=open_samples(dataset, "train"), held_out=open_samples(dataset, "val"))


def weights_of(training: Training) -> dict[str, torch.Tensor]:
    """Copies of all that learns."""
    parts = {"network": training.model.network, "averaged": training.averaged.network}
    if training.critic is not None:
        parts["critic"] = training.critic
    return {
        f"{part}.{name}": value.clone() for part, module in parts.items() for name, value in module.state_dict().items()
    }
