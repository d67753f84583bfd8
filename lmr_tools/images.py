"""Bytes -> RGB uint8 HWC and back; Pillow's bicubic resizing, which is the protocol's.

Decoding treats every file as hostile: only JPEG, PNG, WebP and TIFF are tried, the header is judged before any pixel is
decoded, and then every pixel is decoded, because `verify()` misses truncated JPEGs.
"""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image as PilImage
from PIL import ImageOps, UnidentifiedImageError

from lmr_tools.schema import LmrError

if TYPE_CHECKING:
    from lmr_tools.schema import Image

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff")
MAX_BYTES = 512 * 2**20
MAX_PIXELS = 200_000_000
MAX_ASPECT = 20
LONGEST_REASON = 120
if PilImage.MAX_IMAGE_PIXELS is not None:  # Pillow itself refuses twice this number, which phones' 200 megapixels pass
    PilImage.MAX_IMAGE_PIXELS = max(PilImage.MAX_IMAGE_PIXELS, MAX_PIXELS // 2)


class BadImage(LmrError):
    """A file that can not become an RGB picture; `reason` is the word that stands in the `rejects` table."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type, tuple[str, str]]:
        # Worker processes send errors back pickled; the default would pass the joined message as one argument.
        return type(self), (self.reason, self.detail)


def decode(data: bytes, *, enough: int | None = None) -> Image:
    """Decode a photo to RGB uint8 (H, W, 3), turned as its EXIF orientation says.

    `enough`: a JPEG is decoded at 1/2, 1/4 or 1/8 as long as both sides keep this many pixels, which takes a fraction
    of the time; every byte of it is read all the same.

    Transparency is laid over white, grey and CMYK become RGB, 16 bits are scaled to 8. Raises `BadImage` for: empty,
    not an image, too many bytes or pixels, extreme aspect ratio, more than one frame, truncated or broken data.
    """
    if not data:
        raise BadImage("empty file", "0 bytes")
    if len(data) > MAX_BYTES:
        raise BadImage("too large", f"{len(data)} bytes, the limit is {MAX_BYTES}")
    try:
        with warnings.catch_warnings():
            # Pillow's bomb check warns below its own error limit; ours is the pixel count just below.
            warnings.simplefilter("ignore")
            picture = PilImage.open(io.BytesIO(data), formats=FORMATS)
            _check_header(picture)
            if enough is not None and picture.format == "JPEG":
                picture.draft(None, (enough, enough))
            picture.load()
            return _to_rgb(picture)
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage("not an image", "no JPEG, PNG, WebP or TIFF header") from None
    except PilImage.DecompressionBombError as error:
        raise BadImage("too many pixels", str(error)[:LONGEST_REASON]) from None
    except MemoryError:
        # A damaged header that asks for too much, or a machine that is short of memory: not judged for good.
        raise BadImage("unreadable", "memory ran out; run again with fewer workers, or the file is damaged") from None
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError) as error:
        # The decoders raise all of these on damaged input.
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadImage("broken", text[:LONGEST_REASON]) from None


def _check_header(picture: PilImage.Image) -> None:
    width, height = picture.size
    if width * height > MAX_PIXELS:
        raise BadImage("too many pixels", f"{width}x{height}, the limit is {MAX_PIXELS}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise BadImage("extreme aspect ratio", f"{width}x{height}, the limit is {MAX_ASPECT}:1")
    frames = getattr(picture, "n_frames", 1)
    # Phones write a second, small picture (MPO) into ordinary JPEGs; Pillow opens those as JPEG here.
    if frames > 1 and picture.format != "MPO":
        raise BadImage("animated", f"{frames} frames")


def _to_rgb(picture: PilImage.Image) -> Image:
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith(("I", "F")):
        values = np.asarray(picture, dtype=np.float64)
        # 16-bit grey opens as I;16 or I with values to 65535; floats in [0, 1] or in 8-bit range.
        top = 65535.0 if picture.mode.startswith("I") else (1.0 if values.max(initial=0) <= 1 else 255.0)
        grey = np.clip(np.rint(values * (255.0 / top)), 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if picture.has_transparency_data:
        layer = picture.convert("RGBA")
        ground = PilImage.new("RGBA", layer.size, (255, 255, 255, 255))
        picture = PilImage.alpha_composite(ground, layer)
    return np.ascontiguousarray(np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB")))


def encode_png(image: Image) -> bytes:
    """PNG bytes of an RGB uint8 picture; equal pixels give equal bytes."""
    # Level 4 takes about half the time of Pillow's default 6 for 1 % more bytes (crops of photos).
    buffer = io.BytesIO()
    PilImage.fromarray(image).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


def resize(image: Image, width: int, height: int) -> Image:
    """Pillow's bicubic (antialiased) resize of an RGB uint8 picture, the resampling of the published protocol."""
    return np.asarray(PilImage.fromarray(image).resize((width, height), PilImage.Resampling.BICUBIC))


def downscale(image: Image, scale: int = 4) -> Image:
    """The LR of a GT picture (H, W, 3): Pillow bicubic at 1/scale, 8-bit. H and W must be multiples of `scale`."""
    height, width = image.shape[:2]
    if height % scale or width % scale:
        raise ValueError(f"{width}x{height} is not a multiple of {scale}")
    return resize(image, width // scale, height // scale)


def upscale(image: Image, scale: int = 4) -> Image:
    """Pillow bicubic at x scale, 8-bit: the matching input of the reference-based methods and the bicubic baseline."""
    height, width = image.shape[:2]
    return resize(image, width * scale, height * scale)
