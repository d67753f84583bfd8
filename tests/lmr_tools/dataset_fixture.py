"""A tiny, consistent dataset folder made from generated pictures: what the tests of the dataset tools damage.

Every photo is a window (x, y, width) of its scene's large random picture, so overlaps and scale ratios are true, SIFT
finds real matches, and every pixel of a crop can be checked against its photo.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image as PilImage
from PIL import ImageDraw, ImageFilter

from lmr_tools.card import write_card
from lmr_tools.images import encode_png
from lmr_tools.schema import (
    CandidateRow,
    Group,
    GroupRow,
    ImageRow,
    PairRow,
    Reference,
    RejectRow,
    SampleRow,
    ShardRow,
    Split,
    Tier,
    embedding_schema,
)
from lmr_tools.shards import WrittenShard, write_shard
from lmr_tools.tables import sha256_file, write_bytes, write_json, write_rows, write_table

if TYPE_CHECKING:
    from lmr_tools.schema import Image

SIZE = 64
WIDTH, HEIGHT = 240, 180
SLOTS = ("H", "M1", "M2", "L1", "L2")
# Windows of the scene picture: target, then H, M, M, L, L; the last one is a photo that no group uses.
WINDOWS = ((60, 45, 240), (68, 49, 240), (40, 30, 300), (90, 66, 186), (0, 0, 400), (110, 80, 140), (100, 100, 200))
SPLITS = (Split.TRAIN, Split.TRAIN, Split.TRAIN, Split.VAL, Split.TEST)
THRESHOLDS = {"high_overlap": 0.3, "high_scale": 0.9, "medium_overlap": 0.1, "medium_scale": 0.66}


def scene_picture(seed: int) -> Image:
    """A 400x300 picture of random shapes, RGB uint8."""
    random = np.random.default_rng(seed)
    picture = PilImage.new("RGB", (400, 300), tuple(int(v) for v in random.integers(60, 200, 3)))
    draw = ImageDraw.Draw(picture)
    for _ in range(320):
        x, y = random.integers(-20, 400), random.integers(-20, 300)
        w, h = random.integers(4, 46, 2)
        colour = tuple(int(v) for v in random.integers(0, 256, 3))
        shape = draw.rectangle if random.random() < 0.5 else draw.ellipse
        shape((int(x), int(y), int(x + w), int(y + h)), fill=colour)
    return np.array(picture.filter(ImageFilter.GaussianBlur(0.8)))


def _window(scene: Image, window: tuple[int, int, int]) -> Image:
    x, y, width = window
    box = (x, y, x + width, y + width * HEIGHT / WIDTH)
    return np.array(PilImage.fromarray(scene).resize((WIDTH, HEIGHT), PilImage.Resampling.BICUBIC, box=box))


def grade(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[float, float, str]:
    """Overlap (share of a's area that b shows), scale ratio and tier of two windows of one scene."""
    wide = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    high = min(a[1] + a[2] * 0.75, b[1] + b[2] * 0.75) - max(a[1], b[1])
    overlap = round(max(0, wide) * max(0.0, high) / (a[2] * a[2] * 0.75), 6)
    scale = round(min(a[2], b[2]) / max(a[2], b[2]), 6)
    if overlap > 0.3 and scale > 0.9:
        return overlap, scale, "H"
    return overlap, scale, "M" if overlap > 0.1 and scale > 0.66 else "L"


@dataclass(frozen=True, kw_only=True)
class Made:
    """Everything the fixture wrote, before it was written."""

    images: list[ImageRow]
    rejects: list[RejectRow]
    candidates: list[CandidateRow]
    pairs: list[PairRow]
    groups: list[Group]
    photos: dict[str, Image]


def make_groups(photo_folder: Path) -> Made:
    """Write the photos and return the rows and groups of five scenes, one or two groups each."""
    made = Made(images=[], rejects=[], candidates=[], pairs=[], groups=[], photos={})
    for number, split in enumerate(SPLITS):
        picture = scene_picture(number)
        rows = []
        for view, window in enumerate(WINDOWS):
            photo = _window(picture, window)
            path = f"place {number}/view-{view}.png"
            data = encode_png(photo)
            write_bytes(photo_folder / path, data)
            status = "used" if view < 6 else "unused"
            rows.append(_image_row(f"s{number}v{view}", path, data, status))
            made.photos[rows[-1].image_id] = photo
        made.images.extend(rows)
        for target in range(6):
            scored = [(*grade(WINDOWS[target], WINDOWS[ref]), ref) for ref in range(7) if ref != target]
            for rank, (overlap, scale, tier, ref) in enumerate(sorted(scored, reverse=True)):
                clip = round(0.95 - 0.04 * rank, 6)
                ids = {"target_image": rows[target].image_id, "ref_image": rows[ref].image_id}
                made.candidates.append(CandidateRow(**ids, rank=rank, clip_score=clip))
                made.pairs.append(_pair_row(ids, overlap, scale, tier, clip))
        # Two target crops of the first view; references are centred where the target's centre lands.
        for place, corner in enumerate([(30, 30), (100, 60)][: 1 + number % 2]):
            made.groups.append(_group(f"g{number}-{place}", rows, split, corner, made))
    broken = b"not a picture"
    write_bytes(photo_folder / "broken.jpg", broken)
    made.images.append(_image_row("broken", "broken.jpg", broken, "rejected", size=(0, 0)))
    made.rejects.append(
        RejectRow(image_id="broken", path="broken.jpg", stage="scan", reason="not an image", detail="no header")
    )
    return made


def _image_row(image_id: str, path: str, data: bytes, status: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> ImageRow:
    return ImageRow(
        image_id=image_id,
        path=path,
        width=size[0],
        height=size[1],
        sha256=hashlib.sha256(data).hexdigest(),
        scene=None,
        status=status,
        source=0,
        offset=None,
        bytes=len(data),
        phash="0" * 64,
        sharpness=100.0,
        texture=0.5,
        no_target=None,
    )


def _pair_row(ids: dict[str, str], overlap: float, scale: float, tier: str, clip: float) -> PairRow:
    return PairRow(
        **ids,
        overlap=overlap,
        scale_ratio=scale,
        inliers=40,
        tier=tier,
        reason=f"overlap {overlap:.2f}, scale {scale:.2f}",
        clip_score=clip,
        matches=60,
        consistent=36,
        scale_log2=float(np.log2(scale)),
        hops=1,
        via=None,
    )


def _group(group_id: str, rows: list[ImageRow], split: Split, corner: tuple[int, int], made: Made) -> Group:
    middle = [corner[axis] + SIZE / 2 for axis in (0, 1)]
    x0, y0, width0 = WINDOWS[0]
    references = []
    pairs = {(pair.target_image, pair.ref_image): pair for pair in made.pairs}
    for slot, view in zip(SLOTS, range(1, 6), strict=True):
        x1, y1, width1 = WINDOWS[view]
        spot = [
            ((start + centre * width0 / WIDTH) - other) * WIDTH / width1
            for start, other, centre in ((x0, x1, middle[0]), (y0, y1, middle[1]))
        ]
        limits = (WIDTH - SIZE, HEIGHT - SIZE)
        x, y = (int(np.clip(round(spot[axis] - SIZE / 2), 0, limits[axis])) for axis in (0, 1))
        row = rows[view]
        pair = pairs[rows[0].image_id, row.image_id]
        references.append(
            Reference(
                pixels=made.photos[row.image_id][y : y + SIZE, x : x + SIZE],
                image_id=row.image_id,
                path=row.path,
                slot=slot,
                tier=Tier(pair.tier or ""),
                overlap=pair.overlap,
                scale_ratio=pair.scale_ratio,
                clip_score=pair.clip_score,
                x=x,
                y=y,
            )
        )
    target = made.photos[rows[0].image_id][corner[1] : corner[1] + SIZE, corner[0] : corner[0] + SIZE]
    return Group(
        group_id=group_id,
        scene=rows[0].image_id,
        split=split,
        target=target,
        target_image=rows[0].image_id,
        target_path=rows[0].path,
        target_x=corner[0],
        target_y=corner[1],
        references=tuple(references),
    )


def group_rows(groups: Iterable[Group], shard: str) -> list[GroupRow]:
    """The `groups` rows of the groups of one shard."""
    return [
        GroupRow(
            group_id=group.group_id,
            split=str(group.split),
            shard=shard,
            target_image=group.target_image,
            target_x=group.target_x,
            target_y=group.target_y,
            ref_image=reference.image_id,
            slot=reference.slot,
            tier=str(reference.tier),
            overlap=reference.overlap,
            scale_ratio=reference.scale_ratio,
            clip_score=reference.clip_score,
            ref_x=reference.x,
            ref_y=reference.y,
            size=group.target.shape[0],
            scene=group.scene,
            landing="matched",
        )
        for group in groups
        for reference in group.references
    ]


def make_dataset(folder: Path) -> Path:
    """Write photos and a complete dataset under `folder`; returns the dataset's folder."""
    made = make_groups(folder / "photos")
    dataset = folder / "dataset"
    rows: list[GroupRow] = []
    written: list[WrittenShard] = []
    for split in Split:
        chosen = [group for group in made.groups if group.split == split]
        # Train is cut into shards of two, so that a dataset has more than one shard per split.
        pieces = [chosen[start : start + 2] for start in range(0, len(chosen), 2)]
        for number, piece in enumerate(pieces):
            name = f"{split}-{number:06d}.tar"
            written.append(write_shard(dataset / "shards" / name, piece))
            rows += group_rows(piece, name)
    tables = dataset / "tables"
    write_rows(tables / "images.parquet", made.images, ImageRow)
    write_rows(tables / "rejects.parquet", made.rejects, RejectRow)
    write_rows(tables / "candidates.parquet", made.candidates, CandidateRow)
    write_rows(tables / "pairs.parquet", made.pairs, PairRow)
    write_rows(tables / "groups.parquet", rows, GroupRow)
    write_rows(tables / "shards.parquet", [shard.row for shard in written], ShardRow)
    write_rows(tables / "samples.parquet", [row for shard in written for row in shard.samples], SampleRow)
    write_table(tables / "embeddings.parquet", _embeddings([row.image_id for row in made.images[:-1]]))
    facts = manifest(dataset, folder / "photos")
    write_card(dataset, facts)
    write_json(dataset / "dataset.json", facts)
    return dataset


def _embeddings(ids: list[str]) -> pa.Table:
    vectors = np.random.default_rng(0).normal(size=(len(ids), 8))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    flat = pa.array(vectors.astype(np.float16).ravel(), pa.float16())
    columns = [pa.array(ids), pa.array([0] * len(ids), pa.int8()), pa.FixedSizeListArray.from_arrays(flat, 8)]
    return pa.Table.from_arrays(columns, schema=embedding_schema(8))


def manifest(dataset: Path, photos: Path) -> dict[str, object]:
    """The dataset.json of the tables that lie in `dataset` now: call it again after changing one on purpose."""
    files = sorted((dataset / "tables").glob("*.parquet"))
    images, rejects, groups = (
        pq.read_table(dataset / "tables" / f"{name}.parquet").to_pylist() for name in ("images", "rejects", "groups")
    )
    per_status = Counter(row["status"] for row in images)
    per_split = Counter(split for _, split in {(row["group_id"], row["split"]) for row in groups})
    counts = {
        "photos": {"found": len(images)} | {name: per_status[name] for name in ("used", "unused", "rejected")},
        "rejects": dict(Counter(f"{row['stage']}: {row['reason']}" for row in rejects)),
        "groups": {str(split): per_split[str(split)] for split in Split},
        "references": dict(sorted(Counter(f"{row['slot'][0]} slot, {row['tier']} pair" for row in groups).items())),
        "scenes": len({row["scene"] for row in groups}),
    }
    return {
        "format": "lmr-dataset",
        "version": 1,
        "recipe": {"size": SIZE, "high": 1, "medium": 2, "low": 2, "allow_partial": False, "scenes": "none"}
        | THRESHOLDS,
        "seed": 0,
        "sources": [str(photos)],
        "versions": {"lmr-tools": "0.1.0"},
        "embedder": {"model": "stub", "key": "stub-8", "dimension": 8, "views": 1},
        "index": {"kind": "Flat", "k": 6, "recall": 1.0},
        "counts": counts,
        "tables": {file.stem: {"rows": pq.read_metadata(file).num_rows, "sha256": sha256_file(file)} for file in files},
    }


def refresh(dataset: Path) -> None:
    """Make dataset.json agree with the tables again, so that only the deeper checks can see a change."""
    old = json.loads((dataset / "dataset.json").read_text())
    facts = manifest(dataset, Path(old["sources"][0]))
    write_card(dataset, facts)
    write_json(dataset / "dataset.json", facts)
