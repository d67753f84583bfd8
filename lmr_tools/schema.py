"""The floor of the house: tiers, groups, table rows. Every column name is written here, once.

A table is described by one frozen dataclass; its pyarrow schema is derived from the dataclass by `arrow_schema`, so a
row and its column can not drift apart.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import pyarrow as pa

    Image = npt.NDArray[np.uint8]  # H, W, 3; RGB


class LmrError(Exception):
    """A failure the user can act on: one line that names the file or option, the reason and the way out."""


class Tier(StrEnum):
    """Similarity of a reference to its target (LMR, ICCV 2023, supplementary section 2)."""

    HIGH = "H"
    MEDIUM = "M"
    LOW = "L"


class Split(StrEnum):
    """Part of a dataset; the splits of one dataset share no scene."""

    TRAIN = "train"
    VAL = "val"
    TEST = "test"


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageRow:
    """One photo that was found. `path` is relative to its source; `offset` is the byte position inside a tar source."""

    image_id: str
    path: str
    width: int
    height: int
    sha256: str
    scene: str | None
    status: str  # used | unused | rejected
    source: int
    offset: int | None
    bytes: int
    phash: str  # 256-bit perceptual hash, 64 hex digits
    sharpness: float  # variance of the Laplacian at long side 640, grey levels squared
    texture: float  # share of 16x16 blocks (long side 640) whose grey standard deviation exceeds 4
    no_target: str | None  # why no group has this photo as its target; null when one has


@dataclass(frozen=True, kw_only=True, slots=True)
class RejectRow:
    """One photo that left the flow: the stage, a short reason word, and the numbers behind it.

    With stage `annotation` it is one line of an imported annotation (image_id: `line-N`) or one folder of an imported
    test set (`folder-NAME`), which is no photo.
    """

    image_id: str
    path: str
    stage: str
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CandidateRow:
    """One mined candidate pair; `rank` starts at 0 with the most similar photo."""

    target_image: str
    ref_image: str
    rank: int
    clip_score: float


@dataclass(frozen=True, kw_only=True, slots=True)
class PairRow:
    """Geometry of one directed pair: how much of the target's detail the reference shows, and at which size.

    Overlap and scales are null where a published annotation gives the tier alone.
    """

    target_image: str
    ref_image: str
    overlap: float | None  # Rolp in [0, 1]
    scale_ratio: float | None  # Rs in (0, 1]
    inliers: int
    tier: str | None
    reason: str
    clip_score: float | None
    matches: int
    consistent: int  # inliers that agree in rotation and size
    scale_log2: float | None  # log2(apparent size in the reference / in the target); > 0 means the reference is closer
    hops: int  # 1 when the pair itself is verified, 2 when it is joined through another photo, 0 when neither
    via: str | None  # the photo in between when hops is 2


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupRow:
    """One reference of one group. Corners are the top-left pixel of the crops in their source photos."""

    group_id: str
    split: str
    shard: str
    target_image: str
    target_x: int
    target_y: int
    ref_image: str
    slot: str  # H, M1, M2, L1, L2: the place in the group
    tier: str  # what the pair itself is; a High reference may fill an M slot
    overlap: float | None
    scale_ratio: float | None
    clip_score: float | None
    ref_x: int
    ref_y: int
    size: int
    scene: str  # connected component of verified pairs, named by its smallest image id
    landing: str  # matched | chained | elsewhere | free | published: how the reference crop's place was found


@dataclass(frozen=True, kw_only=True)
class ShardRow:
    """One tar file of a dataset; the counts, sizes and hashes that a reader checks it against."""

    shard: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """Where a group lies: the byte range of a tar that holds its members, headers and padding included."""

    group_id: str
    split: str
    scene: str
    shard: str
    offset: int
    bytes: int
    sha256: str  # of the range


@dataclass(frozen=True, kw_only=True)
class Reference:
    """One reference crop of a group, with the provenance that makes the label checkable."""

    pixels: Image
    image_id: str
    path: str
    slot: str
    tier: Tier
    overlap: float | None
    scale_ratio: float | None
    clip_score: float | None
    x: int
    y: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """A target crop and its references: what shards hold, test sets yield, training and evaluation eat."""

    group_id: str
    scene: str
    split: Split
    target: Image
    target_image: str
    target_path: str
    target_x: int
    target_y: int
    references: tuple[Reference, ...]


def arrow_schema(row_type: type) -> pa.Schema:
    """The pyarrow schema of a row dataclass: str, int, float, bool, each optionally `| None`."""
    import pyarrow as pa

    plain = {str: pa.string(), int: pa.int64(), float: pa.float64(), bool: pa.bool_()}
    hints = typing.get_type_hints(row_type)
    columns = []
    for field in dataclasses.fields(row_type):
        hint: Any = hints[field.name]
        nullable = isinstance(hint, types.UnionType)
        if nullable:
            hint = next(option for option in typing.get_args(hint) if option is not type(None))
        columns.append(pa.field(field.name, plain[hint], nullable=nullable))
    return pa.schema(columns)


def embedding_schema(dimension: int) -> pa.Schema:
    """Schema of the `embeddings` table: one row per photo and view, unit vectors of `dimension` float16 numbers."""
    import pyarrow as pa

    return pa.schema(
        [
            pa.field("image_id", pa.string(), nullable=False),
            pa.field("view", pa.int8(), nullable=False),
            pa.field("vector", pa.list_(pa.float16(), dimension), nullable=False),
        ]
    )


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One picture of a test set under one method: what was measured, with what, and how."""

    run_id: str
    label: str  # the method's name in tables
    benchmark: str
    protocol: str  # official | native
    method: str
    weights_sha256: str | None
    image_id: str
    target_sha256: str | None  # of the pixels that it was scored against; null when they could not be read
    reference_policy: str  # all | first | best | each; none where the method takes no reference
    n_references: int  # that the method was given
    reference_ids: str  # JSON list
    tiers: str  # H, M or L of each reference, joined by commas; empty where the test set has none
    psnr_rgb: float | None  # dB
    psnr_y: float | None  # dB
    ssim_y: float | None
    lpips_alex: float | None
    lpips_vgg: float | None
    seconds: float | None  # of the method's call alone, 8 bits in to 8 bits out
    peak_memory_mb: float | None  # on a GPU what the call had allocated there at most, else of the process
    device: str
    versions: str  # JSON object
    sr: str | None  # PNG of the SR picture, relative to the run's folder
    failure: str | None  # why there are no numbers; null when there are
