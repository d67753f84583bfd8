"""MRefSR and the systems it is compared with behind one call: LR and references in, SR out, all RGB uint8.

A method is added by a function that loads it (or one that needs no loading) and an entry in `METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lmr_tools.images import resize
from lmr_tools.schema import LmrError
from mrefsr.checkpoints import load_c2_matching, load_esrgan, load_masa, load_model
from mrefsr.infer import super_resolve
from mrefsr.methods.bicubic import bicubic
from mrefsr.methods.masa import CHANNEL_ORDER, MIN_REFERENCE
from mrefsr.model import MRefSR

if TYPE_CHECKING:
    from lmr_tools.schema import Image

# (LR h,w,3; references H,W,3 of any sizes) -> SR 4h,4w,3, clamped and rounded to 8 bits.
Restore = Callable[["Image", Sequence["Image"]], "Image"]
SCALE = 4


@dataclass(frozen=True, kw_only=True)
class Method:
    """How many references a method takes (None: any number) and how it is made from its checkpoint, if it has one."""

    references: int | None
    load: Callable[[Path, torch.device], Restore] | None = None
    restore: Restore | None = None


def load_method(name: str, weights: Path | None, device: torch.device) -> Restore:
    """The call of a method of `METHODS`. LmrError when weights are missing, too much, or not this method's."""
    method = METHODS[name]
    if method.load is None:
        if weights is not None:
            raise LmrError(f"--weights {weights}: {name} has no weights; leave the option out")
        assert method.restore is not None
        return method.restore
    if weights is None:
        raise LmrError(
            f"--weights: {name} needs its checkpoint; `lmr weights` lists where published ones come from, "
            f"`lmr convert-checkpoint --kind {name}` makes it"
        )
    return method.load(weights, device)


def _load_esrgan(weights: Path, device: torch.device) -> Restore:
    net = load_esrgan(weights, device)

    def restore(lr: Image, references: Sequence[Image]) -> Image:
        with torch.inference_mode():
            return _to_picture(net(_to_tensor(lr, device)))

    return restore


def _load_masa(weights: Path, device: torch.device) -> Restore:
    net = load_masa(weights, device)
    order = slice(None, None, -1) if CHANNEL_ORDER == "bgr" else slice(None)

    def restore(lr: Image, references: Sequence[Image]) -> Image:
        reference = _grown(_only(references, "MASA"))
        height, width = reference.shape[:2]
        small = resize(reference, width // SCALE, height // SCALE)
        with torch.inference_mode():
            tensors = [_to_tensor(picture[..., order], device) for picture in (lr, reference, small)]
            return np.ascontiguousarray(_to_picture(net(*tensors))[..., order])

    return restore


def _load_c2_matching(weights: Path, device: torch.device) -> Restore:
    model = load_c2_matching(weights, device)
    return lambda lr, references: super_resolve(model, lr, [_only(references, "C2-Matching")])


def _load_mrefsr(weights: Path, device: torch.device) -> Restore:
    model: MRefSR = load_model(weights, device)
    return lambda lr, references: super_resolve(model, lr, references)


def _only(references: Sequence[Image], name: str) -> Image:
    if len(references) != 1:
        raise LmrError(f"{name} takes one reference, not {len(references)}")
    return references[0]


def _grown(reference: Image) -> Image:
    """Sides become a multiple of 4, and large enough for MASA, by reflection."""
    grow = [(0, max(-side % SCALE, MIN_REFERENCE - side)) for side in reference.shape[:2]]
    return np.pad(reference, (*grow, (0, 0)), mode="reflect") if any(after for _, after in grow) else reference


def _to_tensor(picture: Image, device: torch.device) -> Tensor:
    """uint8 H,W,3 -> float 1,3,H,W in [0, 1]."""
    return torch.tensor(np.ascontiguousarray(picture)).to(device).permute(2, 0, 1)[None].float().div_(255)


def _to_picture(image: Tensor) -> Image:
    """float 1,3,H,W -> uint8 H,W,3, clamped and rounded."""
    levels = (image[0].clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy())


METHODS: Mapping[str, Method] = {
    "bicubic": Method(references=0, restore=bicubic),
    "esrgan": Method(references=0, load=_load_esrgan),
    "masa": Method(references=1, load=_load_masa),
    "c2-matching": Method(references=1, load=_load_c2_matching),
    "mrefsr": Method(references=None, load=_load_mrefsr),
}
