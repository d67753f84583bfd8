"""MRefSR the way the published code computes it, written plainly: what `benchmarks.inference` compares with.

References one by one for features and matching; a convolution with every reference patch for the matching; the matched
displacement of all nine taps written out for the three scales; features of all references kept, then stacked;
convolutions on concatenated tensors; torchvision's deformable convolution. Float32, tensors in the ordinary layout.
Gradients are off throughout (the published code leaves them on while it matches), so its memory is judged kindly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor

from benchmarks.matching import match_published
from mrefsr.config import ModelConfig
from mrefsr.matching import normalize_channels

SCALES = ("small", "medium", "large")
Layers = Mapping[str, Tensor]


class Timer(Protocol):
    """`with timer(part):` adds the time spent inside to that part."""

    def __call__(self, part: str) -> AbstractContextManager[None]: ...


def super_resolve(
    state: Layers,
    config: ModelConfig,
    lr: Tensor,
    enlarged: Tensor,
    references: Sequence[Tensor],
    timer: Timer,
    matches: list[Tensor],
) -> Tensor:
    """1,3,h,w; 1,3,4h,4w; references 1,3,4h,4w in [0, 1] -> 1,3,4h,4w. `state` is an `MRefSR`'s, without reductions.

    `matches` gets every reference's indices (h-2, w-2).
    """
    displacements, features = [], []
    for reference in references:
        with timer("extractor"):
            of_input = _vgg(state, "extractor.feature_extraction_image1", enlarged)["conv3_1"]
            of_reference = _vgg(state, "extractor.feature_extraction_image2", reference)["conv3_1"]
        with timer("matching"):
            index, _ = match_published(normalize_channels(of_input)[0], normalize_channels(of_reference)[0])
            displacements.append(_displacements(index))
            matches.append(index)
        with timer("transfer features"):
            maps = _vgg(state, "transfer", reference)
            features.append([F.relu(maps["conv3_1"]), maps["relu2_1"], maps["relu1_1"]])
    with timer("blocks"):
        x = F.leaky_relu(_conv(state, "network.content_extractor.conv_first", lr), 0.1)
        x = _blocks(state, "network.content_extractor.body", config.content_blocks, x)
    for level, scale in enumerate(SCALES):
        gathered = []
        for flows, maps_of in zip(displacements, features, strict=True):
            gathered.append(_gather(state, scale, x, maps_of[level], flows[level], config.offset_groups, timer))
        with timer("fusion"):
            fused = _fuse(state, f"network.dyn_agg_restore.head_{scale}", x, torch.stack(gathered))
        with timer("blocks"):
            x = _blocks(state, f"network.dyn_agg_restore.body_{scale}", config.blocks[level], fused) + x
            tail = f"network.dyn_agg_restore.tail_{scale}"
            x = _conv(state, f"{tail}.0", x)
            if level < 2:
                x = F.leaky_relu(F.pixel_shuffle(x, 2), 0.1)
            else:
                x = _conv(state, f"{tail}.2", F.leaky_relu(x, 0.1))
    return x + F.interpolate(lr, scale_factor=4, mode="bilinear", align_corners=False)


def _conv(state: Layers, name: str, x: Tensor) -> Tensor:
    weight = state[f"{name}.weight"]
    return F.conv2d(x, weight, state[f"{name}.bias"], padding=weight.shape[2] // 2)


def _vgg(state: Layers, name: str, image: Tensor) -> dict[str, Tensor]:
    found = {}
    x = (image - state[f"{name}.mean"]) / state[f"{name}.std"]
    found["relu1_1"] = x = F.relu(_conv(state, f"{name}.model.conv1_1", x))
    x = F.max_pool2d(F.relu(_conv(state, f"{name}.model.conv1_2", x)), 2)
    found["relu2_1"] = x = F.relu(_conv(state, f"{name}.model.conv2_1", x))
    x = F.max_pool2d(F.relu(_conv(state, f"{name}.model.conv2_2", x)), 2)
    found["conv3_1"] = _conv(state, f"{name}.model.conv3_1", x)
    return found


def _displacements(index: Tensor) -> list[Tensor]:
    """(h-2, w-2) indices -> for x1, x2, x4: 1,18,h,w, displacement (y, x) of the nine taps in pixels of the scale."""
    height, width = index.shape
    rows = torch.arange(height, device=index.device)[:, None]
    columns = torch.arange(width, device=index.device)
    flow = torch.stack([index // width - rows, index % width - columns]).float()
    flow = F.pad(flow, (0, 2, 0, 2))
    found = []
    for scale in (1, 2, 4):
        fine = (flow * scale).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        taps = [
            F.pad(fine, (right * scale, 0, down * scale, 0))[:, : fine.shape[1], : fine.shape[2]]
            for down in range(3)
            for right in range(3)
        ]
        found.append(torch.cat(taps)[None])
    return found


def _blocks(state: Layers, name: str, count: int, x: Tensor) -> Tensor:
    for number in range(count):
        x = x + _conv(state, f"{name}.{number}.conv2", F.relu(_conv(state, f"{name}.{number}.conv1", x)))
    return x


def _gather(state: Layers, scale: str, x: Tensor, reference: Tensor, flow: Tensor, groups: int, timer: Timer) -> Tensor:
    name = f"network.dyn_agg_restore.{scale}"
    with timer("offsets"):
        hints = F.leaky_relu(_conv(state, f"{name}_offset_conv1", torch.cat([x, reference], 1)), 0.1)
        hints = F.leaky_relu(_conv(state, f"{name}_offset_conv2", hints), 0.1)
        predicted = _conv(state, f"{name}_dyn_agg.conv_offset_mask", hints)
        first, second, mask = predicted.chunk(3, 1)
        offset = torch.cat([first, second], 1) + flow.repeat(1, groups, 1, 1)
        mask = torch.sigmoid(mask)
    with timer("deformable convolution"):
        weight, bias = state[f"{name}_dyn_agg.weight"], state[f"{name}_dyn_agg.bias"]
        gathered: Tensor = torchvision.ops.deform_conv2d(reference, offset, weight, bias, padding=1, mask=mask)
        return F.leaky_relu(gathered, 0.1)


def _fuse(state: Layers, name: str, target: Tensor, references: Tensor) -> Tensor:
    """target 1,C,H,W; references N,1,C',H,W."""
    height, width = target.shape[2:]
    pad = (0, -width % 4, 0, -height % 4)
    target = F.pad(target, pad, mode="reflect")
    stacked = F.pad(references[:, 0], pad, mode="reflect")
    query = F.prelu(_conv(state, f"{name}.conv_emb1.0", target), state[f"{name}.conv_emb1.1.weight"])
    keys = F.prelu(_conv(state, f"{name}.conv_emb2.0", stacked), state[f"{name}.conv_emb2.1.weight"])
    weights = ((query * query.shape[1] ** -0.5) * keys).sum(1, keepdim=True).softmax(0)
    attended = (_conv(state, f"{name}.conv_ass", stacked) * weights).sum(0, keepdim=True)
    masks = F.leaky_relu(_conv(state, f"{name}.spatial_attn", torch.cat([target, attended], 1)), 0.1)
    factor = _conv(state, f"{name}.spatial_attn_mul2", _act(_conv(state, f"{name}.spatial_attn_mul1", masks)))
    shift = _conv(state, f"{name}.spatial_attn_add2", _act(_conv(state, f"{name}.spatial_attn_add1", masks)))
    filtered = attended * torch.sigmoid(factor) * 2 + shift
    fused = _act(_conv(state, f"{name}.feat_fusion", torch.cat([target, filtered], 1)))
    return fused[:, :, :height, :width]


def _act(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)
