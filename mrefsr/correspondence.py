"""Pairs of pictures whose correspondence is known, and the losses that teach features to find it (C2-Matching, CVPR
2021, stages 1 and 2).

A pair is a window of a target crop and the same window seen through a random homography. Both have a grid of cells of
4x4 pixels, one for each feature; a cell's place is its middle.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lmr_tools.images import downscale, upscale
from lmr_tools.schema import LmrError
from mrefsr.matching import PATCH, match_batch, normalize_channels
from mrefsr.sampling import SCALE, Draws, turned

if TYPE_CHECKING:
    import numpy.typing as npt

    from lmr_tools.schema import Image

MIDDLE = (SCALE - 1) / 2  # of a cell, from the middle of its first pixel
LEAST_SHARE = 0.08  # a pair counts when so many of its cells lie in the other picture (128 of 40x40, as published)


@dataclass(frozen=True, kw_only=True)
class PairRule:
    """What is made of a target crop.

    crop: side of both windows, pixels, a multiple of 4.
    shift: each coordinate of the window's four corners moves by at most so many pixels; the published code has 10 of
        160.
    photometric: the warped window's contrast, the brightness of each of its channels and its gamma change by at most
        this share (of 1, of the range, of 1); the published code has 0.
    """

    crop: int = 160
    shift: float = 10.0
    photometric: float = 0.1

    def __post_init__(self) -> None:
        if self.crop < 8 * SCALE or self.crop % SCALE:
            raise LmrError(f"crop {self.crop}: must be a multiple of {SCALE}, at least {8 * SCALE}")
        if not 0 <= self.shift < self.crop / 4:
            raise LmrError(f"shift {self.shift}: must be between 0 and a quarter of crop ({self.crop / 4:g})")
        if not 0 <= self.photometric < 1:
            raise LmrError(f"photometric {self.photometric}: must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class Pair:
    """RGB uint8 HWC of one size: `image`, the same brought down and up x4 (`enlarged`), and `warped`; `homography`
    float64 3x3 takes a point (x, y) of `image` to the point of `warped` that shows the same."""

    image: Image
    enlarged: Image
    warped: Image
    homography: npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """B pairs as float32 B3HW in [0, 1], with `place` float32 B,h,w,2: where each cell (x, y) of the image lies in the
    warped one's grid, in cells."""

    image: Tensor
    enlarged: Tensor
    warped: Tensor
    place: Tensor

    def to(self, device: torch.device | str) -> Pairs:
        """The pairs on a device."""
        return Pairs(
            image=self.image.to(device),
            enlarged=self.enlarged.to(device),
            warped=self.warped.to(device),
            place=self.place.to(device),
        )


def make_pair(target: Image, rule: PairRule, draws: Draws) -> Pair:
    """One pair out of a target crop, all of it drawn from `draws`; LmrError when it is smaller than the window."""
    picture = turned(target, draws.below(8))
    height, width = picture.shape[:2]
    if min(height, width) < rule.crop:
        raise LmrError(f"crop {rule.crop}: larger than a stored crop of {width}x{height}; take a smaller one")
    # Where there is room, the window keeps the corners' distance from the border, so that no mirrored pixel is seen.
    x, y = (_corner(draws, side, rule) for side in (width, height))
    corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * (rule.crop - 1.0)
    shifts = rule.shift * (2 * np.array([[draws.unit() for _ in range(2)] for _ in range(4)]) - 1)
    homography = homography_between(corners + shifts, corners)
    in_picture = homography @ np.array([[1.0, 0, -x], [0, 1, -y], [0, 0, 1]])
    warped = cv2.warpPerspective(
        picture, in_picture, (rule.crop, rule.crop), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101
    )
    image = np.ascontiguousarray(picture[y : y + rule.crop, x : x + rule.crop])
    return Pair(
        image=image,
        enlarged=upscale(downscale(image, SCALE), SCALE),
        warped=_relit(np.asarray(warped, np.uint8), rule.photometric, draws),
        homography=homography,
    )


def _corner(draws: Draws, side: int, rule: PairRule) -> int:
    room = side - rule.crop
    margin = min(int(np.ceil(rule.shift)), room // 2)
    return margin + draws.below(room - 2 * margin + 1)


def homography_between(source: npt.ArrayLike, to: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """The 3x3 matrix, last entry 1, that takes four points (x, y) to four others, no three on a line."""
    rows, values = [], []
    for (x, y), (u, v) in zip(np.asarray(source, float), np.asarray(to, float), strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return np.append(np.linalg.solve(np.array(rows), np.array(values)), 1.0).reshape(3, 3)


def _relit(image: Image, share: float, draws: Draws) -> Image:
    """Another contrast, brightness per channel and gamma; by a table for each channel, as pixels have 8 bits."""
    contrast, gamma = (1 + share * (2 * draws.unit() - 1) for _ in range(2))
    brightness = np.array([share * (2 * draws.unit() - 1) for _ in range(3)]) / 2
    if not share:
        return image
    level = np.linspace(0, 1, 256)[:, None]
    value = np.clip((level - 0.5) * contrast + 0.5 + brightness, 0, 1) ** gamma
    table = np.rint(255 * value).astype(np.uint8)
    return np.stack([table[:, channel][image[:, :, channel]] for channel in range(3)], 2)


def cell_places(homography: npt.NDArray[np.float64], height: int, width: int) -> npt.NDArray[np.float64]:
    """Where each of height x width cells lies in the other grid: h,w,2 (x, y) in cells, through pixel coordinates."""
    x, y = np.meshgrid(np.arange(width) * float(SCALE) + MIDDLE, np.arange(height) * float(SCALE) + MIDDLE)
    moved = np.stack([x, y, np.ones_like(x)], -1) @ homography.T
    return np.asarray((moved[..., :2] / moved[..., 2:] - MIDDLE) / SCALE, float)


def stack_pairs(pairs: list[Pair]) -> Pairs:
    """A batch of pairs of one size."""
    height, width = (side // SCALE for side in pairs[0].image.shape[:2])
    places = np.stack([cell_places(pair.homography, height, width) for pair in pairs])
    return Pairs(
        image=_tensor([pair.image for pair in pairs]),
        enlarged=_tensor([pair.enlarged for pair in pairs]),
        warped=_tensor([pair.warped for pair in pairs]),
        place=torch.from_numpy(places.astype(np.float32)),
    )


def _tensor(pictures: list[Image]) -> Tensor:
    return torch.from_numpy(np.stack(pictures).transpose(0, 3, 1, 2).astype(np.float32) / 255)


class MatchLoss(NamedTuple):
    """Scalars: `triplet` and, where there is a teacher, `distillation` carry gradients; mean squared distances of
    `positive` pairs and hardest `negative` ones do not."""

    triplet: Tensor
    distillation: Tensor
    positive: Tensor
    negative: Tensor


def match_loss(
    features: tuple[Tensor, Tensor],
    place: Tensor,
    *,
    teacher: tuple[Tensor, Tensor] | None = None,
    margin: float = 1.0,
    safe_radius: float = 4.0,
    temperature: float = 0.15,
) -> MatchLoss:
    """Triplet margin loss with hard negatives, and the divergence from a teacher's correlations.

    features: B,C,h,w of the image and of the warped one, not normalised; `teacher`: those of the teacher.
    place: B,h,w,2 as in `Pairs`. Cells whose place, rounded, is outside the other grid take no part.

    Descriptors are features of length 1; distances are squared. Of an image's cell p and its place q the loss is
    max(0, margin + |p - q|^2 - n), where n is the smallest distance of p to the place of another cell, or of q to any
    cell of the image, more than `safe_radius` cells away (in x or y). `distillation` is KL(teacher || student) of the
    softmax over all places of p's cosines divided by `temperature`. Both are means over cells, then over pairs.
    """
    with torch.autocast(place.device.type, enabled=False):
        seen = [normalize_channels(part.float()) for part in features]
        taught = None if teacher is None else [normalize_channels(part.float()) for part in teacher]
        found = [
            _of_pair(seen, taught, index, cells, places, margin, safe_radius, temperature)
            for index, cells, places in _corresponding(place)
        ]
        if not found:  # no pair has enough cells in common: nothing to learn, but the graph stays whole
            nothing = (seen[0].sum() + seen[1].sum()) * 0
            return MatchLoss(nothing, nothing, nothing.detach(), nothing.detach())
        return MatchLoss(*(torch.stack(part).mean() for part in zip(*found, strict=True)))


def _corresponding(place: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each pair with enough common cells: its number, the cells P,2 (x, y) and their places P,2, both int64."""
    height, width = place.shape[1:3]
    limit = torch.tensor([width, height], device=place.device)
    for index, one in enumerate(place):
        rounded = one.round().long()
        inside = ((rounded >= 0) & (rounded < limit)).all(-1)
        cells = inside.nonzero().flip(1)
        if len(cells) >= max(1, LEAST_SHARE * height * width):
            yield index, cells, rounded[inside]


def _of_pair(
    features: list[Tensor],
    teacher: list[Tensor] | None,
    index: int,
    cells: Tensor,
    places: Tensor,
    margin: float,
    safe_radius: float,
    temperature: float,
) -> MatchLoss:
    every = features[0][index].flatten(1)  # C,h*w
    height, width = features[0].shape[2:]
    own, other = _at(features[0], index, cells), _at(features[1], index, places)  # P,C
    cosines = own @ other.T
    positive = 2 - 2 * cosines.diagonal()
    grid = torch.stack(torch.meshgrid(*map(torch.arange, (width, height)), indexing="xy"), -1).view(-1, 2).to(cells)
    in_warped = _hardest(cosines, _apart(places, places), safe_radius)
    in_image = _hardest(other @ every, _apart(cells, grid), safe_radius)
    negative = torch.minimum(in_warped, in_image)
    triplet = F.relu(margin + positive - negative).mean()
    distillation = triplet.new_zeros(())
    if teacher is not None:
        wanted = _at(teacher[0], index, cells) @ _at(teacher[1], index, places).T
        distillation = F.kl_div(
            F.log_softmax(cosines / temperature, 1),
            F.log_softmax(wanted / temperature, 1),
            reduction="batchmean",
            log_target=True,
        )
    return MatchLoss(triplet, distillation, positive.detach().mean(), negative.detach().mean())


def _at(features: Tensor, index: int, places: Tensor) -> Tensor:
    return features[index, :, places[:, 1], places[:, 0]].T


def _apart(a: Tensor, b: Tensor) -> Tensor:
    """P,2 and Q,2 -> P,Q: the larger of the distances in x and y."""
    return torch.maximum(*((a[:, None, axis] - b[None, :, axis]).abs() for axis in range(2)))


def _hardest(cosines: Tensor, apart: Tensor, safe_radius: float) -> Tensor:
    """The smallest squared distance in each row among columns beyond the radius; where there are none, 10 and more."""
    return (2 - 2 * cosines + 10 * (apart <= safe_radius)).amin(1)


@torch.no_grad()
def match_errors(features: tuple[Tensor, Tensor], place: Tensor) -> Tensor:
    """How far off matching is, in cells: one float32 for each 3x3 patch of all pairs whose true place is on the grid.

    features: B,C,h,w of image and warped image, not normalised; patches are matched as MRefSR does it, and each match
    is compared with the exact place of the patch's middle cell.
    """
    image, warped = (normalize_channels(part.float()) for part in features)
    index, _ = match_batch(image, warped[:, None])
    height, width = warped.shape[2:]
    columns = width - PATCH + 1
    found = torch.stack((index[:, 0] % columns, torch.div(index[:, 0], columns, rounding_mode="floor")), -1) + 1
    true = place[:, 1:-1, 1:-1]
    limit = torch.tensor([width, height], device=place.device)
    inside = ((true >= 1) & (true <= limit - 2)).all(-1)
    return (found - true)[inside].square().sum(-1).sqrt()
