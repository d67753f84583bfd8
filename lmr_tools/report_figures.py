"""The pictures of a report: which targets and which crop of each are shown, and the crops as data URIs.

Targets, LR and references come from the test set again, laid out as `testset_layouts` knows, read through `testsets`
and prepared by `protocol`; the folder is in the settings of each run. SR pictures lie beside the `results`; `metrics`
gives luma, `drawing` the frame of the crop, `comparison` names pictures and metrics. Crops are PNG, so what is seen is
what was measured; the rest is JPEG.
"""

from __future__ import annotations

import base64
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from PIL import Image as PilImage
from PIL import ImageDraw

from lmr_tools.comparison import METRICS, Key, per_image
from lmr_tools.drawing import TARGET, frame, scaled
from lmr_tools.images import decode, encode_png
from lmr_tools.metrics import luma
from lmr_tools.protocol import Item, pixels_sha256
from lmr_tools.schema import LmrError, ResultRow, Split
from lmr_tools.testset_layouts import Entry
from lmr_tools.testsets import plan_testset, read_items

if TYPE_CHECKING:
    from lmr_tools.schema import Image

CROP = 128  # pixels of the target a side, at most
STEP = 4  # crops begin on pixels of the LR
METHODS = 12  # SR pictures in a figure, at most
REFERENCES = 6
OVERVIEW, THUMBNAIL = 420, 150  # long sides


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One crop of a figure: `uri` its picture, `name` what it is, `caption` its numbers over the whole picture."""

    name: str
    caption: str
    uri: str
    kind: str  # gt | lr | sr


@dataclass(frozen=True, kw_only=True)
class Thumbnail:
    """One reference, whole."""

    name: str
    tier: str
    uri: str


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One target: the whole picture with its crop marked, the crops, the references, and how many more there are."""

    image_id: str
    why: str
    size: str
    overview: str
    tiles: tuple[Tile, ...]
    references: tuple[Thumbnail, ...]
    more_references: int

    @property
    def bytes(self) -> int:
        """Room that the pictures take in the page."""
        parts = [self.overview, *(tile.uri for tile in self.tiles), *(shown.uri for shown in self.references)]
        return sum(map(len, parts))


@dataclass(frozen=True, kw_only=True)
class Pictured:
    """One run of a test set: its name in the report, its rows, the folder of each, and the settings if known."""

    name: str
    rows: Sequence[ResultRow]
    folders: Mapping[ResultRow, Path]
    settings: Mapping[str, Any] | None


def ranking(runs: Sequence[Sequence[ResultRow]]) -> list[tuple[Key, str]]:
    """Pictures in the order in which they deserve a figure, each with the reason in words.

    With several runs: by how far the best and the worst of them lie apart in PSNR on Y (or in the first metric that
    there is). With one run: spread evenly over its results from the worst to the best. Rows without numbers are left
    out.
    """
    for metric in ("psnr_y", *METRICS):
        values: dict[Key, list[float]] = {}
        for run in runs:
            for key, value in per_image(run, metric).items():
                if math.isfinite(value):
                    values.setdefault(key, []).append(value)
        if values:
            break
    else:
        return []
    unit = " dB" if metric.startswith("psnr") else ""
    digits = 2 if unit else 4
    several = {key: max(found) - min(found) for key, found in values.items() if len(found) > 1}
    if several:
        order = sorted(several, key=lambda key: (-several[key], str(key)))
        return [(key, f"methods differ by up to {several[key]:.{digits}f}{unit}") for key in order]
    ranks = sorted(values, key=lambda key: (values[key][0], str(key)))
    if metric.startswith("lpips"):
        ranks.reverse()
    place = {key: number for number, key in enumerate(ranks, 1)}
    return [(ranks[n], f"{place[ranks[n]]} of {len(ranks)}, 1 is the worst") for n in _spread(len(ranks))]


def _spread(count: int) -> list[int]:
    """0 to count - 1, each next one far from those before: the ends, the middle, the quarters ..."""
    order = dict.fromkeys([0, count - 1])
    parts = 2
    while len(order) < count:
        order |= dict.fromkeys(round(number * (count - 1) / parts) for number in range(1, parts))
        parts *= 2
    return list(order)[:count]


def figures(
    runs: Sequence[Pictured], *, count: int, room: int, data: Path | None = None
) -> tuple[list[Figure], list[str]]:
    """At most `count` figures of one test set, of at most `room` bytes together; and notes for the reader.

    `data` names where the test set lies now, where it is not where the settings say. Pictures that are gone are a note.
    """
    wanted = ranking([run.rows for run in runs])[:count]
    if not wanted or count < 1:
        return [], []
    entries, settings, notes = _test_set(runs, data)
    if settings is None:
        return [], notes
    found: list[Figure] = []
    reasons = {key[0]: (key, why) for key, why in wanted}
    for item, native in _items([entries[name] for name in reasons if name in entries], settings, notes):
        key, why = reasons[item.image_id]
        if key[1] is not None and pixels_sha256(item.target) != key[1]:
            notes.append(f"{item.image_id}: its target is not the picture any more that was measured, no figure")
            continue
        shown = _shown(runs, key, item.target.shape, notes)
        if shown:
            found.append(_figure(item, native, shown, why))
    order = list(reasons)
    found.sort(key=lambda figure: order.index(figure.image_id))
    if missing := [name for name in reasons if name not in entries]:
        notes.append(f"{missing[0]}: not in the test set's folder any more" + _more(len(missing)))
    kept: list[Figure] = []
    taken = 0
    for figure in found:
        taken += figure.bytes
        if taken > room:
            notes.append(f"{len(kept)} of {len(found)} figures fit in the room for pictures (--megabytes)")
            break
        kept.append(figure)
    return kept, notes


def _more(count: int) -> str:
    return f", nor are {count - 1} others" if count > 1 else ""


def _test_set(
    runs: Sequence[Pictured], data: Path | None
) -> tuple[dict[str, Entry], Mapping[str, Any] | None, list[str]]:
    """Entries by name and the settings that led to them; without, notes that say why."""
    reasons: dict[str, None] = {}
    for run in runs:
        if run.settings is None:
            continue
        try:
            split = Split(run.settings.get("split") or Split.TEST)
            plan = plan_testset(run.settings["benchmark"], data or Path(run.settings["data"]), split)
        except (LmrError, OSError, KeyError, ValueError, TypeError) as error:
            reasons[" ".join(str(error).split())] = None
            continue
        return {entry.image_id: entry for entry in plan.entries}, run.settings, []
    reasons = reasons or {"only tables were given, not the folders of lmr evaluate": None}
    return {}, None, [f"No figures: {reason}" for reason in reasons]


def _items(entries: list[Entry], settings: Mapping[str, Any], notes: list[str]) -> Iterator[tuple[Item, Item]]:
    """Each target as the method saw it, and with its references unpadded."""
    entries.sort(key=lambda entry: (str(entry.target), entry.image_id))
    found = [
        read_items(entries, benchmark=settings["benchmark"], protocol=protocol)
        for protocol in (settings["protocol"], "native")
    ]
    for (_, item), (_, native) in zip(*found, strict=True):
        failed = next((each for each in (item, native) if isinstance(each, LmrError)), None)
        if failed is not None:
            notes.append(" ".join(str(failed).split()))
        elif isinstance(item, Item) and isinstance(native, Item):
            yield item, native


def _shown(
    runs: Sequence[Pictured], key: Key, shape: tuple[int, ...], notes: list[str]
) -> list[tuple[str, ResultRow, Image]]:
    """Name, row and SR picture of every run that has one; of several rows of a picture the first."""
    found = []
    for run in runs[:METHODS]:
        rows = [row for row in run.rows if (row.image_id, row.target_sha256) == key and row.failure is None and row.sr]
        row = min(rows, key=lambda row: row.reference_ids, default=None)
        if row is None or row not in run.folders:
            continue
        path = (run.folders[row] / str(row.sr)).resolve()
        try:
            if not path.is_relative_to(run.folders[row].resolve()):
                raise LmrError("lies outside of its folder")
            sr = decode(path.read_bytes())
            if sr.shape != shape:
                raise LmrError("is not of the target's size")
        except (LmrError, OSError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            notes.append(f"{row.image_id}: the SR picture of {run.name} is left out ({reason})")
            continue
        found.append((run.name, row, sr))
    return found


def _figure(item: Item, native: Item, shown: Sequence[tuple[str, ResultRow, Image]], why: str) -> Figure:
    x, y, side = crop_place(item.target, [sr for _, _, sr in shown])
    box = slice(y, y + side), slice(x, x + side)
    small = slice(y // STEP, (y + side) // STEP), slice(x // STEP, (x + side) // STEP)
    tiles = [Tile(name="GT", caption="", uri=_png(item.target[box]), kind="gt")]
    tiles.append(Tile(name="LR", caption="", uri=_png(item.lr[small]), kind="lr"))
    tiles += [Tile(name=name, caption=_caption(row), uri=_png(sr[box]), kind="sr") for name, row, sr in shown]
    whole = scaled(item.target, OVERVIEW, OVERVIEW)
    ratio = whole.width / item.target.shape[1]
    corners = tuple(round(value * ratio) for value in (x, y, x + side, y + side))
    pen = ImageDraw.Draw(whole)
    for width, colour in ((5, "#ffffff"), (3, TARGET)):
        frame(pen, corners, colour, width)  # type: ignore[arg-type]
    first = zip(native.reference_ids, native.tiers, native.references, strict=True)
    references = [
        Thumbnail(name=name, tier=tier, uri=_jpeg(scaled(picture, THUMBNAIL, THUMBNAIL)))
        for name, tier, picture in itertools.islice(first, REFERENCES)
    ]
    return Figure(
        image_id=item.image_id,
        why=why,
        size=f"{item.target.shape[1]}x{item.target.shape[0]}, crop {side}x{side} at {x}, {y}",
        overview=_jpeg(whole),
        tiles=tuple(tiles),
        references=tuple(references),
        more_references=max(0, len(native.references) - REFERENCES),
    )


def crop_place(target: Image, pictures: Sequence[Image]) -> tuple[int, int, int]:
    """x, y and side of the square crop where the pictures differ most: mean over the crop of the standard deviation of
    luma among them; of one picture, of its absolute difference from the target. Multiples of 4."""
    height, width = target.shape[:2]
    # A crop of more than half of a small picture would show no place.
    side = max(STEP, min(CROP, min(height, width) // 2) // STEP * STEP)
    if len(pictures) > 1:
        spread = np.std([luma(picture).astype(np.float32) for picture in pictures], axis=0)
    else:
        spread = np.abs(luma(pictures[0]) - luma(target))
    sums = cv2.integral(spread.astype(np.float64))
    tops = np.arange(0, height - side + 1, STEP)[:, None]
    lefts = np.arange(0, width - side + 1, STEP)[None, :]
    boxes = sums[tops + side, lefts + side] - sums[tops, lefts + side] - sums[tops + side, lefts] + sums[tops, lefts]
    # Rounded, so that the order of a sum does not choose between equal places.
    row, column = np.unravel_index(int(np.argmax(np.round(boxes, 3))), boxes.shape)
    return int(lefts[0, column]), int(tops[row, 0]), side


def _caption(row: ResultRow) -> str:
    parts = []
    if row.psnr_y is not None:
        parts.append(f"{row.psnr_y:.2f} dB")
    if row.ssim_y is not None:
        parts.append(f"SSIM {row.ssim_y:.4f}")
    if row.lpips_alex is not None:
        parts.append(f"LPIPS {row.lpips_alex:.3f}")
    return ", ".join(parts)


def _png(picture: Image) -> str:
    return "data:image/png;base64," + base64.b64encode(encode_png(np.ascontiguousarray(picture))).decode()


def _jpeg(picture: PilImage.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
