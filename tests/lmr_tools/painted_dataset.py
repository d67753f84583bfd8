"""A dataset whose pixels say where they are from: what streaming can be checked against without trusting it.

Red is 3 x column, green is 3 x row, blue is 6 x group + slot (0 is the target): every crop of a group shows the same
place at the same column and row. Only what a stream reads is written (manifest, `shards` and `samples`, tars).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lmr_tools.schema import Group, Reference, SampleRow, ShardRow, Split, Tier
from lmr_tools.shards import write_shard
from lmr_tools.tables import sha256_file, write_json, write_rows

if TYPE_CHECKING:
    from lmr_tools.schema import Image

SIZE = 64
PER_SCENE = 2  # groups of one scene


def painted(group: int, slot: int, size: int = SIZE) -> Image:
    """The crop of a slot, 0 for the target."""
    picture = np.zeros((size, size, 3), np.uint8)
    picture[:, :, 0] = 3 * np.arange(size)[None, :]
    picture[:, :, 1] = 3 * np.arange(size)[:, None]
    picture[:, :, 2] = 6 * group + slot
    return picture


def painted_group(number: int, split: Split, size: int = SIZE, references: int = 5) -> Group:
    """Group `number`, named gNN, of scene number // PER_SCENE."""
    return Group(
        group_id=f"g{number:02d}",
        scene=f"scene {number // PER_SCENE}",
        split=split,
        target=painted(number, 0, size),
        target_image=f"t{number}",
        target_path=f"{number}.png",
        target_x=0,
        target_y=0,
        references=tuple(
            Reference(
                pixels=painted(number, slot, size),
                image_id=f"r{number}-{slot}",
                path=f"{number}-{slot}.png",
                slot=("H", "M1", "M2", "L1", "L2")[slot - 1],
                tier=Tier.LOW,
                overlap=0.5,
                scale_ratio=0.5,
                clip_score=None,
                x=0,
                y=0,
            )
            for slot in range(1, references + 1)
        ),
    )


def paint_dataset(folder: Path, *, train: int = 11, val: int = 4, size: int = SIZE, references: int = 5) -> Path:
    """Write a dataset of `train` + `val` groups in tars of four; returns its folder."""
    groups = [painted_group(n, Split.TRAIN if n < train else Split.VAL, size, references) for n in range(train + val)]
    written = []
    for split in (Split.TRAIN, Split.VAL):
        own = [group for group in groups if group.split == split]
        for start in range(0, len(own), 4):
            path = folder / "shards" / f"{split}-{start // 4:06d}.tar"
            written.append(write_shard(path, own[start : start + 4]))
    write_rows(folder / "tables" / "shards.parquet", [shard.row for shard in written], ShardRow)
    write_rows(folder / "tables" / "samples.parquet", [row for shard in written for row in shard.samples], SampleRow)
    write_manifest(folder, size)
    return folder


def write_manifest(folder: Path, size: int = SIZE) -> None:
    """dataset.json of the tables as they lie there."""
    tables = {path.stem: {"rows": 0, "sha256": sha256_file(path)} for path in (folder / "tables").glob("*.parquet")}
    recipe = {"size": size}
    write_json(folder / "dataset.json", {"format": "lmr-dataset", "version": 1, "recipe": recipe, "tables": tables})
