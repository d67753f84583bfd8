"""Local features of one photo: SIFT keypoints with RootSIFT descriptors, and their compact bytes.

SIFT is Lowe, IJCV 2004; RootSIFT (square root of the L1-normalised descriptor) is Arandjelovic and Zisserman, CVPR
2012. How the numbers below were chosen stands in docs/geometry.md.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import numpy.typing as npt

from lmr_tools.schema import LmrError

if TYPE_CHECKING:
    from lmr_tools.schema import Image

Float32 = npt.NDArray[np.float32]

CONTRAST = 0.01  # SIFT contrast threshold; OpenCV's default .04 starves soft photos of keypoints
# OpenCV doubles the photo before its search and forgets half a pixel of that. Its "precise" doubling does not, but
# finds a sixth fewer keypoints; taking the shift off afterwards costs nothing.
SHIFT = 0.25
NORM = 512  # length of a quantised descriptor: products of two stay below 2^24, so float32 adds them exactly

_MAGIC = b"LMRA"
_HEAD = struct.Struct("<4sII")  # magic, bytes of the JSON header, CRC-32 of all that follows
_VERSION = 1


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """Keypoints of one photo, in pixels of the original photo (centre of the top-left pixel is 0, 0).

    The first `bright` keypoints are bright spots on a darker surround, the others dark ones; inside each part the
    strongest come first. A spot keeps its sign from photo to photo, so only like is matched with like.
    """

    points: Float32  # n, 2; x y
    size: Float32  # n; keypoint diameter
    angle: Float32  # n; degrees in [0, 360)
    descriptors: npt.NDArray[np.uint8]  # n, 128; RootSIFT, length about 512
    bright: int
    width: int
    height: int
    working_scale: float  # side of the image the keypoints were found in / side of the photo; <= 1

    def __len__(self) -> int:
        return len(self.points)


def extract_features(image_HWC: Image, *, max_side: int = 800, max_features: int = 2000) -> Features:
    """The `max_features` strongest SIFT keypoints of an RGB uint8 photo, found at long side <= `max_side` pixels.

    Deterministic: keypoints are sorted by response, then place and angle. A photo without texture gives none.
    """
    height, width = image_HWC.shape[:2]
    grey = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY)
    shrink = max_side / max(height, width)
    if shrink < 1:
        side = (max(1, round(width * shrink)), max(1, round(height * shrink)))
        grey = cv2.resize(grey, side, interpolation=cv2.INTER_AREA)
    scale_x, scale_y = grey.shape[1] / width, grey.shape[0] / height
    scale = math.sqrt(scale_x * scale_y)

    # The type stubs of OpenCV 5 do not know SIFT.
    sift = cv2.SIFT_create(  # type: ignore[attr-defined]
        nfeatures=max_features, contrastThreshold=CONTRAST, enable_precise_upscale=False
    )
    keypoints, raw = sift.detectAndCompute(grey, None)
    table = np.array([(k.pt[0], k.pt[1], k.size, k.angle, k.response) for k in keypoints], np.float32).reshape(-1, 5)
    x, y, size, angle, response = table.T
    # OpenCV keeps every keypoint that ties with the last one.
    strongest = np.lexsort((angle, y, x, -response))[:max_features]
    sign = _is_bright(grey, table[strongest])
    half = 0.5 - SHIFT
    order = np.concatenate([strongest[sign], strongest[~sign]])
    return Features(
        points=np.stack([(x[order] + half) / scale_x - 0.5, (y[order] + half) / scale_y - 0.5], 1).astype(np.float32),
        size=(size[order] / scale).astype(np.float32),
        angle=(angle[order] % 360).astype(np.float32),
        descriptors=_root_sift(raw[order]) if len(order) else np.zeros((0, 128), np.uint8),
        bright=int(sign.sum()),
        width=width,
        height=height,
        working_scale=scale,
    )


def _root_sift(raw: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """Square roots of L1-normalised descriptors, as integers of Euclidean length NORM."""
    rows = raw.astype(np.float64)
    rows /= np.maximum(rows.sum(1, keepdims=True), 1)
    return np.asarray(np.clip(np.rint(np.sqrt(rows) * NORM), 0, 255), np.uint8)


def _is_bright(grey: npt.NDArray[Any], table: Float32) -> npt.NDArray[np.bool_]:
    """Whether each keypoint's core is brighter than its surround (boxes 1 and 3 diameters wide).

    OpenCV does not tell maxima of the scale space from minima; two box means do. 99.98 % of verified matches agree.
    """
    height, width = grey.shape
    sums = cv2.integral(grey, sdepth=cv2.CV_64F)
    x, y, size = table[:, 0], table[:, 1], table[:, 2]

    def mean(radius: Float32) -> npt.NDArray[np.float64]:
        left = np.clip(np.rint(x - radius), 0, width - 1).astype(np.intp)
        right = np.clip(np.rint(x + radius) + 1, 1, width).astype(np.intp)
        top = np.clip(np.rint(y - radius), 0, height - 1).astype(np.intp)
        bottom = np.clip(np.rint(y + radius) + 1, 1, height).astype(np.intp)
        total = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
        return np.asarray(total / ((right - left) * (bottom - top)))

    return np.asarray(mean(size * 0.5) > mean(size * 1.5))


def features_to_bytes(features: Features) -> bytes:
    """Compact bytes of `features` (about 144 per keypoint); equal features give equal bytes. No pickle."""
    numbers = {"bright": features.bright, "width": features.width, "height": features.height}
    arrays = {"points": features.points, "size": features.size, "angle": features.angle}
    return pack_arrays(
        "features",
        {**numbers, "working_scale": features.working_scale},
        {**arrays, "descriptors": features.descriptors},
    )


def features_from_bytes(data: bytes) -> Features:
    """Inverse of `features_to_bytes`; bytes that are cut, altered or of another kind raise LmrError."""
    return Features(**unpack_arrays("features", data))


def pack_arrays(kind: str, numbers: Mapping[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """Numbers and arrays as one checked block of bytes: a JSON header, then the arrays' little-endian bytes."""
    plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    plain = {name: array.astype(array.dtype.newbyteorder("<"), copy=False) for name, array in plain.items()}
    layout = [[name, array.dtype.str, list(array.shape)] for name, array in plain.items()]
    value = {"kind": kind, "version": _VERSION, "numbers": dict(numbers), "arrays": layout}
    header = json.dumps(value, separators=(",", ":")).encode()
    body = b"".join([header, *(array.tobytes() for array in plain.values())])
    return _HEAD.pack(_MAGIC, len(header), zlib.crc32(body, len(header))) + body


def unpack_arrays(kind: str, data: bytes) -> dict[str, Any]:
    """Numbers and arrays of `pack_arrays` in one dict; raises LmrError unless every byte is as written."""
    if len(data) < _HEAD.size or data[:4] != _MAGIC:
        raise LmrError(f"stored {kind}: not written by this program")
    _, header_bytes, checksum = _HEAD.unpack_from(data)
    body = memoryview(data)[_HEAD.size :]
    if zlib.crc32(body, header_bytes) != checksum:
        raise LmrError(f"stored {kind}: damaged (checksum differs)")
    header = json.loads(bytes(body[:header_bytes]))
    if header["kind"] != kind or header["version"] != _VERSION:
        found = f"{header['kind']} of version {header['version']}"
        raise LmrError(f"stored {kind}: this is {found}, expected version {_VERSION}")
    values: dict[str, Any] = dict(header["numbers"])
    at = header_bytes
    for name, code, shape in header["arrays"]:
        dtype = np.dtype(code)
        count = math.prod(shape)
        # A copy: aligned, native byte order, and independent of the whole block.
        values[name] = np.frombuffer(body, dtype, count, at).reshape(shape).astype(dtype.newbyteorder("="))
        at += count * dtype.itemsize
    return values
