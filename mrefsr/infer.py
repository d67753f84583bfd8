"""A person's own pictures through MRefSR: any LR size, any number of references of any size, in the memory there is.

Target and references are matched as wholes, so tiles change nothing about which detail is found; only the restoration
is tiled (`mrefsr.tiling`, exact up to float rounding). A reference's VGG features are made once.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lmr_tools.images import resize, upscale
from lmr_tools.schema import LmrError
from mrefsr import tiling
from mrefsr.memory import free_memory
from mrefsr.model import SCALE, SMALLEST_LR, MatchedReference, MRefSR, enlarge

if TYPE_CHECKING:
    from lmr_tools.schema import Image

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARE_OF_MEMORY = 0.8  # of what is free, `auto` plans with
Tile = int | Literal["auto"] | None
Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is done next


@dataclass(frozen=True, kw_only=True)
class SuperResolved:
    """A super-resolved picture and where its detail is from.

    `shares` float32 N,h,w on the LR grid: each reference's part of the attention, the mean over the three scales;
    without references N is 0, else the parts sum to 1, or to less where the model refuses what does not agree.
    """

    image: Image
    shares: npt.NDArray[np.float32]


def super_resolve(
    model: MRefSR,
    lr: Image,
    references: Sequence[Image],
    *,
    tile: Tile = "auto",
    dtype: torch.dtype = torch.float32,
    max_reference_side: int | None = None,
) -> Image:
    """uint8 h,w,3 -> uint8 4h,4w,3: the picture alone of `super_resolve_with_shares`, which tells about the rest."""
    return super_resolve_with_shares(
        model, lr, references, tile=tile, dtype=dtype, max_reference_side=max_reference_side
    ).image


def super_resolve_with_shares(
    model: MRefSR,
    lr: Image,
    references: Sequence[Image],
    *,
    tile: Tile = "auto",
    dtype: torch.dtype = torch.float32,
    max_reference_side: int | None = None,
    progress: Progress = lambda done, total, what: None,
) -> SuperResolved:
    """Super-resolve `lr` x4 on the device that `model` is on.

    Args:
        lr: uint8 h,w,3 RGB of at least 3x3 pixels. What is matched is its Pillow bicubic x4, 8-bit, as published.
        references: uint8 H,W,3 RGB. Sides become a multiple of 4, at least 12, by reflection. None at all gives the
            enlarged LR plus what the network makes of the content alone.
        tile: side of a restoration tile in LR pixels, rounded up to a multiple of 4 (at coarse scales, which take
            less memory, tiles are larger); None: one tile; "auto": as large as free memory allows. Results differ by
            float rounding only.
        dtype: torch.bfloat16 or float16 run the network and the transferred features under autocast; matching and
            sampling positions stay in float32.
        max_reference_side: larger references are brought down (Pillow bicubic) to this side first, in pixels.
        progress: called before each step with the steps done, their number and a few words.

    Raises:
        LmrError: the LR is too small or not RGB uint8, or there is not enough memory.
    """
    if max_reference_side is not None and max_reference_side < SCALE * SMALLEST_LR:
        raise LmrError(f"a reference needs at least {SCALE * SMALLEST_LR} pixels a side, not {max_reference_side}")
    check_picture(lr, "LR")
    if min(lr.shape[:2]) < SMALLEST_LR:
        raise LmrError(
            f"LR of {lr.shape[1]}x{lr.shape[0]} pixels is smaller than one {SMALLEST_LR}x{SMALLEST_LR} patch; "
            "give a larger picture"
        )
    device = next(model.parameters()).device
    prepared = [_prepared(reference, max_reference_side) for reference in references]
    plan = _plan(model, lr.shape, [picture.shape for picture in prepared], tile, dtype, device)
    steps = _Steps(progress, len(prepared) + sum(len(windows) for windows in plan))
    with torch.no_grad(), _precision(device, dtype), _memory_named(device):
        matched = []
        if prepared:
            steps.about(f"matching reference 1 of {len(prepared)}")
            enlarged = _to_tensor(upscale(lr, SCALE), device)
            features = tiling.encode_input(model, enlarged)
            for number, picture in enumerate(prepared, 1):
                steps.about(f"matching reference {number} of {len(prepared)}")
                matched.append(_match(model, features, enlarged, _to_tensor(picture, device)))
                steps.done()
            del features, enlarged
        steps.about("restoring")
        low = _to_tensor(lr, device)
        x = model.network.content_extractor(low.contiguous(memory_format=torch.channels_last))
        shares = torch.zeros(len(matched), *lr.shape[:2], device=device)
        for index, windows in enumerate(plan):
            x, attention = tiling.restore_scale(model, index, x, matched, windows, steps.done)
            shares += attention / len(plan)
            matched = [_without(reference, index) for reference in matched]
        return SuperResolved(
            image=_to_picture(x.float() + enlarge(low, model.config.base)), shares=shares.cpu().numpy()
        )


def choose_device(name: str) -> torch.device:
    """`auto`: cuda where there is one, else mps, else cpu. A device that is not there is an LmrError."""
    if name == "auto":
        if torch.cuda.is_available():
            name = "cuda"
        else:
            name = "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises both for a device that is not there
        reason = str(error).splitlines()[0]
        raise LmrError(f"--device {name}: not usable here ({reason}); give auto, cpu, cuda, cuda:1 or mps") from None
    return device


def check_picture(picture: Image, name: str) -> None:
    """LmrError unless it is uint8 (H, W, 3) with at least one pixel."""
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
        raise LmrError(f"{name} is {picture.dtype} {picture.shape}, not an RGB picture of uint8 (H, W, 3)")


def match_operations(lr_shape: tuple[int, ...], reference_shapes: Sequence[tuple[int, ...]]) -> float:
    """Multiply-adds of matching the whole LR with whole references; shapes begin with height and width."""
    of_input = 256.0 * lr_shape[0] * lr_shape[1]
    return sum(of_input * (shape[0] // SCALE) * (shape[1] // SCALE) for shape in reference_shapes)


def fitted(picture: Image, max_side: int | None) -> Image:
    """`picture`, brought down to at most `max_side` pixels on its longer side."""
    longest = max(picture.shape[:2])
    if max_side is None or longest <= max_side:
        return picture
    height, width = (max(1, round(side * max_side / longest)) for side in picture.shape[:2])
    return resize(picture, width, height)


def _prepared(reference: Image, max_side: int | None) -> Image:
    check_picture(reference, "a reference")
    picture = fitted(reference, max_side)
    grow = [(0, max(-side % SCALE, SCALE * SMALLEST_LR - side)) for side in picture.shape[:2]]
    # numpy reflects again and again where the picture is smaller than what is added; one pixel is repeated.
    return np.pad(picture, (*grow, (0, 0)), mode="reflect") if any(after for _, after in grow) else picture


def _match(model: MRefSR, features: Tensor, enlarged: Tensor, image: Tensor) -> MatchedReference:
    matched = model.match(features, tiling.encode_reference(model, image), enlarged)
    return _without_features(matched, "matching")


def _without(reference: MatchedReference, scale: int) -> MatchedReference:
    """The reference after a scale is restored, whose features it needs no more."""
    return _without_features(reference, ("relu3_1", "relu2_1", "image")[scale])


def _without_features(reference: MatchedReference, name: str) -> MatchedReference:
    nothing = getattr(reference.features, name).new_empty(0)
    return dataclasses.replace(reference, features=dataclasses.replace(reference.features, **{name: nothing}))


def _plan(
    model: MRefSR,
    lr_shape: tuple[int, ...],
    reference_shapes: Sequence[tuple[int, ...]],
    tile: Tile,
    dtype: torch.dtype,
    device: torch.device,
) -> tiling.Plan:
    """How the restoration is cut up. LmrError when `auto` finds no way to stay within the memory that is free."""
    height, width = lr_shape[:2]
    per_pixel = tiling.bytes_per_pixel(model.config, len(reference_shapes), dtype.itemsize)
    if tile != "auto":
        if tile is not None and tile < 1:
            raise LmrError(f"tile {tile}: give a side of at least 1 LR pixel, auto or none")
        return tiling.fixed_tiles(model.config, height, width, tile, per_pixel)
    kept = tiling.kept_bytes(model.config, (height, width), [shape[:2] for shape in reference_shapes], dtype.itemsize)
    budget = SHARE_OF_MEMORY * free_memory(device) - kept
    plan = tiling.plan_tiles(model.config, height, width, budget, per_pixel)
    if plan is None:
        largest = max((max(shape[:2]) for shape in reference_shapes), default=0)
        way_out = f"bring references down (--max-reference-side, now {largest})" if largest else "give a smaller LR"
        raise LmrError(
            f"not enough memory: an LR of {width}x{height} and {len(reference_shapes)} references take about "
            f"{kept / 1e9:.1f} GB besides the tiles, of {(budget + kept) / 1e9:.1f} GB that may be taken on {device} "
            f"({SHARE_OF_MEMORY:.0%} of what is free): {way_out}, or try anyway with --tile {tiling.SMALLEST_TILE}"
        )
    return plan


def _precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


@contextlib.contextmanager
def _memory_named(device: torch.device) -> Iterator[None]:
    """What allocators say when memory runs out, as one line that names the way out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        short = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not short:
            raise
        raise LmrError(
            f"memory on {device} ran out: give a smaller --tile, or bring references down by --max-reference-side"
        ) from None


class _Steps:
    """Counts steps and says what comes next."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._total, self._count, self._what = progress, total, 0, ""

    def about(self, what: str) -> None:
        self._what = what
        self._progress(self._count, self._total, what)

    def done(self) -> None:
        self._count += 1
        self._progress(self._count, self._total, self._what)


def _to_tensor(picture: Image, device: torch.device) -> Tensor:
    """uint8 H,W,3 -> float 1,3,H,W in [0, 1]."""
    return torch.tensor(picture).to(device).permute(2, 0, 1)[None].float().div_(255)


def _to_picture(image: Tensor) -> Image:
    """float 1,3,H,W -> uint8 H,W,3, clamped and rounded."""
    levels = (image[0].clamp(0, 1) * 255).round_().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy())
