"""The oracle: MRefSR written plainly from its description, in float64, for one item and its list of references.

Slow and simple on purpose: whole matching matrix, `grid_sample` tap by tap instead of a deformable convolution, all
references concatenated and stacked. It shares nothing with the package but the names of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrefsr.config import ModelConfig

VGG = ("relu3_1", "relu2_1", "relu1_1")


class Weights:
    """Convolutions by name out of a state dict, optionally under a prefix."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str = "") -> None:
        self.state, self.prefix = state, prefix

    def __getitem__(self, name: str) -> Tensor:
        value = self.state[self.prefix + name]
        return value if value.dtype == torch.float64 else value.double()

    def under(self, prefix: str) -> Weights:
        return Weights(self.state, self.prefix + prefix)

    def conv(self, name: str, x: Tensor) -> Tensor:
        weight = self[name + ".weight"]
        return F.conv2d(x, weight, self[name + ".bias"], padding=weight.shape[-1] // 2)

    def blocks(self, name: str, count: int, x: Tensor) -> Tensor:
        for i in range(count):
            x = x + self.conv(f"{name}.{i}.conv2", F.relu(self.conv(f"{name}.{i}.conv1", x)))
        return x


def lrelu(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.1)


def vgg(w: Weights, image: Tensor) -> dict[str, Tensor]:
    out = {}
    x = (image - w["mean"]) / w["std"]
    out["relu1_1"] = x = F.relu(w.conv("model.conv1_1", x))
    x = F.max_pool2d(F.relu(w.conv("model.conv1_2", x)), 2)
    out["relu2_1"] = x = F.relu(w.conv("model.conv2_1", x))
    x = F.max_pool2d(F.relu(w.conv("model.conv2_2", x)), 2)
    out["conv3_1"] = w.conv("model.conv3_1", x)
    out["relu3_1"] = F.relu(out["conv3_1"])
    return out


def match(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """1Chw, 1CHW -> for every patch: displacement (y, x), 2,h-2,w-2, and cosine with its match, h-2,w-2."""
    height, width = features.shape[2:]
    patches = F.unfold(F.normalize(features, dim=1), 3)[0]
    others = F.unfold(F.normalize(reference, dim=1), 3)[0]
    value, place = (patches.T @ (others / (others.norm(dim=0) + 1e-5))).max(1)
    value = (value / (patches.norm(dim=0) + 1e-5)).view(height - 2, width - 2)
    index = place.view(height - 2, width - 2)
    found = torch.stack([index // (reference.shape[3] - 2), index % (reference.shape[3] - 2)])
    here = torch.stack(torch.meshgrid(torch.arange(height - 2), torch.arange(width - 2), indexing="ij"))
    return found - here, value


def refine(displacement: Tensor, enlarged: Tensor, blurred: Tensor) -> tuple[Tensor, Tensor]:
    """Displacement 2,h-2,w-2 of patches to a fraction of a pixel (in LR pixels), and the correlation there: patch by
    patch, shift by shift."""
    luma = np.array([0.299, 0.587, 0.114])[:, None, None]
    seen, found = ((luma * image.numpy()).sum(0) for image in (enlarged, blurred))
    found = np.pad(found, 2, mode="edge")
    moved, fit = displacement.double().numpy().copy(), np.zeros(displacement.shape[1:])
    for y, x in np.ndindex(*fit.shape):
        top, left = (int(at) * 4 for at in displacement[:, y, x] + torch.tensor([y, x]))
        patch = seen[4 * y : 4 * y + 12, 4 * x : 4 * x + 12]
        patch = patch - patch.mean()
        scores = np.empty((5, 5))
        for i, j in np.ndindex(5, 5):
            part = found[top + i : top + i + 12, left + j : left + j + 12]
            part = part - part.mean()
            scores[i, j] = (patch * part).sum() / (np.sqrt((patch**2).sum() * (part**2).sum()) + 1e-3)
        i, j = np.unravel_index(scores.argmax(), scores.shape)
        fit[y, x] = scores.max()
        for axis, (at, line) in enumerate(((i, scores[:, j]), (j, scores[i]))):
            peak = float(at)
            if 0 < at < 4:
                peak += (line[at + 1] - line[at - 1]) / (2 * (2 * line[at] - line[at - 1] - line[at + 1]))
            moved[axis, y, x] += (peak - 2) / 4
    return torch.from_numpy(moved), torch.from_numpy(fit)


def sample(image: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Bilinear, zeros outside: 1CHW at the pixels y, x (h, w) -> Chw."""
    image = F.pad(image, (2, 2, 2, 2))
    y, x = y + 2, x + 2
    grid = torch.stack([2 * x / (image.shape[3] - 1) - 1, 2 * y / (image.shape[2] - 1) - 1], -1)
    return F.grid_sample(image, grid[None], align_corners=True, padding_mode="zeros")[0]


def aggregate(w: Weights, reference: Tensor, hints: Tensor, flow: Tensor, scale: int, groups: int) -> Tensor:
    height, width = hints.shape[2:]
    predicted = w.conv("conv_offset_mask", hints)[0]
    offset = predicted[: groups * 18].view(groups, 9, 2, height, width)
    mask = predicted[groups * 18 :].sigmoid().view(groups, 9, height, width)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    out = w["bias"][None, :, None, None]
    each = reference.shape[1] // groups
    for tap in range(9):
        i, j = divmod(tap, 3)
        shifted = F.pad(flow, (j, 0, i, 0))[:, : flow.shape[1], : flow.shape[2]] * scale
        shifted = shifted.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        for g in range(groups):
            y = rows + i - 1 + shifted[0] + offset[g, tap, 0]
            x = columns + j - 1 + shifted[1] + offset[g, tap, 1]
            part = slice(g * each, (g + 1) * each)
            value = sample(reference[:, part], y, x) * mask[g, tap]
            out = out + torch.einsum("oc,chw->ohw", w["weight"][:, part, i, j], value)[None]
    return out


def fuse(w: Weights, target: Tensor, references: Sequence[Tensor], agreements: Sequence[Tensor]) -> Tensor:
    """`agreements` 2,h,w (features, pixels) at the target's scale, of each reference; none where there is no null
    reference."""
    height, width = target.shape[2:]

    def pad(x: Tensor) -> Tensor:
        return F.pad(x, (0, -width % 4, 0, -height % 4), mode="reflect")

    target = pad(target)
    attended = target.new_zeros(1, w["conv_ass.weight"].shape[0], *target.shape[2:])
    if references:
        query = F.prelu(w.conv("conv_emb1.0", target), w["conv_emb1.1.weight"])
        keys = [F.prelu(w.conv("conv_emb2.0", pad(x)), w["conv_emb2.1.weight"]) for x in references]
        logits = torch.stack([(query * key).sum(1, keepdim=True) for key in keys]) * query.shape[1] ** -0.5
        values = torch.stack([w.conv("conv_ass", pad(x)) for x in references])
        if agreements:
            of_features, of_pixels = (
                pad(torch.stack(part)[:, None])[:, None] for part in zip(*agreements, strict=True)
            )
            trust = w["trust"]
            logits = logits + 20 * (trust[0] * (of_features - 0.75) + trust[1] * (of_pixels - 0.85)) + trust[2]
            logits = torch.cat([logits, torch.zeros_like(logits[:1])])
            values = torch.cat([values, torch.zeros_like(values[:1])])
        attended = (logits.softmax(0) * values).sum(0)
    masks = lrelu(w.conv("spatial_attn", torch.cat([target, attended], 1)))
    scale = w.conv("spatial_attn_mul2", lrelu(w.conv("spatial_attn_mul1", masks))).sigmoid() * 2
    shift = w.conv("spatial_attn_add2", lrelu(w.conv("spatial_attn_add1", masks)))
    fused = lrelu(w.conv("feat_fusion", torch.cat([target, attended * scale + shift], 1)))
    return fused[:, :, :height, :width]


def blur(image: Tensor) -> Tensor:
    height, width = image.shape[2:]
    small = F.interpolate(image, (height // 4, width // 4), mode="bicubic", antialias=True).clamp(0, 1)
    return F.interpolate(small, (height, width), mode="bicubic", antialias=True).clamp(0, 1)


def restore(
    state: Mapping[str, Tensor], config: ModelConfig, lr: Tensor, enlarged: Tensor, references: Sequence[Tensor]
) -> Tensor:
    """3hw, 3(4h)(4w) and references 3HW of any size, all float64 -> 3(4h)(4w)."""
    all_weights = Weights(state)
    features = vgg(all_weights.under("extractor.feature_extraction_image1."), enlarged[None])["conv3_1"]
    flows, transfer, agreements = [], [], []
    for reference in references:
        seen = blur(reference[None]) if config.blur_references else reference[None]
        of_reference = vgg(all_weights.under("extractor.feature_extraction_image2."), seen)["conv3_1"]
        displacement, value = match(features, of_reference)
        if config.refine_matches:
            displacement, fit = refine(displacement, enlarged, blur(reference[None])[0])
            around = F.pad(torch.stack([value, fit])[None], (1, 1, 1, 1), mode="replicate")[0]
            agreements.append(around)
        flows.append(F.pad(displacement, (0, 2, 0, 2)))
        transfer.append(vgg(all_weights.under("transfer."), reference[None]))
    w = all_weights.under("network.content_extractor.")
    x = w.blocks("body", config.content_blocks, lrelu(w.conv("conv_first", lr[None])))
    w = all_weights.under("network.dyn_agg_restore.")
    for k, scale in enumerate(("small", "medium", "large")):
        gathered = []
        for flow, maps in zip(flows, transfer, strict=True):
            reference = maps[VGG[k]] / config.feature_scale[k]
            if config.reference_channels[k] != reference.shape[1]:
                reference = w.conv(f"{scale}_reduce", reference)
            grow = (0, max(0, x.shape[3] - reference.shape[3]), 0, max(0, x.shape[2] - reference.shape[2]))
            beside = F.pad(reference, grow)[:, :, : x.shape[2], : x.shape[3]]
            hints = lrelu(w.conv(f"{scale}_offset_conv1", torch.cat([x, beside], 1)))
            hints = lrelu(w.conv(f"{scale}_offset_conv2", hints))
            sampled = aggregate(w.under(f"{scale}_dyn_agg."), reference, hints, flow, 2**k, config.offset_groups)
            gathered.append(lrelu(sampled))
        finer = [a.repeat_interleave(2**k, 1).repeat_interleave(2**k, 2) for a in agreements]
        fused = fuse(w.under(f"head_{scale}."), x, gathered, finer)
        x = w.blocks(f"body_{scale}", config.blocks[k], fused) + x
        x = w.conv(f"tail_{scale}.0", x)
        x = w.conv("tail_large.2", lrelu(x)) if k == 2 else lrelu(F.pixel_shuffle(x, 2))
    base = F.interpolate(lr[None], scale_factor=4, mode=config.base, antialias=config.base == "bicubic")
    return (x + base)[0]
