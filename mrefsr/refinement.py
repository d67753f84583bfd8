"""Matches made finer than their grid: patches match in steps of four pixels, detail has to fit to a fraction of one.

Each matched patch of 3x3 features stands for 12x12 pixels. That window of the enlarged LR is compared with the blurred
reference around the match, at every shift of up to two pixels, by zero-mean normalised correlation of the luma (blind
to brightness and contrast); a parabola through the best shift and its neighbours gives the fraction.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CELL = 4  # pixels of one step of the matching grid
SIDE = 3 * CELL  # of a patch, pixels
REACH = 2  # shifts looked at, pixels either way: half a step of the grid
WINDOW = SIDE + 2 * REACH
SHIFTS = 2 * REACH + 1
LUMA = (0.299, 0.587, 0.114)
FLAT = 1e-3  # of the norm of a patch: what has no detail agrees with nothing
CHUNK = 1 << 13  # patches at a time: about 25 MB


def refine_matches(index: Tensor, ref_patch_width: int, enlarged: Tensor, blurred: Tensor) -> tuple[Tensor, Tensor]:
    """Where patches lie in the reference, to a fraction of a pixel.

    Args:
        index: int64 R,h-2,w-2, the matched patch of every patch in the reference's grid (`mrefsr.matching`).
        ref_patch_width: width of that grid.
        enlarged: R,3,4h,4w, the LR enlarged x4, RGB.
        blurred: R,3,H,W, references that have lost as much detail.

    Returns:
        flow R,h-2,w-2,2 float32, displacement (x, y) in LR pixels, multiples of a quarter and a fraction; and the
        correlation found there, R,h-2,w-2, from -1 to 1.
    """
    planes = [_luma(enlarged), F.pad(_luma(blurred), (REACH,) * 4, mode="replicate")]
    count, height, width = index.shape
    matched_y, matched_x = index // ref_patch_width, index % ref_patch_width
    y = torch.arange(height, device=index.device)[:, None].expand(height, width)
    x = torch.arange(width, device=index.device).expand(height, width)
    starts = [
        _starts(planes[0], y.expand_as(index), x.expand_as(index)),
        _starts(planes[1], matched_y, matched_x),
    ]
    shifts, best = [], []
    for first in range(0, index.numel(), CHUNK):
        seen, found = (start[first : first + CHUNK] for start in starts)
        scores = _correlate(_windows(planes[0], seen, SIDE), _windows(planes[1], found, WINDOW))
        value, place = scores.max(0)
        shifts.append(torch.stack([_along(scores, place, value, axis) for axis in (1, SHIFTS)], -1))
        best.append(value)
    shift = torch.cat(shifts).view(count, height, width, 2) / CELL
    flow = torch.stack([matched_x - x, matched_y - y], -1) + shift
    return flow, torch.cat(best).view(count, height, width)


def _luma(image: Tensor) -> Tensor:
    """R,3,H,W -> R,1,H,W."""
    return (image.float() * image.new_tensor(LUMA, dtype=torch.float32).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _starts(plane: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Places of the top-left pixels of patches (grid positions R,h,w) in the flat `plane` R,1,H,W."""
    height, width = plane.shape[2:]
    item = torch.arange(len(plane), device=plane.device).view(-1, 1, 1)
    return (item * height * width + y * CELL * width + x * CELL).reshape(-1)


def _windows(plane: Tensor, starts: Tensor, side: int) -> Tensor:
    """side,side,n: windows whose top-left pixels are `starts`."""
    steps = torch.arange(side, device=plane.device)
    places = (steps[:, None] * plane.shape[3] + steps)[..., None] + starts
    return plane.reshape(-1)[places]


def _correlate(patches: Tensor, windows: Tensor) -> Tensor:
    """Correlation of patches SIDE,SIDE,n with every part of windows WINDOW,WINDOW,n: SHIFTS**2,n, row by row."""
    patches = patches - patches.mean((0, 1))
    energy = patches.square().sum((0, 1))
    scores = []
    for down in range(SHIFTS):
        for right in range(SHIFTS):
            part = windows[down : down + SIDE, right : right + SIDE]
            part = part - part.mean((0, 1))
            norm = (energy * part.square().sum((0, 1))).sqrt()
            scores.append((patches * part).sum((0, 1)) / (norm + FLAT))
    return torch.stack(scores)


def _along(scores: Tensor, place: Tensor, value: Tensor, step: int) -> Tensor:
    """Shift in pixels along one axis (`step` 1: x, SHIFTS: y) at the top of the parabola through three scores."""
    number = place // step % SHIFTS
    inside = (number > 0) & (number < SHIFTS - 1)
    before, after = (scores.gather(0, torch.where(inside, place + way, place)[None])[0] for way in (-step, step))
    curvature = (2 * value - before - after).clamp_min(1e-6)
    return number - REACH + torch.where(inside, ((after - before) / (2 * curvature)).clamp(-0.5, 0.5), 0.0)
