"""C2-Matching (Jiang et al., CVPR 2021): MRefSR's predecessor, x4 with one reference.

Matching, transferred features and dynamic aggregation are MRefSR's own. What differs is how the gathered features join
the content at each scale: one 3x3 convolution instead of attention and filtering. So it is an `MRefSR` with other
heads, and what takes an MRefSR (tiles, references of any size) takes it. Tensor names are the published ones.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mrefsr.config import ModelConfig
from mrefsr.convolution import Conv
from mrefsr.fusion import SLOPE, ReferenceSlot, conv_of_pair
from mrefsr.model import MRefSR
from mrefsr.network import SCALES


class SingleReferenceHead(nn.Module):
    """One convolution on [content, gathered features] of one scale; takes the place of `MultiReferenceFusion`."""

    def __init__(self, channels: int, reference_channels: int) -> None:
        super().__init__()
        self.reference_channels = reference_channels
        self.add_module("0", Conv(channels + reference_channels, channels))

    def forward(self, target: Tensor, references: Iterable[ReferenceSlot]) -> tuple[Tensor, list[Tensor]]:
        """Join `target` B,C,H,W with the one reference's features; zeros stand for a reference that is not there.

        Returns B,C,H,W and the reference's attention B,1,H,W: 1 where it is there, else 0. Raises ValueError when
        there are two references or more.
        """
        slots = list(references)
        if len(slots) > 1:
            raise ValueError(f"{len(slots)} references: C2-Matching takes one")
        gathered = target.new_zeros(len(target), self.reference_channels, *target.shape[2:])
        attention = []
        for features, rows, _ in slots:
            present = torch.ones(len(target), device=target.device)
            if rows is None:
                gathered = features
            else:
                gathered = gathered.to(features.dtype).index_copy(0, rows, features)
                present = torch.zeros_like(present).index_fill(0, rows, 1.0)
            attention.append(present.view(-1, 1, 1, 1).expand(-1, 1, *target.shape[2:]))
        return conv_of_pair(self.get_submodule("0"), target, gathered, SLOPE), attention  # type: ignore[arg-type]


def c2_matching() -> MRefSR:
    """The published network (296 tensors, 8.9 M parameters) with extractor and transfer features, not yet filled."""
    config = ModelConfig()
    model = MRefSR(config)
    for scale, reference_channels in zip(SCALES, config.reference_channels, strict=True):
        head = SingleReferenceHead(config.channels, reference_channels)
        setattr(model.network.dyn_agg_restore, f"head_{scale}", head.to(memory_format=torch.channels_last))  # type: ignore[call-overload]
    return model
