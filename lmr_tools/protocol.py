"""From a target and its references to what a method is given: the published evaluation's preparation, and a plain one.

`official` is the published code's: target and references are zero-padded at the right and bottom to one canvas before
the LR is made, so LR pixels beside the padding are darker; the SR picture is cut back before it is scored. `native`
pads nothing and leaves references as they are. Numbers of the two differ: every result row names its protocol.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lmr_tools.images import downscale
from lmr_tools.schema import LmrError

if TYPE_CHECKING:
    from lmr_tools.schema import Image

SCALE = 4
PROTOCOLS = ("official", "native")
SMALLEST = 12  # pixels a side of a target: an LR of 3x3, one matching patch
# Side of the canvas; elsewhere it is the largest height and width in the group, as a multiple of 4.
CANVAS: Mapping[str, int] = {"cufed5": 500}
# Where the published code crops references to a multiple of 4 (elsewhere it pads them to one).
CROPPED_REFERENCES = ("wr-sr", "manga109")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One picture of a test set, ready for a method. All pictures are RGB uint8.

    `target` (H, W, 3) with H and W multiples of 4; `lr` is its Pillow bicubic at a quarter, made from the padded target
    under `official`; `references` any number, of the canvas's size under `official`, else of any sizes; `tiers` is one
    of H, M, L for each reference, or "" where the test set has none.
    """

    image_id: str
    target: Image
    lr: Image
    references: tuple[Image, ...]
    reference_ids: tuple[str, ...]
    tiers: tuple[str, ...]


def prepare(
    image_id: str,
    target: Image,
    references: Sequence[Image | None],
    *,
    reference_ids: Sequence[str],
    tiers: Sequence[str],
    benchmark: str,
    protocol: str,
) -> Item:
    """The `Item` of decoded pictures; a reference of None stands for the target's own LR (Urban100).

    LmrError when the target is too small, or larger than the benchmark's fixed canvas.
    """
    if min(target.shape[:2]) < SMALLEST:
        raise LmrError(f"{image_id}: the target is {_size(target)}, at least {SMALLEST} pixels a side are needed")
    target = _cropped(target)
    pictures = [downscale(target, SCALE) if picture is None else picture for picture in references]
    padded = target
    if protocol == "official":
        if benchmark in CROPPED_REFERENCES:
            pictures = [_cropped(picture) for picture in pictures]
        height, width = _canvas(image_id, [target, *pictures], CANVAS.get(benchmark))
        padded, *pictures = (_padded(picture, height, width) for picture in (target, *pictures))
    return Item(
        image_id=image_id,
        target=target,
        lr=downscale(padded, SCALE),
        references=tuple(pictures),
        reference_ids=tuple(reference_ids),
        tiers=tuple(tiers),
    )


def cut_back(sr: Image, item: Item) -> Image:
    """The part of a method's output that shows the target; LmrError when it is not four times the LR."""
    height, width = item.lr.shape[:2]
    if sr.shape != (SCALE * height, SCALE * width, 3):
        raise LmrError(f"{item.image_id}: the method made {_size(sr)} of an LR of {width}x{height}")
    return np.ascontiguousarray(sr[: item.target.shape[0], : item.target.shape[1]])


def pixels_sha256(picture: Image) -> str:
    """Hex sha256 of a picture's size and pixels, whatever file it came from."""
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()


def _canvas(image_id: str, pictures: Sequence[Image], fixed: int | None) -> tuple[int, int]:
    height, width = (-(-max(picture.shape[axis] for picture in pictures) // SCALE) * SCALE for axis in (0, 1))
    if fixed is None:
        return height, width
    if max(height, width) > fixed:
        raise LmrError(
            f"{image_id}: pictures of up to {width}x{height} do not fit the official canvas of {fixed}x{fixed}; "
            "give --protocol native"
        )
    return fixed, fixed


def _cropped(picture: Image) -> Image:
    height, width = (side - side % SCALE for side in picture.shape[:2])
    return picture[:height, :width]


def _padded(picture: Image, height: int, width: int) -> Image:
    grow = ((0, height - picture.shape[0]), (0, width - picture.shape[1]), (0, 0))
    return np.pad(picture, grow) if height > picture.shape[0] or width > picture.shape[1] else picture


def _size(picture: Image) -> str:
    return f"{picture.shape[1]}x{picture.shape[0]}"
