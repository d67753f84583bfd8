"""What a training step takes, before it is tried: parameters, and bytes of weights and of kept activations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mrefsr.config import ModelConfig
from mrefsr.losses import reconstruction
from mrefsr.model import MRefSR
from mrefsr.parameters import initialise

PROBE = 48  # side of the target that is measured, pixels; activations grow with the area
HALF = 0.6  # of fp32's activations, about, under bf16 or fp16 autocast: offsets, masks and fusion stay in fp32


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Numbers of parameters, and bytes: of weights with their gradients, Adam's moments and the averaged copy; and of
    what one sample keeps from the forward to the backward pass."""

    trained: int
    frozen: int
    weights: int
    sample: int


def footprint(config: ModelConfig, *, crop: int, references: int, averaged: bool, recompute: bool) -> Footprint:
    """Measured: a network of random weights runs forward once on a small crop on the CPU, and what it keeps is counted
    and scaled to `crop`. Buffers that live only within a layer, and matching, are not counted.
    """
    model = MRefSR(config)
    initialise(model.network, config, torch.Generator().manual_seed(0))
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    lr = torch.zeros(1, 3, PROBE // 4, PROBE // 4)
    pictures = torch.rand(1, references, 3, PROBE, PROBE, generator=torch.Generator().manual_seed(0))
    target = torch.zeros(1, 3, PROBE, PROBE)
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = reconstruction(model(lr, target, pictures, recompute=recompute), target)
    size = sum(size for place, size in kept.items() if place not in own)
    del loss
    trained = sum(parameter.numel() for parameter in model.network.parameters())
    frozen = sum(tensor.numel() for part in (model.extractor, model.transfer) for tensor in part.state_dict().values())
    copies = 5 if averaged else 4
    return Footprint(
        trained=trained,
        frozen=frozen,
        weights=4 * (copies * trained + frozen),
        sample=size * crop * crop // (PROBE * PROBE),
    )
