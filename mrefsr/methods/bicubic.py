"""Pillow's bicubic enlargement: the floor that every method has to beat. It looks at no reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmr_tools.images import upscale

if TYPE_CHECKING:
    from lmr_tools.schema import Image


def bicubic(lr: Image, references: Sequence[Image]) -> Image:
    """uint8 h,w,3 -> uint8 4h,4w,3."""
    return upscale(lr)
