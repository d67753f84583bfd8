"""Held-out groups through the averaged network: PSNR and SSIM beside the bicubic baseline, and pictures to look at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from lmr_tools import drawing
from lmr_tools.metrics import psnr_y, ssim_y
from mrefsr.data import Batch
from mrefsr.machines import Machine
from mrefsr.model import MRefSR

if TYPE_CHECKING:
    from lmr_tools.schema import Image

CELL, GAP, TOP, BOTTOM = 160, 8, 30, 24  # of the sheet, pixels
SHOWN_REFERENCES = 5
HIGHEST_PSNR = 100.0  # what an infinite one counts as in a mean


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One group's row on the sheet; pictures RGB uint8."""

    group_id: str
    lr: Image
    bicubic: Image
    sr: Image
    target: Image
    references: tuple[Image, ...]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Numbers of one group: PSNR in dB and SSIM on Y, border 4, of the 8-bit pictures."""

    group_id: str
    psnr: float
    ssim: float
    bicubic_psnr: float
    bicubic_ssim: float
    shown: Shown | None = None


def validate(model: MRefSR, batches: Iterable[Batch], machine: Machine, pictures: int) -> list[Scored]:
    """Score the groups of `batches`, one a batch: this process's share of them, such as `validation_batches` deals out.

    Returns, in the first process, the scores of all processes' groups in the order of the split, the first `pictures`
    with their pictures; in the others an empty list. Runs in float32.
    """
    own = []
    training = model.training
    model.eval()
    with torch.inference_mode():
        for number, batch in enumerate(batches):
            sr = model(batch.lr, batch.enlarged, batch.references, batch.mask)
            shown = number * machine.world_size + machine.rank < pictures
            own.append(_score(batch, sr, shown))
    model.train(training)
    shares = machine.gather(own)
    if not machine.first:
        return []
    longest = max(len(share) for share in shares)
    return [share[row] for row in range(longest) for share in shares if row < len(share)]


def means(scored: Sequence[Scored]) -> dict[str, float]:
    """Mean of each number over the groups, and their count."""
    names = ("psnr", "ssim", "bicubic_psnr", "bicubic_ssim")
    values = {name: [min(getattr(score, name), HIGHEST_PSNR) for score in scored] for name in names}
    return {name: float(np.mean(numbers)) for name, numbers in values.items()} | {"groups": len(scored)}


def _score(batch: Batch, sr: Tensor, with_pictures: bool) -> Scored:
    restored, target, bicubic = _picture(sr[0]), _picture(batch.target[0]), _picture(batch.enlarged[0])
    shown = None
    if with_pictures:
        shown = Shown(
            group_id=batch.group_ids[0],
            lr=_picture(batch.lr[0]),
            bicubic=bicubic,
            sr=restored,
            target=target,
            references=tuple(_picture(picture) for picture in batch.references[0][batch.mask[0]]),
        )
    return Scored(
        group_id=batch.group_ids[0],
        psnr=psnr_y(restored, target),
        ssim=ssim_y(restored, target),
        bicubic_psnr=psnr_y(bicubic, target),
        bicubic_ssim=ssim_y(bicubic, target),
        shown=shown,
    )


def _picture(image: Tensor) -> Image:
    """float 3,H,W -> uint8 H,W,3."""
    levels = (image.clamp(0, 1) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(levels.permute(1, 2, 0).cpu().numpy())


def draw_sheet(path: Path, scored: Sequence[Scored], step: int) -> None:
    """Write the shown groups as one PNG: a row each of LR, bicubic, SR, GT and its references, with PSNR below."""
    rows = [score for score in scored if score.shown is not None]
    widest = max(min(len(score.shown.references), SHOWN_REFERENCES) for score in rows if score.shown)
    names = ["LR", "bicubic x4", f"SR, step {step:,}", "GT", *(f"reference {n + 1}" for n in range(widest))]
    height = CELL + BOTTOM + GAP
    picture, pen = drawing.new_canvas(len(names) * (CELL + GAP) + GAP, TOP + len(rows) * height + GAP)
    for column, name in enumerate(names):
        drawing.write(pen, (GAP + column * (CELL + GAP), 8), name, 15, width=CELL)
    for row, score in enumerate(rows):
        shown = score.shown
        assert shown is not None
        nearest = shown.lr.repeat(4, 0).repeat(4, 1)
        cells = [nearest, shown.bicubic, shown.sr, shown.target, *shown.references[:SHOWN_REFERENCES]]
        below = ["", _db(score.bicubic_psnr), f"{_db(score.psnr)}, {score.psnr - score.bicubic_psnr:+.2f}", ""]
        below[0] = score.group_id
        for column, cell in enumerate(cells):
            left, top = GAP + column * (CELL + GAP), TOP + row * height
            picture.paste(drawing.scaled(cell, CELL, CELL), (left, top))
            if column < len(below):
                drawing.write(pen, (left, top + CELL + 4), below[column], 13, drawing.FAINT, CELL)
    drawing.save(picture, path)


def _db(value: float) -> str:
    return "equal" if math.isinf(value) else f"{value:.2f} dB"
