"""Starting values and learning-rate groups of the restoration network."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mrefsr.config import ModelConfig
from mrefsr.fusion import TRUST, MultiReferenceFusion
from mrefsr.network import DynamicAggregation, RestorationNet

# Names as in the published optimiser, in its order: everything else, then the offset layers of x4, x1, x2.
OFFSET_GROUPS = {"offset": "large", "relu3_offset": "small", "relu2_offset": "medium"}
PUBLISHED_LR = 1e-4
PUBLISHED_OFFSET_LR = {"small": 1e-6, "medium": 1e-5, "large": 1e-4}


def parameter_groups(
    network: RestorationNet, *, lr: float = PUBLISHED_LR, offset_lr: dict[str, float] | None = None
) -> list[dict[str, object]]:
    """Optimiser groups, each {"name", "params", "lr"}: the layers that make offsets and masks learn at their own rate.

    `offset_lr` gives that rate by scale, "small" (x1), "medium" (x2), "large" (x4); None: the published ones. The tiny
    preset does best with 0.3 of `lr` on all three.
    """
    rates = PUBLISHED_OFFSET_LR if offset_lr is None else offset_lr
    groups: dict[str, list[nn.Parameter]] = {"g": [], **{name: [] for name in OFFSET_GROUPS}}
    for name, parameter in network.named_parameters():
        groups[_group(name)].append(parameter)
    return [
        {"name": name, "params": params, "lr": rates[OFFSET_GROUPS[name]] if name in OFFSET_GROUPS else lr}
        for name, params in groups.items()
    ]


def _group(parameter: str) -> str:
    if "offset" not in parameter:
        return "g"
    return next(group for group, scale in OFFSET_GROUPS.items() if f"{scale}_" in parameter)


@torch.no_grad()
def initialise(network: RestorationNet, config: ModelConfig, generator: torch.Generator) -> None:
    """Fill every parameter anew from `generator` (on the network's device), as `config.initialisation` says.

    "normal", as published: weights N(0, 0.02), biases 0, PReLU slopes 0.25, the layers that predict offsets and masks
    0; the deformable convolutions' own weights keep the uniform +-1/sqrt(fan in).
    "kaiming": He's normal for the slope 0.1; the two convolutions of a residual block times 0.5 and 0.2, the last one
    of SAFM's two masks times 0.1; those that predict offsets and masks, and the network's last one, 0: training starts
    at the enlarged LR itself.
    """
    kaiming = config.initialisation == "kaiming"
    last = f"tail_large.{len(network.dyn_agg_restore.get_submodule('tail_large')) - 1}"  # type: ignore[arg-type]
    for name, module in network.named_modules():
        if isinstance(module, MultiReferenceFusion) and module.trust is not None:
            module.trust.copy_(torch.tensor(TRUST))
        elif isinstance(module, nn.PReLU):
            module.weight.fill_(0.25)
        elif isinstance(module, DynamicAggregation):
            if kaiming:
                module.weight.normal_(0, _he(module.weight), generator=generator)
            else:
                bound = 1 / math.sqrt(module.weight[0].numel())
                module.weight.uniform_(-bound, bound, generator=generator)
            module.bias.zero_()
        elif isinstance(module, nn.Conv2d):
            assert module.bias is not None
            module.bias.zero_()
            if name.endswith("conv_offset_mask") or (kaiming and name.endswith(last)):
                module.weight.zero_()
            elif kaiming:
                module.weight.normal_(0, _kaiming_gain(name) * _he(module.weight), generator=generator)
            else:
                module.weight.normal_(0, 0.02, generator=generator)


def _he(weight: Tensor) -> float:
    return math.sqrt(2 / (1 + 0.1**2) / weight[0].numel())


def _kaiming_gain(name: str) -> float:
    if name.endswith(("spatial_attn_mul2", "spatial_attn_add2")):
        return 0.1
    if "body" in name:
        return 0.5 if name.endswith("conv1") else 0.2
    return 1.0
