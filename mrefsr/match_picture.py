"""A picture of what each reference gave: the result, the same in grey under the references' colours, and a legend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image as PilImage

from lmr_tools.drawing import FAINT, INK, PAPER, RULE, fit, font, frame, new_canvas, scaled, write

if TYPE_CHECKING:
    from lmr_tools.schema import Image

# Told apart by colour-blind readers too (Okabe and Ito's palette without black); the numbers are beside them.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#f0e442")
MARGIN, GAP, TITLE = 24, 16, 34
PANEL = 720  # pixels, longer side of either picture
THUMB, CAPTION = 150, 44
REGION = 1 / 50  # of the longer side: shares are averaged over such squares, so that regions show and not pixels
FAINTEST, STRONGEST = 0.25, 0.75  # of the colour: where references share alike, and where one alone gives


def draw_matches(
    image: Image, references: Sequence[Image], names: Sequence[str], shares: npt.NDArray[np.float32]
) -> PilImage.Image:
    """Draw which reference each region took its detail from.

    image uint8 4h,4w,3; `shares` float32 N,h,w as in `SuperResolved`; one name for each of the N references. A region
    has the colour of the reference with the largest share, the stronger the larger that share is.
    """
    if not len(references) == len(names) == len(shares):
        raise ValueError(f"{len(references)} references, {len(names)} names, {len(shares)} shares")
    left = scaled(image, PANEL, PANEL)
    right = PilImage.fromarray(tint(np.asarray(left), shares))
    across = 2 * left.width + GAP
    columns = max(1, (across + GAP) // (THUMB + GAP))
    rows = -(-len(references) // columns)
    legend = rows * (THUMB + CAPTION + GAP) + (GAP if rows else 0)
    canvas, pen = new_canvas(across + 2 * MARGIN, 2 * MARGIN + TITLE + left.height + legend)
    canvas.paste(left, (MARGIN, MARGIN + TITLE))
    canvas.paste(right, (MARGIN + left.width + GAP, MARGIN + TITLE))
    write(pen, (MARGIN, MARGIN), "result", 18, INK, left.width)
    title = "the reference that each region draws on most" if names else "no reference was given"
    write(pen, (MARGIN + left.width + GAP, MARGIN), title, 18, INK, left.width)
    most = _most(_by_region(shares))
    for number, (reference, name) in enumerate(zip(references, names, strict=True)):
        row, column = divmod(number, columns)
        x = MARGIN + column * (THUMB + GAP)
        y = MARGIN + TITLE + left.height + 2 * GAP + row * (THUMB + CAPTION + GAP)
        colour = COLOURS[number % len(COLOURS)]
        thumb = scaled(reference, THUMB - 8, THUMB - 8)
        place = (x + (THUMB - thumb.width) // 2, y + (THUMB - thumb.height) // 2)
        pen.rectangle((x, y, x + THUMB - 1, y + THUMB - 1), outline=RULE)
        canvas.paste(thumb, place)
        frame(pen, (*place, place[0] + thumb.width, place[1] + thumb.height), colour, 4)
        pen.rectangle((x, y, x + 25, y + 25), fill=colour)
        ink = INK if _light(colour) else PAPER
        pen.text((x + 13, y + 13), str(number + 1), font=font(17), fill=ink, anchor="mm")
        pen.text((x, y + THUMB + 4), fit(" ".join(name.split()), 14, THUMB), font=font(14), fill=INK)
        first = f"leads in {(most == number).mean():.0%}"
        write(pen, (x, y + THUMB + 23), f"{first}, share {shares[number].mean():.0%}", 13, FAINT, THUMB)
    return canvas


def tint(image: Image, shares: npt.NDArray[np.float32]) -> Image:
    """`image` H,W,3 in grey under the colour of the reference with the largest share at each place; `shares` N,h,w."""
    weights = np.array([0.299, 0.587, 0.114])
    grey = np.repeat((image @ weights)[:, :, None], 3, axis=2)
    if not len(shares):
        return np.asarray(grey.round().astype(np.uint8))
    height, width = image.shape[:2]
    shares = _by_region(shares)
    strength = PilImage.fromarray(_strength(shares)).resize((width, height), PilImage.Resampling.BILINEAR)
    most = PilImage.fromarray(_most(shares).astype(np.int32)).resize((width, height), PilImage.Resampling.NEAREST)
    palette = np.array([_rgb(colour) for colour in COLOURS], dtype=np.float64)
    colour = palette[np.asarray(most) % len(COLOURS)]
    opaque = np.asarray(strength)[:, :, None]
    return np.asarray(np.clip(grey * (1 - opaque) + colour * opaque, 0, 255).round().astype(np.uint8))


def _by_region(shares: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Each reference's mean share around every place; the means sum to 1 as the shares do."""
    if not len(shares):
        return shares
    reach = round(max(shares.shape[1:]) * REGION / 2)
    side = 2 * reach + 1
    given = torch.from_numpy(shares)
    return np.asarray(F.avg_pool2d(given, side, stride=1, padding=reach, count_include_pad=False).numpy())


def _most(shares: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    return np.asarray(shares.argmax(0)) if len(shares) else np.zeros(shares.shape[1:], np.int64)


def _strength(shares: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    even = 1 / len(shares)
    lead = (shares.max(0) - even) / (1 - even) if len(shares) > 1 else np.ones(shares.shape[1:])
    return (FAINTEST + (STRONGEST - FAINTEST) * np.clip(lead, 0, 1)).astype(np.float32)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _light(colour: str) -> bool:
    red, green, blue = _rgb(colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue > 140
