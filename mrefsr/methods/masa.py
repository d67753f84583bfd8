"""MASA-SR (Lu et al., CVPR 2021): x4 with one reference, coarse-to-fine matching instead of an exhaustive one.

The LR features are cut into blocks of about 8x8. The centre of each block is looked up in the whole reference, and
every pixel of the block only in a window around the place found. The matched 3x3 neighbourhoods are copied at three
scales, averaged where they overlap, and weighted by how well they matched.

Differences from the published code, none of which changes a result it can produce: an LR size that its blocks do not
divide is padded by repeating the edge and cut back; a window larger than the reference is cut to the reference (there,
negative indices wrap around to the other side); nothing is unfolded, so memory stays with the size of the pictures.
The published weights were trained on pictures read by OpenCV: they expect the channels in the order B, G, R.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lmr_tools.schema import LmrError
from mrefsr.network import ResidualBlock

SCALE = 4
CHANNEL_ORDER = "bgr"  # of the published weights
BLOCK = 8  # LR pixels along a side of a block, about
WINDOW = 1.5  # window size over the reference's share of a block
DILATIONS = (1, 2, 3)
MAX_CHANNELS = 256  # a file must not talk the program into building a network of any size
MIN_REFERENCE = 12  # pixels: a 3x3 patch of the reference at a quarter of its size
_CHUNK = 1 << 24  # correlation values held at once: 64 MB of float32


def _blocks(nf: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(ResidualBlock(nf) for _ in range(count)))


class Encoder(nn.Module):
    """Features of a picture at full, half and quarter size; the same weights for LR and reference."""

    def __init__(self, nf: int) -> None:
        super().__init__()
        self.conv_L1 = nn.Conv2d(3, nf, 3, padding=1)
        self.blk_L1 = _blocks(nf, 4)
        self.conv_L2 = nn.Conv2d(nf, nf, 3, stride=2, padding=1)
        self.blk_L2 = _blocks(nf, 4)
        self.conv_L3 = nn.Conv2d(nf, nf, 3, stride=2, padding=1)
        self.blk_L3 = _blocks(nf, 4)

    def full_size(self, x_BCHW: Tensor) -> Tensor:
        """The first of the three levels alone."""
        out: Tensor = self.blk_L1(F.relu(self.conv_L1(x_BCHW)))
        return out

    def forward(self, x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Picture B3HW -> features of nf channels at HxW, H/2xW/2, H/4xW/4."""
        full = self.full_size(x_BCHW)
        half = self.blk_L2(F.relu(self.conv_L2(full)))
        return full, half, self.blk_L3(F.relu(self.conv_L3(half)))


class SpatialAdaptation(nn.Module):
    """Gives reference features the LR's mean and standard deviation, plus a learned correction per pixel."""

    def __init__(self, nf: int) -> None:
        super().__init__()
        self.conv_shared = nn.Sequential(nn.Conv2d(2 * nf, nf, 3, padding=1), nn.ReLU())
        self.conv_gamma = nn.Conv2d(nf, nf, 3, padding=1)
        self.conv_beta = nn.Conv2d(nf, nf, 3, padding=1)

    def forward(self, lr_BCHW: Tensor, ref_BCHW: Tensor) -> Tensor:
        """LR and reference features of one shape -> adapted reference features."""
        style = self.conv_shared(torch.cat([lr_BCHW, ref_BCHW], 1))
        std, mean = torch.std_mean(lr_BCHW, dim=(2, 3), keepdim=True)
        gamma, beta = self.conv_gamma(style) + std, self.conv_beta(style) + mean
        out: Tensor = F.instance_norm(ref_BCHW) * gamma + beta
        return out


class DualResidualAggregation(nn.Module):
    """Merges LR features with reference features of twice the size; each corrects what the other lacks."""

    def __init__(self, nf: int) -> None:
        super().__init__()
        self.conv_down_a = nn.Conv2d(nf, nf, 3, stride=2, padding=1)
        self.conv_up_a = nn.ConvTranspose2d(nf, nf, 3, stride=2, padding=1, output_padding=1)
        self.conv_down_b = nn.Conv2d(nf, nf, 3, stride=2, padding=1)
        self.conv_up_b = nn.ConvTranspose2d(nf, nf, 3, stride=2, padding=1, output_padding=1)
        self.conv_cat = nn.Conv2d(2 * nf, nf, 3, padding=1)

    def forward(self, lr_BCHW: Tensor, ref_BCHW: Tensor) -> Tensor:
        """LR features at HxW and reference features at 2Hx2W -> features at 2Hx2W."""
        detail = F.relu(self.conv_down_a(ref_BCHW)) - lr_BCHW
        refined_ref = F.relu(self.conv_up_a(detail)) + ref_BCHW
        missing = lr_BCHW - F.relu(self.conv_down_b(ref_BCHW))
        refined_lr = F.relu(self.conv_up_b(missing + lr_BCHW))
        return F.relu(self.conv_cat(torch.cat([refined_ref, refined_lr], 1)))


class Decoder(nn.Module):
    """LR features and matched reference features -> residual picture."""

    def __init__(self, nf: int) -> None:
        super().__init__()
        self.conv_L3 = nn.Conv2d(nf, nf, 3, padding=1)
        self.blk_L3 = _blocks(nf, 2)
        self.conv_L2 = nn.Conv2d(2 * nf, nf, 3, padding=1)
        self.blk_L2 = _blocks(nf, 2)
        self.conv_L1 = nn.Conv2d(2 * nf, nf, 3, padding=1)
        self.blk_L1 = _blocks(nf, 2)
        self.merge_warp_x1 = nn.Conv2d(2 * nf, nf, 3, padding=1)
        self.blk_x1 = _blocks(nf, 12)
        self.dram_x2 = DualResidualAggregation(nf)
        self.blk_x2 = _blocks(nf, 8)
        self.dram_x4 = DualResidualAggregation(nf)
        self.blk_x4 = _blocks(nf, 4)
        self.conv_out = nn.Conv2d(nf, 3, 3, padding=1)
        self.pAda = SpatialAdaptation(nf)

    def forward(self, lr_levels: tuple[Tensor, Tensor, Tensor], warped: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """LR features at x1, x1/2, x1/4 and reference features at x4, x2, x1 -> B3(4H)(4W)."""
        x = self.blk_L3(F.relu(self.conv_L3(lr_levels[2])))
        x = self.blk_L2(F.relu(self.conv_L2(torch.cat([_double(x), lr_levels[1]], 1))))
        x = self.blk_L1(F.relu(self.conv_L1(torch.cat([_double(x), lr_levels[0]], 1))))
        x = self.blk_x1(F.relu(self.merge_warp_x1(torch.cat([self.pAda(x, warped[2]), x], 1))))
        x = self.blk_x2(self.dram_x2(x, self.pAda(_double(x), warped[1])))
        x = self.blk_x4(self.dram_x4(x, self.pAda(_double(x), warped[0])))
        out: Tensor = self.conv_out(x)
        return out


class MASA(nn.Module):
    """The published network (210 tensors, 4.0 M parameters); tensor names are the published ones."""

    def __init__(self, *, nf: int = 64) -> None:
        super().__init__()
        if not 1 <= nf <= MAX_CHANNELS:
            raise ValueError(f"MASA of {nf} features")
        self.enc = Encoder(nf)
        self.decoder = Decoder(nf)

    def forward(self, lr_BCHW: Tensor, ref_BCHW: Tensor, ref_down_BCHW: Tensor) -> Tensor:
        """LR, reference and the reference brought to a quarter by Pillow bicubic -> SR, B3(4H)(4W), not clamped.

        Float pictures in [0, 1], all of one channel order. The LR may have any size; the reference any size from 12x12
        pixels whose sides are multiples of 4. Several references can be given as one tall picture.
        """
        height, width = lr_BCHW.shape[2:]
        if min(ref_BCHW.shape[2:]) < MIN_REFERENCE:
            raise LmrError(f"a reference of {ref_BCHW.shape[3]}x{ref_BCHW.shape[2]} pixels: MASA needs 12x12 or more")
        if ref_BCHW.shape[2:] != tuple(SCALE * side for side in ref_down_BCHW.shape[2:]):
            raise ValueError(f"reference {tuple(ref_BCHW.shape)} is not 4x its small copy {tuple(ref_down_BCHW.shape)}")
        pad = (0, _padded(width) - width, 0, _padded(height) - height)
        lr = F.pad(lr_BCHW, pad, mode="replicate")
        lr_levels, ref_levels = self.enc(lr), self.enc(ref_BCHW)
        origin, weight = match(lr_levels[0], self.enc.full_size(ref_down_BCHW))
        warped = tuple(transfer(ref_levels[i], origin, weight, scale=4 >> i) for i in range(3))
        sr: Tensor = self.decoder(lr_levels, warped) + F.interpolate(lr, scale_factor=SCALE, mode="bicubic")
        return sr[..., : SCALE * height, : SCALE * width]


def match(lr_BCHW: Tensor, ref_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """For each LR pixel the reference patch that fits its 3x3 neighbourhood best, searched coarse to fine.

    Returns two tensors of shape B, rows, columns, h, w over blocks of h x w pixels: `origin`, the patch's top-left
    corner as y * reference width + x, and `weight`, the cosine similarity of the two patches.
    """
    batch, _, height, width = lr_BCHW.shape
    ref_height, ref_width = ref_BCHW.shape[2:]
    rows, columns = height // BLOCK, width // BLOCK
    h, w = height // rows, width // columns
    padded = F.pad(lr_BCHW, (1, 1, 1, 1), mode="replicate")
    # (B, blocks, C, h + 2, w + 2): each block with a rim of one pixel
    block = padded.unfold(2, h + 2, h).unfold(3, w + 2, w).flatten(2, 3).movedim(2, 1)

    y, x = (h + 2) // 2, (w + 2) // 2
    centres = [block[..., y - d : y + d + 1 : d, x - d : x + d + 1 : d] for d in DILATIONS]
    step = max(1, _CHUNK // (batch * ref_height * ref_width))
    found = [
        _best(list(chunk), ref_BCHW, DILATIONS, same=True)[1]
        for chunk in zip(*(torch.split(centre, step, dim=1) for centre in centres), strict=True)
    ]
    centre = torch.cat(found, 1)

    # The window holds the block's share of the reference 1.5 times, and a rim; it is moved to lie inside.
    tall = min(2 * int(ref_height // (2 * rows) * WINDOW) + 3, ref_height)
    wide = min(2 * int(ref_width // (2 * columns) * WINDOW) + 3, ref_width)
    top = (centre // ref_width - tall // 2).clamp(0, ref_height - tall).flatten()
    left = (centre % ref_width - wide // 2).clamp(0, ref_width - wide).flatten()
    sample = torch.arange(batch, device=top.device).repeat_interleave(rows * columns)
    window_y = top[:, None] + torch.arange(tall, device=top.device)
    window_x = left[:, None] + torch.arange(wide, device=top.device)
    # (B * blocks, h * w, C, 3, 3): the patch around each pixel
    neighbourhood = block.flatten(0, 1).unfold(2, 3, 1).unfold(3, 3, 1).flatten(2, 3).movedim(2, 1)

    values, origins = [], []
    reference = ref_BCHW.movedim(1, 3)
    for part in torch.split(torch.arange(len(top), device=top.device), max(1, _CHUNK // (h * w * tall * wide))):
        window = reference[sample[part, None, None], window_y[part, :, None], window_x[part, None, :]].movedim(3, 1)
        value, index = _best([neighbourhood[part]], window, (1,), same=False)
        below, right = index // (wide - 2), index % (wide - 2)
        values.append(value)
        origins.append((top[part, None] + below) * ref_width + left[part, None] + right)
    shape = (batch, rows, columns, h, w)
    return torch.cat(origins).view(shape), torch.cat(values).view(shape)


def _best(
    patches: list[Tensor], regions_BCHW: Tensor, dilations: tuple[int, ...], *, same: bool
) -> tuple[Tensor, Tensor]:
    """Highest sum over the dilations of cosine similarities of B, K, C, 3, 3 patches with B, C, H, W regions.

    Returns value and flat index, both (B, K). `same`: patches may hang over the region's edge, where it is zero.
    """
    batch, channels = regions_BCHW.shape[:2]
    energy = regions_BCHW.square().sum(1, keepdim=True)
    side_by_side = regions_BCHW.reshape(1, -1, *regions_BCHW.shape[2:])
    total: Tensor | None = None
    for patch, dilation in zip(patches, dilations, strict=True):
        padding = dilation if same else 0
        kernel = F.normalize(patch.flatten(2), dim=2).reshape(-1, channels, 3, 3)
        product = F.conv2d(side_by_side, kernel, padding=padding, dilation=dilation, groups=batch)
        norm = F.conv2d(energy, energy.new_ones(1, 1, 3, 3), padding=padding, dilation=dilation)
        similarity = product.view(batch, -1, *norm.shape[2:]) / norm.sqrt().clamp_min(1e-12)
        total = similarity if total is None else total + similarity
    assert total is not None
    value, index = total.flatten(2).max(dim=2)
    return value, index


def transfer(feature_BCHW: Tensor, origin: Tensor, weight: Tensor, *, scale: int) -> Tensor:
    """Copy each LR pixel's matched 3x3 patch of reference cells (`scale` pixels wide), average overlaps, weigh.

    `feature_BCHW` has `scale` times the size of the grid that `origin` counts in; patches do not reach into the
    neighbouring block. Returns B, C, scale * H, scale * W for an LR of H x W.
    """
    batch, rows, columns, h, w = origin.shape
    cells = F.pixel_unshuffle(feature_BCHW, scale)
    ref_height, ref_width = cells.shape[2:]
    table = cells.flatten(2).transpose(1, 2).reshape(batch * ref_height * ref_width, -1)
    first = torch.arange(batch, device=origin.device).view(-1, 1, 1, 1, 1) * (ref_height * ref_width)
    rim = F.pad(origin, (1, 1, 1, 1), value=-1)
    sources, inside = [], []
    for i in range(3):
        for j in range(3):
            # The pixel whose patch has its cell (i, j) here is one up for i = 2, one down for i = 0.
            source = rim[..., 2 - i : 2 - i + h, 2 - j : 2 - j + w]
            sources.append(_joined(first + (source + i * ref_width + j).clamp_min(0)).flatten())
            inside.append(_joined(source >= 0).flatten())
    share = torch.stack(inside, 1).to(table.dtype)
    share = share / share.sum(1, keepdim=True)
    mean = F.embedding_bag(torch.stack(sources, 1), table, per_sample_weights=share, mode="sum")
    mean = mean.view(batch, rows * h * columns * w, -1)
    warped = F.pixel_shuffle(mean.transpose(1, 2).reshape(batch, -1, rows * h, columns * w), scale)
    enlarged = F.interpolate(weight.view(-1, 1, h, w), scale_factor=scale, mode="bilinear", align_corners=False)
    return warped * _joined(enlarged.view(batch, rows, columns, scale * h, scale * w))[:, None]


def _joined(blocks: Tensor) -> Tensor:
    """(B, rows, columns, h, w) -> (B, rows * h, columns * w)."""
    batch, rows, columns, h, w = blocks.shape
    return blocks.permute(0, 1, 3, 2, 4).reshape(batch, rows * h, columns * w)


def _double(x_BCHW: Tensor) -> Tensor:
    return F.interpolate(x_BCHW, scale_factor=2, mode="bilinear", align_corners=False)


def _padded(side: int) -> int:
    """The LR side the blocks need: as it is where they divide it (and it halves twice), else a multiple of 8."""
    if side >= BLOCK and side % (side // BLOCK) == 0 and side % 4 == 0:
        return side
    return -(-side // BLOCK) * BLOCK
