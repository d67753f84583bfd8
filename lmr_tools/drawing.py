"""Canvas, colours and type of the pictures that this toolkit draws. Pillow only; equal input gives equal bytes."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image as PilImage
from PIL import ImageDraw, ImageFont

from lmr_tools.schema import LmrError, Tier
from lmr_tools.tables import atomic_path

if TYPE_CHECKING:
    from lmr_tools.schema import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom

PAPER = "#ffffff"
INK = "#1f2430"
FAINT = "#6b7280"
RULE = "#d9dde3"
TARGET = "#2b5fb8"
# Told apart by lightness too, for print and for colour-blind readers; every use carries the letter as well.
TIER_COLOURS = {Tier.HIGH: "#1a7f4b", Tier.MEDIUM: "#d98a00", Tier.LOW: "#b3324b"}
TIER_NAMES = {Tier.HIGH: "High", Tier.MEDIUM: "Medium", Tier.LOW: "Low"}
FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG", "compress_level": 6},
    ".jpg": {"format": "JPEG", "quality": 90, "subsampling": 0},
    ".jpeg": {"format": "JPEG", "quality": 90, "subsampling": 0},
}


@lru_cache(maxsize=16)
def font(size: int) -> Any:
    """Pillow's own scalable font."""
    return ImageFont.load_default(size)


def new_canvas(width: int, height: int) -> tuple[PilImage.Image, ImageDraw.ImageDraw]:
    """An empty picture and its pen."""
    picture = PilImage.new("RGB", (width, height), PAPER)
    return picture, ImageDraw.Draw(picture)


def save(picture: PilImage.Image, path: Path) -> None:
    """Write a .png or .jpg, atomically; another suffix is an `LmrError`."""
    settings = FORMATS.get(path.suffix.lower())
    if settings is None:
        raise LmrError(f"{path}: pictures are written as .png or .jpg; use one of these endings")
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        picture.save(file, **settings)


def fit(text: str, size: int, width: float) -> str:
    """`text`, its middle replaced by three dots until it is at most `width` pixels wide."""
    if font(size).getlength(text) <= width:
        return text
    for kept in range(len(text) - 1, 0, -1):
        short = f"{text[: kept // 3]}...{text[len(text) - (kept - kept // 3) :]}"
        if font(size).getlength(short) <= width:
            return short
    return ""


def write(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, colour: str = INK, width: float = 1e9
) -> None:
    """One line of text with its top left corner at `at`, shortened to `width`."""
    pen.text(at, fit(" ".join(text.split()), size, width), font=font(size), fill=colour)


def chip(pen: ImageDraw.ImageDraw, at: tuple[int, int], text: str, colour: str, size: int = 15) -> None:
    """White text on a coloured tag with its top left corner at `at`."""
    wide = font(size).getlength(text)
    pen.rectangle((at[0], at[1], at[0] + wide + 11, at[1] + size + 7), fill=colour)
    pen.text((at[0] + 6, at[1] + 2), text, font=font(size), fill=PAPER)


def frame(pen: ImageDraw.ImageDraw, box: Box, colour: str, width: int = 4) -> None:
    """A frame of `width` pixels around, not over, `box`."""
    left, top, right, bottom = box
    pen.rectangle((left - width, top - width, right + width - 1, bottom + width - 1), outline=colour, width=width)


def scaled(image: Image, width: int, height: int) -> PilImage.Image:
    """`image` at the largest size that fits into width x height."""
    picture = PilImage.fromarray(image)
    factor = min(width / picture.width, height / picture.height)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    return picture.resize(size, PilImage.Resampling.LANCZOS) if size != picture.size else picture


def dashed(pen: ImageDraw.ImageDraw, box: Box, colour: str, step: int = 6) -> None:
    """A dashed rectangle just inside `box`."""
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    for start in range(left, right, 2 * step):
        for y in (top, bottom):
            pen.line((start, y, min(start + step, right), y), fill=colour)
    for start in range(top, bottom, 2 * step):
        for x in (left, right):
            pen.line((x, start, x, min(start + step, bottom)), fill=colour)
