"""MRefSR in stages: encode the references once, match them, restore the image (whole or tile by tile)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mrefsr.config import ModelConfig
from mrefsr.features import MatchingExtractor, VGGFeatures, load_imagenet_extractor, load_vgg_weights
from mrefsr.matching import flow_from_index, match_batch, normalize_channels, tap_flow
from mrefsr.network import RestorationNet, ScaleReference
from mrefsr.parameters import initialise
from mrefsr.refinement import refine_matches

SCALE = 4  # enlargement, and the step of the matching grid in reference pixels
SMALLEST_LR = 3  # one matching patch


@dataclass(frozen=True, kw_only=True)
class ReferenceFeatures:
    """All that is needed of a reference, whatever it is matched with. R references of one size H,W (any size >= 12)."""

    matching: Tensor  # float32 R,256,H//4,W//4, of length 1 per pixel
    relu3_1: Tensor  # R,256,H//4,W//4
    relu2_1: Tensor  # R,128,H//2,W//2
    image: Tensor  # R,3,H,W; relu1_1 is the largest by far and cheap, so it is made when it is needed


@dataclass(frozen=True, kw_only=True)
class MatchedReference:
    """A reference and where its detail belongs.

    `taps` R,9,h,w,2: displacement (x, y) in LR pixels from an LR pixel to its match, as each of the nine patches
    around it sees it; int, or float32 where matches are refined. `agreement` R,2,h,w, only where matches are refined:
    how well the patch around an LR pixel agrees with its match, in features and in pixels, each from -1 to 1. A tile of
    a larger image takes the same rows and columns of both as of the LR.
    `rows` int64 R: which items of the batch have this reference; None for all of them.
    """

    features: ReferenceFeatures
    taps: Tensor
    rows: Tensor | None = None
    agreement: Tensor | None = None


class Restored(NamedTuple):
    """`image` B,3,4h,4w in about [0, 1], not clamped. `attention`: for x1, x2, x4 of the LR, float32 B,N,H,W: the share
    of every reference in every pixel; 0 where absent, else summing to 1, or to less where matches are refined."""

    image: Tensor
    attention: tuple[Tensor, Tensor, Tensor]


class MRefSR(nn.Module):
    """Multi-reference super-resolution x4 (Zhang et al., ICCV 2023), written from the paper.

    `network` is what is trained; `extractor` (matching features) and `transfer` (transferred features) are frozen and
    never see a gradient. Matching runs in float32 whatever the autocast.

    Without any reference the attended features are zero: the picture is the enlarged LR plus what the network makes of
    the content alone. References may be of another size than the input; where the network looks at content and
    reference at the same place, a larger one is cut and a smaller one continued by zeros at the bottom and right.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.network = RestorationNet(config)
        self.extractor = MatchingExtractor().requires_grad_(False)
        self.transfer = VGGFeatures().requires_grad_(False)
        self.to(memory_format=torch.channels_last)

    def forward(
        self, lr: Tensor, enlarged: Tensor, references: Tensor, mask: Tensor | None = None, *, recompute: bool = False
    ) -> Tensor:
        """Restore a batch.

        lr B3hw; enlarged B,3,4h,4w: the LR brought up x4 (bicubic), which is matched; references BN3HW, N >= 0;
        mask BN bool: which references exist (None: all). RGB in [0, 1]. Returns B,3,4h,4w, not clamped.
        A masked reference has no influence whatever its pixels; nor has the order of the references.
        recompute: in training, make the values inside the residual blocks and of each reference's gathering again in
        the backward pass instead of keeping them: half the memory for a fifth more time, the same gradients.
        Raises ValueError on sizes that do not fit together or are too small.
        """
        check_input(lr, enlarged)
        if references.ndim != 5 or len(references) != len(lr) or references.shape[2] != 3:
            raise ValueError(f"references {tuple(references.shape)} are not B,N,3,H,W with B = {len(lr)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != references.shape[:2]):
            raise ValueError(f"mask {tuple(mask.shape)} is not a bool B,N of {tuple(references.shape[:2])}")
        features = self.encode_input(enlarged) if references.shape[1] else lr
        matched = []
        for slot in range(references.shape[1]):
            rows = _rows(mask, slot)
            if rows is not None and not len(rows):
                continue
            present = slice(None) if rows is None else rows
            reference = self.encode_reference(references[present, slot])
            found = self.match(features[present], reference, enlarged[present])
            # The matching features have done their work: a fifth of a reference's memory.
            kept = dataclasses.replace(found.features, matching=features.new_empty(0))
            matched.append(dataclasses.replace(found, features=kept, rows=rows))
        del features
        return self.restore(lr, matched, recompute=recompute).image

    @torch.no_grad()
    def encode_input(self, enlarged: Tensor) -> Tensor:
        """Matching features of the enlarged LR: B,3,4h,4w -> float32 B,256,h,w, of length 1 per pixel."""
        with torch.autocast(enlarged.device.type, enabled=False):
            image = enlarged.float().contiguous(memory_format=torch.channels_last)
            return normalize_channels(self.extractor.feature_extraction_image1(image))

    @torch.no_grad()
    def encode_reference(self, image: Tensor) -> ReferenceFeatures:
        """Features of references R,3,H,W of one size, RGB in [0, 1]. Raises ValueError below 12x12 pixels."""
        if image.ndim != 4 or image.shape[1] != 3 or min(image.shape[2:]) < SCALE * SMALLEST_LR:
            least = SCALE * SMALLEST_LR
            raise ValueError(f"references {tuple(image.shape)}: need R,3,H,W of at least {least} pixels a side")
        image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(image.device.type, enabled=False):
            seen = _blur(image.float()) if self.config.blur_references else image.float()
            matching = normalize_channels(self.extractor.feature_extraction_image2(seen))
        relu3_1, relu2_1 = self.transfer.transfer(image)
        return ReferenceFeatures(matching=matching, relu3_1=relu3_1, relu2_1=relu2_1, image=image)

    @torch.no_grad()
    def match(self, features: Tensor, reference: ReferenceFeatures, enlarged: Tensor | None = None) -> MatchedReference:
        """Find every input patch in the reference. `features` B,256,h,w from `encode_input`, one reference per item.

        enlarged B,3,4h,4w, which the features were made of, is needed (else ValueError) where matches are refined.
        """
        index, value = match_batch(features, reference.matching[:, None])
        width = reference.matching.shape[3] - 2
        if not self.config.refine_matches:
            return MatchedReference(features=reference, taps=tap_flow(flow_from_index(index[:, 0], width), 1))
        if enlarged is None:
            raise ValueError("matches are refined on the enlarged LR: pass it")
        with torch.autocast(enlarged.device.type, enabled=False):
            flow, fit = refine_matches(index[:, 0], width, enlarged, _blur(reference.image.float()))
        agreement = F.pad(torch.stack([value[:, 0], fit], 1), (1, 1, 1, 1), mode="replicate")
        return MatchedReference(features=reference, taps=tap_flow(flow, 1), agreement=agreement)

    def restore(
        self,
        lr: Tensor,
        references: Sequence[MatchedReference],
        origin: tuple[int, int] = (0, 0),
        *,
        recompute: bool = False,
    ) -> Restored:
        """Restore an image or a tile of one.

        lr B3hw. For a tile, `origin` (y, x) is its corner on the whole LR and the taps are those of its pixels.
        `recompute`: see `forward`.
        """
        check_input(lr)
        lr = lr.contiguous(memory_format=torch.channels_last)
        x = self.network.content_extractor(lr)
        attention = []
        for index in range(3):
            slots = self._at_scale(index, references)
            x, shares = self.network.dyn_agg_restore(index, x, slots, origin, recompute)
            absent = x.new_zeros(len(lr), 0, lr.shape[2] << index, lr.shape[3] << index, dtype=torch.float32)
            attention.append(torch.cat([absent, *shares], 1))
        image = x + enlarge(lr, self.config.base)
        return Restored(image, (attention[0], attention[1], attention[2]))

    def _at_scale(self, index: int, references: Sequence[MatchedReference]) -> Iterator[ScaleReference]:
        for reference in references:
            if index == 0:
                features = reference.features.relu3_1
            elif index == 1:
                features = reference.features.relu2_1
            else:
                with torch.no_grad():
                    features = self.transfer.relu1_1(reference.features.image)
            yield ScaleReference(features, reference.taps, reference.rows, reference.agreement)


def new_model(config: ModelConfig, *, generator: torch.Generator, matcher: Path | None = None) -> MRefSR:
    """A model to be trained, on the CPU: `network` from `generator`, `transfer` from ImageNet's `config.backbone`, and
    `extractor` from `matcher`, a checkpoint of that kind (`lmr train-matcher`), or both its copies from ImageNet's
    VGG16. Only weights that are used are asked for.

    Raises LmrError when a weight file is missing and can not be fetched, or is of another kind.
    """
    model = MRefSR(config)
    initialise(model.network, config, generator)
    if matcher is None:
        load_imagenet_extractor(model.extractor)
    else:
        from mrefsr.checkpoints import load_matcher  # which imports this module

        model.extractor.load_state_dict(load_matcher(matcher).state_dict())
    load_vgg_weights(model.transfer, config.backbone)
    return model


def check_input(lr: Tensor, enlarged: Tensor | None = None) -> None:
    """Raise ValueError unless lr is B3hw with h, w >= 3, and enlarged (when given) B,3,4h,4w."""
    if lr.ndim != 4 or lr.shape[1] != 3:
        raise ValueError(f"LR {tuple(lr.shape)} is not B,3,h,w")
    if min(lr.shape[2:]) < SMALLEST_LR:
        size = f"{lr.shape[3]}x{lr.shape[2]}"
        raise ValueError(f"LR of {size} pixels is smaller than one {SMALLEST_LR}x{SMALLEST_LR} patch")
    expected = (len(lr), 3, SCALE * lr.shape[2], SCALE * lr.shape[3])
    if enlarged is not None and enlarged.shape != expected:
        raise ValueError(f"enlarged LR {tuple(enlarged.shape)} is not {expected}")


def enlarge(lr: Tensor, base: str) -> Tensor:
    """x4 by "bilinear" (as published: pixel centres, edges repeated) or "bicubic" (Pillow's, by antialias=True)."""
    return F.interpolate(lr, scale_factor=SCALE, mode=base, align_corners=False, antialias=base == "bicubic")


def _blur(image: Tensor) -> Tensor:
    """Down and up x4 by Pillow's bicubic, so that a reference has lost the detail that the input has lost."""
    height, width = image.shape[2:]
    size = (max(height // SCALE, 1), max(width // SCALE, 1))
    small = F.interpolate(image, size=size, mode="bicubic", align_corners=False, antialias=True).clamp_(0, 1)
    return F.interpolate(small, size=(height, width), mode="bicubic", align_corners=False, antialias=True).clamp_(0, 1)


def _rows(mask: Tensor | None, slot: int) -> Tensor | None:
    """Items that have the reference in this slot; None when all have."""
    if mask is None or bool(mask[:, slot].all()):
        return None
    return mask[:, slot].nonzero()[:, 0]
