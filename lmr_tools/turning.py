"""Places in a photo as it is stored -> in the photo as it is decoded here, turned by its EXIF orientation.

Published annotations and reconstructions count pixels of the stored picture; `images.decode` turns it first. Imports
`sources`, which reads the photos.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image as PilImage

from lmr_tools.images import FORMATS, BadImage
from lmr_tools.schema import ImageRow
from lmr_tools.sources import Source, read_bytes

ORIENTATION = 0x0112  # EXIF tag
# Orientation -> corner of a box of side s in the turned picture; x, y: its corner, w, h: size of the stored picture.
# With s = 0 and coordinates that count from the picture's edge it turns points.
TURNS: Mapping[int, Callable[..., tuple[Any, Any]]] = {
    1: lambda x, y, s, w, h: (x, y),
    2: lambda x, y, s, w, h: (w - x - s, y),
    3: lambda x, y, s, w, h: (w - x - s, h - y - s),
    4: lambda x, y, s, w, h: (x, h - y - s),
    5: lambda x, y, s, w, h: (y, x),
    6: lambda x, y, s, w, h: (h - y - s, x),
    7: lambda x, y, s, w, h: (h - y - s, w - x - s),
    8: lambda x, y, s, w, h: (y, w - x - s),
}


def orientation_of(data: bytes) -> int:
    """EXIF orientation 1 to 8 of a photo's bytes; 1 when it has none, or a header that can not be read."""
    try:
        with PilImage.open(io.BytesIO(data), formats=FORMATS) as picture:
            value = picture.getexif().get(ORIENTATION, 1)
    except (OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError):
        return 1
    return value if isinstance(value, int) and value in TURNS else 1


def orientation(row: ImageRow, *, sources: tuple[Source, ...]) -> int:
    """`orientation_of` a scanned photo."""
    try:
        return orientation_of(read_bytes(sources, row))
    except BadImage:
        return 1


def turned(x: Any, y: Any, size: int, orientation: int, width: int, height: int) -> tuple[Any, Any]:
    """Corner in the decoded photo, which is `width` x `height`, of the box of side `size` at (x, y) in the stored one.

    Numbers or arrays.
    """
    stored = (height, width) if orientation >= 5 else (width, height)
    return TURNS[orientation](x, y, size, *stored)
