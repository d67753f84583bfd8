"""A reconstruction with known truth: every camera looks straight at a textured plane, as `small_build.view` does.

So photos, observations, overlaps, scale ratios and landings all follow from the same numbers.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 400, 300
FOCAL = 500.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One camera: `zoom`, `turn` (radians) and the point of the plane in the middle; what it observes, by point id."""

    name: str
    zoom: float
    turn: float
    middle: np.ndarray
    places: dict[int, np.ndarray]  # pixels, the centre of the top-left one is 0, 0

    @property
    def matrix(self) -> np.ndarray:
        """2x3: plane -> pixels."""
        rotation = self.zoom * np.array(
            [[np.cos(self.turn), -np.sin(self.turn)], [np.sin(self.turn), np.cos(self.turn)]]
        )
        return np.column_stack([rotation, np.array([WIDTH, HEIGHT]) / 2 - rotation @ self.middle])


def camera_of_view(name: str, seed: int, size: tuple[int, int] = (900, 700)) -> Seen:
    """The camera of `small_build.view(picture, seed)` for a picture of `size`."""
    random = np.random.default_rng(seed)
    zoom, turn = 2 ** random.uniform(-0.5, 0.5), np.deg2rad(random.uniform(-12, 12))
    middle = np.array(size) / 2 + random.uniform(-70, 70, 2)
    return Seen(name=name, zoom=zoom, turn=turn, middle=middle, places={})


def observed(cameras: list[Seen], points: dict[int, np.ndarray], seed: int, share: float = 0.7) -> list[Seen]:
    """The cameras with a random share of the points (id -> place on the plane) that lie inside their pictures."""
    random = np.random.default_rng(seed)
    full = []
    for camera in cameras:
        places = {}
        for name, point in points.items():
            place = camera.matrix @ [*point, 1.0]
            if (place >= 0).all() and (place < [WIDTH, HEIGHT]).all() and random.random() < share:
                places[name] = place
        full.append(Seen(**{**camera.__dict__, "places": places}))
    return full


def _pose(camera: Seen) -> tuple[list[float], list[float]]:
    """Quaternion (w, x, y, z) and translation; the plane is z = 0 and the camera is FOCAL / zoom away."""
    half = camera.turn / 2
    rotation = camera.matrix[:, :2] / camera.zoom
    return [np.cos(half), 0.0, 0.0, np.sin(half)], [*(-rotation @ camera.middle), FOCAL / camera.zoom]


def write_text(folder: Path, cameras: list[Seen], points: dict[int, np.ndarray]) -> None:
    """cameras.txt, images.txt, points3D.txt. Every image also holds a place that is no point (-1)."""
    folder.mkdir(parents=True, exist_ok=True)
    centre = f"{WIDTH / 2 + 0.5} {HEIGHT / 2 + 0.5}"
    (folder / "cameras.txt").write_text(f"# a comment\n7 SIMPLE_PINHOLE {WIDTH} {HEIGHT} {FOCAL} {centre}\n")
    lines, tracks = ["# two lines an image"], {name: [] for name in points}
    for number, camera in enumerate(cameras, 1):
        quaternion, shift = _pose(camera)
        lines.append(" ".join(map(repr, [number, *map(float, quaternion), *map(float, shift), 7])) + f" {camera.name}")
        places = ["3.0 4.0 -1"]
        for index, (name, (x, y)) in enumerate(camera.places.items(), 1):
            places.append(f"{float(x) + 0.5!r} {float(y) + 0.5!r} {name}")
            tracks[name].append(f"{number} {index}")
        lines.append(" ".join(places))
    (folder / "images.txt").write_text("\n".join(lines) + "\n")
    rows = [f"{n} {float(x)!r} {float(y)!r} 0.0 1 2 3 0.5 {' '.join(tracks[n])}" for n, (x, y) in points.items()]
    (folder / "points3D.txt").write_text("\n".join(rows) + "\n")


def write_binary(folder: Path, cameras: list[Seen], points: dict[int, np.ndarray]) -> None:
    """The same model as cameras.bin, images.bin, points3D.bin."""
    folder.mkdir(parents=True, exist_ok=True)
    head = struct.pack("<QiiQQ", 1, 7, 0, WIDTH, HEIGHT)
    (folder / "cameras.bin").write_bytes(head + struct.pack("<3d", FOCAL, WIDTH / 2 + 0.5, HEIGHT / 2 + 0.5))
    data, tracks = struct.pack("<Q", len(cameras)), dict.fromkeys(points, b"")
    for number, camera in enumerate(cameras, 1):
        quaternion, shift = _pose(camera)
        data += struct.pack("<i7di", number, *quaternion, *shift, 7) + camera.name.encode() + b"\0"
        data += struct.pack("<Q", len(camera.places) + 1) + struct.pack("<ddq", 3.0, 4.0, -1)
        for index, (name, (x, y)) in enumerate(camera.places.items(), 1):
            data += struct.pack("<ddq", x + 0.5, y + 0.5, name)
            tracks[name] += struct.pack("<ii", number, index)
    (folder / "images.bin").write_bytes(data)
    data = struct.pack("<Q", len(points))
    for name, (x, y) in points.items():
        data += struct.pack("<Q3d3Bd", name, x, y, 0.0, 1, 2, 3, 0.5) + struct.pack("<Q", len(tracks[name]) // 8)
        data += tracks[name]
    (folder / "points3D.bin").write_bytes(data)
