"""Reader of a COLMAP sparse model (cameras, images, points3D; binary or text): which photo sees which 3-D point where.

Format: https://colmap.github.io/format.html. Read here, not by pycolmap, which weighs 40 MB and is checked against in
the tests. A model may come from anywhere: counts are judged against the bytes that are there.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmr_tools.schema import LmrError

FILES = ("cameras", "images", "points3D")
# Camera models with perspective or fisheye lenses: number -> (name, how many parameters, how many focal lengths first).
CAMERAS: Mapping[int, tuple[str, int, int]] = {
    0: ("SIMPLE_PINHOLE", 3, 1),
    1: ("PINHOLE", 4, 2),
    2: ("SIMPLE_RADIAL", 4, 1),
    3: ("RADIAL", 5, 1),
    4: ("OPENCV", 8, 2),
    5: ("OPENCV_FISHEYE", 8, 2),
    6: ("FULL_OPENCV", 12, 2),
    7: ("FOV", 5, 2),
    8: ("SIMPLE_RADIAL_FISHEYE", 4, 1),
    9: ("RADIAL_FISHEYE", 5, 1),
    10: ("THIN_PRISM_FISHEYE", 12, 2),
    11: ("RAD_TAN_THIN_PRISM_FISHEYE", 16, 2),
    12: ("SIMPLE_DIVISION", 4, 1),
    13: ("DIVISION", 5, 2),
    14: ("SIMPLE_FISHEYE", 3, 1),
    15: ("FISHEYE", 4, 2),
    16: ("EUCM", 6, 2),
}
BY_NAME = {name: number for number, (name, _, _) in CAMERAS.items()}
COUNT = re.compile(rb"^# *Number of (?:cameras|images|points): *(\d+)", re.MULTILINE)
OBSERVATION = np.dtype([("x", "<f8"), ("y", "<f8"), ("point", "<i8")])


@dataclass(frozen=True, kw_only=True)
class Camera:
    """Size of the picture and mean focal length, in pixels."""

    width: int
    height: int
    focal: float


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelImage:
    """One registered image. Points count from the picture's edge: the centre of the top-left pixel is (.5, .5).

    Only points in front of the camera that are part of the model; each id once. `depth` is along the optical axis.
    """

    name: str
    camera: Camera
    ids: npt.NDArray[np.int64]  # n; ascending
    points: npt.NDArray[np.float64]  # n, 2
    depth: npt.NDArray[np.float64]  # n


@dataclass(frozen=True, kw_only=True)
class Model:
    """All registered images of a model; `fingerprint` names its files' content."""

    folder: Path
    fingerprint: str
    images: tuple[ModelImage, ...]
    points: int


def model_folders(path: Path) -> list[Path]:
    """The folders of models at or below `path`; LmrError when there is none."""
    if not path.is_dir():
        raise LmrError(f"{path}: no such folder; --geometry colmap takes the folder of a sparse model")
    places = [path, *sorted(child for child in path.rglob("*") if child.is_dir())]
    found = [place for place in places if _suffix(place)]
    if not found:
        raise LmrError(f"{path}: holds no sparse model (cameras, images and points3D, each .bin or .txt)")
    return found


def _suffix(folder: Path) -> str:
    return next((s for s in (".bin", ".txt") if all((folder / f"{name}{s}").is_file() for name in FILES)), "")


def read_model(folder: Path) -> Model:
    """Read one model; LmrError names the file that is damaged."""
    suffix = _suffix(folder)
    if not suffix:
        raise LmrError(f"{folder}: holds no sparse model (cameras, images and points3D, each .bin or .txt)")
    content = {name: (folder / f"{name}{suffix}").read_bytes() for name in FILES}
    readers = READERS[suffix]
    parts: dict[str, Any] = {}
    for name in FILES:
        try:
            parts[name] = readers[name](content[name])
            if suffix == ".txt":
                _check_count(content[name], len(parts[name][0] if name == "points3D" else parts[name]))
        except (struct.error, ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as error:
            reason = str(error)[:120] or type(error).__name__
            raise LmrError(f"{folder / f'{name}{suffix}'}: damaged, or of an unknown version ({reason})") from None
    cameras: dict[int, Camera] = parts["cameras"]
    ids, places = parts["points3D"]
    images = []
    for name, camera, rotation, shift, observed in parts["images"]:
        if camera not in cameras:
            raise LmrError(
                f"{folder / f'images{suffix}'}: image {name} has camera {camera}, which cameras{suffix} lacks"
            )
        images.append(_image(name, cameras[camera], rotation, shift, observed, ids, places))
    digest = hashlib.sha256(b"".join(hashlib.sha256(content[name]).digest() for name in FILES)).hexdigest()
    return Model(folder=folder, fingerprint=digest, images=tuple(images), points=len(ids))


def _image(
    name: str,
    camera: Camera,
    rotation: npt.NDArray[np.float64],
    shift: npt.NDArray[np.float64],
    observed: npt.NDArray[np.void],
    ids: npt.NDArray[np.int64],
    places: npt.NDArray[np.float64],
) -> ModelImage:
    observed = observed[observed["point"] >= 0]
    # A photo may see a point twice; its first place counts.
    own, first = np.unique(observed["point"], return_index=True)
    at = np.searchsorted(ids, own)
    known = (
        (at < len(ids)) & (ids[np.minimum(at, max(0, len(ids) - 1))] == own) if len(ids) else np.zeros(len(own), bool)
    )
    own, first, at = own[known], first[known], at[known]
    with np.errstate(all="ignore"):  # a point at no finite place has no depth
        depth = places[at] @ _third_row(rotation) + shift[2]
    front = (depth > 0) & np.isfinite(depth)
    chosen = observed[first[front]]
    return ModelImage(
        name=name,
        camera=camera,
        ids=own[front],
        points=np.column_stack([chosen["x"], chosen["y"]]).astype(np.float64),
        depth=depth[front],
    )


def _third_row(quaternion: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Last row of the rotation matrix of a quaternion (w, x, y, z): depth needs no other."""
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    return np.array([2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)])


def _camera(number: int, width: int, height: int, parameters: npt.NDArray[np.float64]) -> Camera:
    if number not in CAMERAS:
        raise ValueError(f"camera model {number} has no focal length that is known here")
    focal = float(np.mean(parameters[: CAMERAS[number][2]]))
    if not (width > 0 and height > 0 and np.isfinite(focal) and focal > 0):
        raise ValueError(f"a camera of {width}x{height} pixels with focal length {focal}")
    return Camera(width=width, height=height, focal=focal)


class _Bytes:
    """A cursor over little-endian bytes that never reads past their end."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from(f"<{layout}", self.data, self.at)
        self.at += struct.calcsize(f"<{layout}")
        return values

    def array(self, kind: Any, count: int) -> npt.NDArray[Any]:
        values = np.frombuffer(self.data, kind, count, self.at)
        self.at += values.nbytes
        return values

    def text(self) -> str:
        end = self.data.index(b"\0", self.at)
        value, self.at = self.data[self.at : end].decode(), end + 1
        return value

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > len(self.data):
            raise ValueError("it ends too soon")


def _cameras_bin(data: bytes) -> dict[int, Camera]:
    file = _Bytes(data)
    found = {}
    for _ in range(file.take("Q")[0]):
        name, model, width, height = file.take("iiQQ")
        if model not in CAMERAS:
            raise ValueError(f"camera model {model} has no focal length that is known here")
        found[name] = _camera(model, width, height, file.array("<f8", CAMERAS[model][1]))
    return found


def _pose(
    name: str, pose: list[Any], observed: npt.NDArray[np.void]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """(quaternion, translation) of an image; ValueError when they, or what it observes, are no finite numbers."""
    values = np.array(pose, np.float64)
    if values.shape != (7,) or not np.isfinite(values).all() or not values[:4].any():
        raise ValueError(f"image {name} has no pose of seven numbers")
    if not (np.isfinite(observed["x"]).all() and np.isfinite(observed["y"]).all()):
        raise ValueError(f"image {name} observes a point at no finite place")
    return values[:4], values[4:]


def _images_bin(data: bytes) -> list[tuple[str, int, Any, Any, npt.NDArray[np.void]]]:
    file = _Bytes(data)
    found = []
    for _ in range(file.take("Q")[0]):
        _, *pose = file.take("i7d")
        (camera,) = file.take("i")
        name = file.text()
        observed = file.array(OBSERVATION, file.take("Q")[0])
        found.append((name, camera, *_pose(name, pose, observed), observed))
    return found


def _points_bin(data: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    file = _Bytes(data)
    ids, places = [], []
    for _ in range(file.take("Q")[0]):
        name, *place = file.take("Q3d")
        file.skip(11)  # colour, error
        file.skip(8 * file.take("Q")[0])  # the track: images say the same
        ids.append(name)
        places.append(place)
    return _sorted(ids, places)


def _sorted(ids: list[int], places: list[list[float]]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    order = np.argsort(np.array(ids, np.int64), kind="stable")
    return np.array(ids, np.int64)[order], np.array(places, np.float64).reshape(-1, 3)[order]


def _lines(data: bytes) -> list[str]:
    return [line for line in data.decode().splitlines() if not line.startswith("#")]


def _check_count(data: bytes, found: int) -> None:
    """ValueError when a text file's comment counts otherwise: one that is cut at a line's end looks whole."""
    told = COUNT.search(data)
    if told and int(told[1]) != found:
        raise ValueError(f"its comment counts {int(told[1])}, it holds {found}")


def _cameras_txt(data: bytes) -> dict[int, Camera]:
    found = {}
    for line in filter(str.strip, _lines(data)):
        name, model, width, height, *parameters = line.split()
        values = np.array(parameters, np.float64)
        if model not in BY_NAME or len(values) != CAMERAS[BY_NAME[model]][1]:
            raise ValueError(f"camera {name}: model {model} with {len(values)} parameters is not known here")
        found[int(name)] = _camera(BY_NAME[model], int(width), int(height), values)
    return found


def _images_txt(data: bytes) -> list[tuple[str, int, Any, Any, npt.NDArray[np.void]]]:
    # Two lines an image; the second one, its observations, may be empty.
    lines = _lines(data)
    while lines and not lines[-1].strip() and len(lines) % 2:
        lines.pop()
    found = []
    for head, tail in zip(lines[::2], lines[1::2], strict=True):
        _, *pose, camera, name = head.split(maxsplit=9)
        values = np.array(tail.split(), np.float64).reshape(-1, 3)
        observed = np.zeros(len(values), OBSERVATION)
        observed["x"], observed["y"], observed["point"] = values.T
        found.append((name.strip(), int(camera), *_pose(name.strip(), pose, observed), observed))
    return found


def _points_txt(data: bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    rows = [line.split(maxsplit=4)[:4] for line in filter(str.strip, _lines(data))]
    return _sorted([int(row[0]) for row in rows], [[float(value) for value in row[1:]] for row in rows])


READERS: Mapping[str, Mapping[str, Any]] = {
    ".bin": {"cameras": _cameras_bin, "images": _images_bin, "points3D": _points_bin},
    ".txt": {"cameras": _cameras_txt, "images": _images_txt, "points3D": _points_txt},
}
