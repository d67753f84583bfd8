"""Pictures that show a dataset: contact sheets of groups, distributions by tier, matches behind a group.

The contact sheet follows figure 2 of the LMR paper's supplement: target, High, Medium, Medium, Low, Low. Imports
`drawing`, whose pen it uses.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image as PilImage
from PIL import ImageDraw

from lmr_tools.drawing import (
    FAINT,
    INK,
    PAPER,
    RULE,
    TARGET,
    TIER_COLOURS,
    TIER_NAMES,
    chip,
    dashed,
    font,
    frame,
    new_canvas,
    save,
    scaled,
    write,
)
from lmr_tools.schema import Group, LmrError, PairRow, Reference, Tier

if TYPE_CHECKING:
    from lmr_tools.schema import Image

MARGIN = 26
CELL = 180
GAP = 18
HEADER = 44
CAPTION = 62
SMALL = 14
# Match drawings.
PANEL = (560, 420)
LINES = 40  # drawn per pair inside the target's crop, and as many outside; more hide the photos
BARS = 40


def contact_sheet(groups: Sequence[Group], path: Path) -> None:
    """Draw one row per group: the target, then its references by slot, with scores; `path` ends in .png or .jpg.

    Frames have the colour of the pair's own tier; where that is not the slot's, a line says so. A slot that only other
    groups fill is an empty box.
    """
    if not groups:
        raise LmrError(f"{path}: no groups to draw")
    slots = _slot_order({reference.slot for group in groups for reference in group.references})
    width = 2 * MARGIN + (CELL + GAP) * (1 + len(slots)) - GAP
    step = CELL + CAPTION + GAP
    picture, pen = new_canvas(width, MARGIN + HEADER + step * len(groups) + MARGIN - GAP)
    _header(pen, slots)
    for row, group in enumerate(groups):
        top = MARGIN + HEADER + row * step
        _target_cell(picture, pen, group, (MARGIN, top))
        filled = {reference.slot: reference for reference in group.references}
        for column, slot in enumerate(slots, 1):
            place = (MARGIN + column * (CELL + GAP), top)
            if slot in filled:
                _reference_cell(picture, pen, filled[slot], place)
            else:
                dashed(pen, (*place, place[0] + CELL, place[1] + CELL), RULE)
                write(pen, (place[0] + 10, place[1] + 8), "no reference", SMALL, FAINT)
    save(picture, path)


def _slot_order(slots: set[str]) -> list[str]:
    order = {str(tier): number for number, tier in enumerate(Tier)}
    return sorted(slots, key=lambda slot: (order.get(slot[:1], len(order)), len(slot), slot))


def _header(pen: ImageDraw.ImageDraw, slots: Sequence[str]) -> None:
    names = {str(tier): (TIER_NAMES[tier], TIER_COLOURS[tier]) for tier in Tier}
    labels = [("Target", TARGET), *(names.get(slot[:1], (slot, INK)) for slot in slots)]
    for column, (label, colour) in enumerate(labels):
        left = MARGIN + column * (CELL + GAP)
        write(pen, (left, MARGIN - 4), label, 20, INK, CELL)
        pen.rectangle((left, MARGIN + 24, left + CELL - 1, MARGIN + 27), fill=colour)


def _paste(
    picture: PilImage.Image, pen: ImageDraw.ImageDraw, image: Image, at: tuple[int, int], colour: str, tag: str = ""
) -> None:
    """A crop in the middle of its cell, framed, with a tag in its corner."""
    crop = scaled(image, CELL - 8, CELL - 8)
    left, top = at[0] + (CELL - crop.width) // 2, at[1] + (CELL - crop.height) // 2
    picture.paste(crop, (left, top))
    frame(pen, (left, top, left + crop.width, top + crop.height), colour)
    if tag:
        chip(pen, (left, top), tag, colour)


def _target_cell(picture: PilImage.Image, pen: ImageDraw.ImageDraw, group: Group, at: tuple[int, int]) -> None:
    _paste(picture, pen, group.target, at, TARGET)
    left, below = at[0], at[1] + CELL + 4
    write(pen, (left, below), group.group_id, SMALL, INK, CELL)
    write(pen, (left, below + 19), group.target_path, SMALL, FAINT, CELL)
    scene = group.scene if len(group.scene) <= 12 else f"{group.scene[:9]}..."
    write(pen, (left, below + 38), f"{group.split}, scene {scene}", SMALL, FAINT, CELL)


def _reference_cell(
    picture: PilImage.Image, pen: ImageDraw.ImageDraw, reference: Reference, at: tuple[int, int]
) -> None:
    colour = TIER_COLOURS[reference.tier]
    _paste(picture, pen, reference.pixels, at, colour, tag=reference.tier)
    left, below = at[0], at[1] + CELL + 4
    # An overlap of exactly 0 is no measurement: the pair was joined through another photo, or by its label.
    seen = f"overlap {reference.overlap:.2f}" if reference.overlap else "no own matches"
    scale = "" if reference.scale_ratio is None else f", scale {reference.scale_ratio:.2f}"
    text = "tier as published" if reference.overlap is None else f"{seen}{scale}"
    write(pen, (left, below), text, SMALL, INK, CELL)
    # Whichever encoder made it: CLIP, or a smaller one.
    score = "not embedded" if reference.clip_score is None else f"embedding {reference.clip_score:.2f}"
    write(pen, (left, below + 19), score, SMALL, INK, CELL)
    if not reference.slot.startswith(reference.tier):
        text = f"{reference.slot[:1]} slot, {TIER_NAMES[reference.tier]} pair"
        write(pen, (left, below + 38), text, SMALL, colour, CELL)
    else:
        write(pen, (left, below + 38), reference.path, SMALL, FAINT, CELL)


def tier_histograms(pairs: Iterable[PairRow], path: Path) -> None:
    """Draw how overlap and scale ratio of the graded pairs are spread, one row per tier.

    Ungraded pairs, and those that a published annotation graded without numbers, are left out.
    """
    values = {tier: (array("d"), array("d")) for tier in Tier}
    for pair in pairs:
        if pair.tier is not None and pair.overlap is not None and pair.scale_ratio is not None:
            overlaps, scales = values[Tier(pair.tier)]
            overlaps.append(pair.overlap)
            scales.append(pair.scale_ratio)
    width, height, left, top = 400, 110, 110, 70
    picture, pen = new_canvas(left + 2 * width + 3 * MARGIN, top + 3 * (height + GAP) + 30)
    write(pen, (MARGIN, 14), "Graded pairs by tier", 20)
    for column, title in enumerate(("overlap", "scale ratio")):
        x = left + column * (width + 2 * MARGIN)
        write(pen, (x, top - 24), title, 16)
        for row, tier in enumerate(Tier):
            box = (x, top + row * (height + GAP), x + width, top + row * (height + GAP) + height)
            _histogram(pen, box, np.array(values[tier][column]), TIER_COLOURS[tier], last=row == len(Tier) - 1)
    for row, tier in enumerate(Tier):
        y = top + row * (height + GAP)
        chip(pen, (MARGIN, y), TIER_NAMES[tier], TIER_COLOURS[tier])
        write(pen, (MARGIN, y + 30), f"{len(values[tier][0]):,}", SMALL, INK)
        write(pen, (MARGIN, y + 48), "pairs", SMALL, FAINT)
    save(picture, path)


def _histogram(
    pen: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    values: npt.NDArray[np.float64],
    colour: str,
    *,
    last: bool,
) -> None:
    left, top, right, bottom = box
    for tick in range(0, 11, 2):
        x = left + (right - left) * tick // 10
        pen.line((x, top, x, bottom), fill=RULE)
        if last:
            label = f"{tick / 10:.1f}"
            pen.text((x - font(SMALL).getlength(label) / 2, bottom + 6), label, font=font(SMALL), fill=FAINT)
    counts, _ = np.histogram(values, bins=BARS, range=(0.0, 1.0))
    highest = counts.max(initial=0)
    for number, count in enumerate(counts):
        if count:
            # A lone pair among thousands still shows as a line.
            tall = max(1, round((bottom - top - 18) * int(count) / int(highest)))
            x0, x1 = (left + (right - left) * place // BARS for place in (number, number + 1))
            pen.rectangle((x0, bottom - tall, x1 - 2, bottom), fill=colour)
    pen.line((left, bottom, right, bottom), fill=INK)
    if len(values):
        text = f"median {np.median(values):.2f}"
        # The label stands away from the tallest bar.
        x = left + 4 if counts.argmax() >= BARS // 2 else right - font(SMALL).getlength(text) - 4
        pen.rectangle((x - 2, top, x + font(SMALL).getlength(text) + 2, top + 17), fill=PAPER)
        pen.text((x, top), text, font=font(SMALL), fill=INK)


@dataclass(frozen=True, kw_only=True)
class MatchView:
    """One reference of a match drawing: its picture, crop box (x, y, side) in it, matched points (n, 2) of both."""

    image: Image
    box: tuple[int, int, int] | None
    tier: Tier
    slot: str
    title: str
    lines: tuple[str, ...]
    target_points: npt.NDArray[np.float64]
    points: npt.NDArray[np.float64]


def match_sheet(
    target: Image, box: tuple[int, int, int] | None, title: str, views: Sequence[MatchView], path: Path
) -> None:
    """Draw the target beside each reference, crop boxes on both, and lines between matched points.

    Points and boxes are pixels of the pictures given. Matches that start inside the target's crop are drawn in the
    tier's colour, the others grey; at most 40 of either kind, chosen evenly.
    """
    left = scaled(target, *PANEL)
    rights = [scaled(view.image, *PANEL) for view in views]
    width = 2 * MARGIN + left.width + 2 * GAP + max((right.width for right in rights), default=0)
    heights = [max(left.height, right.height) + 66 + 18 * len(view.lines) for right, view in zip(rights, views)]
    picture, pen = new_canvas(max(width, 760), MARGIN + 44 + sum(heights))
    write(pen, (MARGIN, MARGIN - 8), title, 20, INK, picture.width - 2 * MARGIN)
    top = MARGIN + 34
    for view, right, height in zip(views, rights, heights, strict=True):
        colour = TIER_COLOURS[view.tier]
        chip(pen, (MARGIN, top), view.slot, colour)
        write(pen, (MARGIN + 50, top + 1), view.title, 16, INK, picture.width - 2 * MARGIN - 50)
        for number, line in enumerate(view.lines):
            write(pen, (MARGIN, top + 28 + 18 * number), line, SMALL, FAINT, picture.width - 2 * MARGIN)
        y = top + 34 + 18 * len(view.lines)
        places = ((MARGIN, y), (MARGIN + left.width + 2 * GAP, y))
        picture.paste(left, places[0])
        picture.paste(right, places[1])
        _match_lines(picture, target, left, right, box, view, places)
        _crop_box(pen, box, left.width / target.shape[1], places[0], TARGET)
        _crop_box(pen, view.box, right.width / view.image.shape[1], places[1], colour)
        top += height
    save(picture, path)


def _crop_box(
    pen: ImageDraw.ImageDraw, box: tuple[int, int, int] | None, scale: float, at: tuple[int, int], colour: str
) -> None:
    if box is not None:
        x, y, side = (round(value * scale) for value in box)
        for width, line in ((5, PAPER), (3, colour)):
            frame(pen, (at[0] + x, at[1] + y, at[0] + x + side, at[1] + y + side), line, width)


def _match_lines(
    picture: PilImage.Image,
    target: Image,
    left: PilImage.Image,
    right: PilImage.Image,
    box: tuple[int, int, int] | None,
    view: MatchView,
    places: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    inside = np.ones(len(view.points), dtype=bool)
    if box is not None:
        offset = view.target_points - np.array(box[:2])
        inside = ((offset >= 0) & (offset < box[2])).all(axis=1)
    layer = PilImage.new("RGBA", picture.size)
    pen = ImageDraw.Draw(layer)
    # Grey first, so that the lines that start in the crop lie on top.
    for colour, width, own in (("#8a8f99a0", 1, ~inside), (f"{TIER_COLOURS[view.tier]}e6", 2, inside)):
        numbers = np.flatnonzero(own)
        numbers = numbers[np.unique(np.linspace(0, len(numbers) - 1, min(LINES, len(numbers))).astype(int))]
        starts = view.target_points[numbers] * (left.width / target.shape[1]) + places[0]
        ends = view.points[numbers] * (right.width / view.image.shape[1]) + places[1]
        for (x0, y0), (x1, y1) in zip(starts.tolist(), ends.tolist(), strict=True):
            pen.line((x0, y0, x1, y1), fill=colour, width=width)
            for x, y in ((x0, y0), (x1, y1)):
                pen.ellipse((x - 2.5, y - 2.5, x + 2.5, y + 2.5), fill=colour)
    picture.paste(layer, (0, 0), layer)
