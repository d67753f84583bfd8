"""Target crops with texture inside the area the references cover, and where each reference crop lies.

A target crop is drawn at random from a seed and the photo's hash; the centre of each reference crop is where the
target's centre lands. Imports `groups`, `pairs`, `geometry`,
`landing`, `scan` and `sources`, whose results it joins.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import cv2
import numpy as np
import numpy.typing as npt

from lmr_tools.geometry import PairGeometry
from lmr_tools.groups import (
    Counts,
    Option,
    Plan,
    PlannedGroup,
    PlannedReference,
    Task,
    choose,
    plan_from_json,
    plan_to_json,
    shortage,
)
from lmr_tools.landing import landing, psnr_warped
from lmr_tools.pairs import PairStore, load_geometry
from lmr_tools.scan import BLOCK, BLOCK_STD
from lmr_tools.schema import ImageRow, LmrError, Tier
from lmr_tools.sources import Source, read_photo
from lmr_tools.tables import append_piece, fingerprint, read_pieces
from lmr_tools.workers import Mapper

if TYPE_CHECKING:
    from lmr_tools.schema import Image

GROUPS_VERSION = 3
BOXES = 64  # target positions drawn per photo
MIN_SUPPORT = 3  # matched points a reference must have inside the target crop
# A reference crop is moved at most this share of its side to stay inside its photo: the point that the published
# groups are centred on may lie anywhere in the target crop, so half a side off its centre.
MAX_SHIFT = 0.5
DRAWS = 16  # crops tried in a reference that does not show the target crop, when the one at hand has no texture
MAX_SHARED = 0.25  # two target crops of one photo share at most this share of their area
PIECE = 64


@dataclass(frozen=True, kw_only=True)
class CropRule:
    """How crops are placed: side, crops per photo, least texture, PSNR of a duplicate, seed."""

    size: int
    groups_per_photo: int
    min_crop_texture: float
    duplicate_psnr: float
    seed: int


@dataclass(frozen=True, kw_only=True)
class _Kept:
    key: str
    plan: str


def plan_all(
    tasks: Callable[[], Iterable[Task]],
    counts: Counts,
    rule: CropRule,
    sources: Sequence[Source],
    store: PairStore,
    mapper: Mapper,
) -> Iterator[Plan]:
    """Plan every target photo, in order; plans made before from the same inputs are not made again.

    `tasks` gives the tasks anew at each call, so that they never lie in memory together.
    """
    folder = store.work / f"groups-{GROUPS_VERSION}"
    setting = (dataclasses.asdict(counts), dataclasses.asdict(rule), store.pairs.name)
    keys = [_task_key(task, setting) for task in tasks()]
    wanted = set(keys)
    known = {row.key: row.plan for row in read_pieces(folder, _Kept) if row.key in wanted}
    # Decided before the first plan is made: `known` must not change under the generator.
    missing = [key not in known for key in keys]
    fresh = mapper(
        partial(plan_target, counts=counts, rule=rule, sources=tuple(sources), store=store),
        itertools.compress(tasks(), missing),
    )
    piece: list[_Kept] = []
    try:
        for key in keys:
            if key in known:
                yield plan_from_json(known[key])
                continue
            plan = next(fresh)
            piece.append(_Kept(key=key, plan=plan_to_json(plan)))
            if len(piece) == PIECE:
                append_piece(folder, piece, _Kept)
                piece = []
            yield plan
    finally:
        if piece:
            append_piece(folder, piece, _Kept)


def _task_key(task: Task, setting: object) -> str:
    options = [
        (o.row.sha256, o.row.image_id, o.tier, o.overlap, o.scale_ratio, o.clip_score, o.via, o.verified)
        for o in task.options
    ]
    return fingerprint(task.target.sha256, options, setting)


def plan_target(task: Task, *, counts: Counts, rule: CropRule, sources: Sequence[Source], store: PairStore) -> Plan:
    """Choose target crops with texture inside the area the references cover, and place the reference crops."""
    target = task.target

    def nothing(reason: str, duplicates: Iterable[str] = ()) -> Plan:
        return Plan(target_image=target.image_id, groups=(), duplicates=tuple(sorted(duplicates)), reason=reason)

    options = [o for o in task.options if min(o.row.width, o.row.height) >= rule.size]
    if choose(options, counts) is None:
        return nothing(shortage(options, counts))
    random = np.random.default_rng(_seed(rule.seed, target.sha256))
    image = _photo(tuple(sources), target)
    boxes = _draw_boxes(image, rule, random)
    if not len(boxes):
        return nothing(f"no crop has texture in {rule.min_crop_texture:g} of its blocks")
    places = {o.row.image_id: _places(task, o, boxes, rule.size, store) for o in options}
    groups: list[PlannedGroup] = []
    duplicates: set[str] = set()
    free = np.ones(len(boxes), dtype=bool)
    while len(groups) < rule.groups_per_photo and free.any():
        best = _best_box(boxes, free, options, places, counts)
        if best is None:
            break
        number, chosen = best
        repeated = {
            option.row.image_id
            for _, option in chosen
            if _repeats(task, option, boxes[number], places[option.row.image_id].corners[number], rule, sources, store)
        }
        if repeated:  # a duplicate is one for every crop of the pair, also for those chosen before: start again
            duplicates |= repeated
            options = [o for o in options if o.row.image_id not in repeated]
            groups.clear()
            free[:] = True
            continue
        groups.append(_group(target, boxes[number], chosen, places, number, rule, sources))
        free &= _shared(boxes, boxes[number], rule.size) <= MAX_SHARED
    if not groups:
        return nothing("no crop is seen by enough references", duplicates)
    return Plan(target_image=target.image_id, groups=tuple(groups), duplicates=tuple(sorted(duplicates)), reason="")


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8])


@lru_cache(maxsize=8)
def _photo(sources: tuple[Source, ...], row: ImageRow) -> Image:
    return read_photo(sources, row)


def _draw_boxes(image: Image, rule: CropRule, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """Corners (n, 2) of random crops with enough texture, most textured first."""
    height, width = image.shape[:2]
    limits = np.array([width - rule.size + 1, height - rule.size + 1])
    corners = random.integers(0, limits, size=(BOXES, 2))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    texture = np.array([_texture(grey[y : y + rule.size, x : x + rule.size]) for x, y in corners])
    order = np.argsort(-texture, kind="stable")
    return corners[order[texture[order] >= rule.min_crop_texture]]


def _textured(image: Image, corner: npt.NDArray[np.int64], rule: CropRule, seed: int) -> npt.NDArray[np.int64]:
    """`corner`, unless its crop has too little texture (sky): then the most textured of some drawn ones."""
    height, width = image.shape[:2]
    limits = np.array([width - rule.size + 1, height - rule.size + 1])
    drawn = np.random.default_rng(seed).integers(0, limits, size=(DRAWS, 2))
    corners = np.concatenate([corner[None], drawn])
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    texture = [_texture(grey[y : y + rule.size, x : x + rule.size]) for x, y in corners]
    return corner if texture[0] >= rule.min_crop_texture else np.asarray(corners[int(np.argmax(texture))])


def _texture(grey: npt.NDArray[np.uint8]) -> float:
    """Share of 16x16 blocks of a crop, at its own resolution, with a grey standard deviation above 4."""
    rows, columns = grey.shape[0] // BLOCK, grey.shape[1] // BLOCK
    blocks = grey[: rows * BLOCK, : columns * BLOCK].reshape(rows, BLOCK, columns, BLOCK)
    return float((blocks.astype(np.float32).std(axis=(1, 3)) > BLOCK_STD).mean())


@dataclass(frozen=True, kw_only=True)
class _Places:
    """For each target box: the corner of the reference crop, whether it may be used, and its support in points."""

    corners: npt.NDArray[np.int64]
    usable: npt.NDArray[np.bool_]
    support: npt.NDArray[np.int64]
    landing: str


def _places(task: Task, option: Option, boxes: npt.NDArray[np.int64], size: int, store: PairStore) -> _Places:
    middle = boxes + (size - 1) / 2
    row = option.row
    limits = np.array([row.width - size, row.height - size])
    if option.verified:
        geometry = load_geometry(store, task.target.sha256, row.sha256)
        spot, _, _ = landing(geometry, middle)
        support = _points_inside(geometry, boxes, size)
        label = "matched"
    elif option.via is not None:
        first = load_geometry(store, task.target.sha256, option.via)
        second = load_geometry(store, option.via, row.sha256)
        between, _, _ = landing(first, middle)
        spot, _, _ = landing(second, between)
        support = np.zeros(len(boxes), np.int64)
        label = "chained"
    else:
        # Nothing ties the two photos but their label: the middle of the reference is as good as any place.
        spot = np.tile(np.array([row.width, row.height]) / 2, (len(boxes), 1))
        support = np.zeros(len(boxes), np.int64)
        label = "free"
    spot = np.nan_to_num(np.asarray(spot, np.float64), nan=-1e6, posinf=1e6, neginf=-1e6)
    wanted = np.rint(spot - (size - 1) / 2)
    corners = np.clip(wanted, 0, limits)
    inside = np.abs(corners - wanted).max(axis=1) <= MAX_SHIFT * size
    # A chained reference need not show the target's point: its crop goes where the chain points, as near as possible.
    usable = inside & (support >= MIN_SUPPORT) if option.verified else np.ones(len(boxes), bool)
    return _Places(corners=corners.astype(np.int64), usable=usable, support=support, landing=label)


def _points_inside(geometry: PairGeometry, boxes: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.int64]:
    points = np.asarray(geometry.points_a)[None, :, :] - boxes[:, None, :]
    return np.asarray(((points >= 0) & (points < size)).all(axis=2).sum(axis=1))


def _best_box(
    boxes: npt.NDArray[np.int64],
    free: npt.NDArray[np.bool_],
    options: Sequence[Option],
    places: dict[str, _Places],
    counts: Counts,
) -> tuple[int, list[tuple[str, Option]]] | None:
    best: tuple[tuple[int, int, float], int, list[tuple[str, Option]]] | None = None
    for number in np.flatnonzero(free):
        seeing = {o.row.image_id for o in options if places[o.row.image_id].usable[number]}
        # Low is any other view of the scene: a pair of that tier may serve although it shows another part of it.
        others = [o for o in options if o.row.image_id not in seeing and o.tier == Tier.LOW]
        usable = [o for o in options if o.row.image_id in seeing] + [replace(o, seen=False) for o in others]
        chosen = choose(usable, counts)
        if chosen is None or not any(option.rank == 0 for _, option in chosen):
            continue
        own = sum(slot.startswith(option.tier) for slot, option in chosen)
        # Boxes come most textured first, so the earlier of two equals wins; support counts up to 20 points a pair.
        support = sum(min(20, int(places[option.row.image_id].support[number])) for _, option in chosen)
        score = (len(chosen), own, support / (20 * len(chosen)) - number / len(boxes))
        if best is None or score > best[0]:
            best = (score, int(number), chosen)
    return None if best is None else best[1:]


def _repeats(
    task: Task,
    option: Option,
    box: npt.NDArray[np.int64],
    corner: npt.NDArray[np.int64],
    rule: CropRule,
    sources: Sequence[Source],
    store: PairStore,
) -> bool:
    """Whether target and reference crop agree at the duplicate PSNR, as cut or warped onto each other."""
    if option.rank > 0:
        return False
    size = rule.size
    (x, y), (u, v) = box, corner
    image = _photo(tuple(sources), task.target)
    crop = image[y : y + size, x : x + size]
    other = _photo(tuple(sources), option.row)
    error = np.mean((crop.astype(np.float64) - other[v : v + size, u : u + size]) ** 2)
    if error == 0 or 10 * np.log10(255.0**2 / error) >= rule.duplicate_psnr:
        return True
    geometry = load_geometry(store, task.target.sha256, option.row.sha256)
    return bool(psnr_warped(crop, other, geometry, (int(x), int(y))) >= rule.duplicate_psnr)


def _group(
    target: ImageRow,
    box: npt.NDArray[np.int64],
    chosen: Sequence[tuple[str, Option]],
    places: dict[str, _Places],
    number: int,
    rule: CropRule,
    sources: Sequence[Source],
) -> PlannedGroup:
    references = []
    for slot, option in chosen:
        place = places[option.row.image_id]
        corner = place.corners[number]
        if option.rank > 0:
            corner = _textured(_photo(tuple(sources), option.row), corner, rule, _seed(rule.seed, option.row.sha256))
        references.append(
            PlannedReference(
                image_id=option.row.image_id,
                slot=slot,
                tier=str(option.tier),
                overlap=option.overlap,
                scale_ratio=option.scale_ratio,
                clip_score=option.clip_score,
                x=int(corner[0]),
                y=int(corner[1]),
                landing=place.landing if option.seen else "elsewhere",
            )
        )
    return PlannedGroup(target_image=target.image_id, x=int(box[0]), y=int(box[1]), references=tuple(references))


def _shared(boxes: npt.NDArray[np.int64], box: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.float64]:
    overlap = np.clip(size - np.abs(boxes - box), 0, None)
    return np.asarray(overlap[:, 0] * overlap[:, 1] / size**2)


def cut(image: Image, x: int, y: int, size: int, name: str) -> Image:
    """The crop (size, size, 3) with corner (x, y); LmrError when it leaves the photo."""
    if x < 0 or y < 0 or y + size > image.shape[0] or x + size > image.shape[1]:
        raise LmrError(f"{name}: the crop {size}x{size} at ({x}, {y}) leaves the photo; run the build again")
    return np.ascontiguousarray(image[y : y + size, x : x + size])
