"""A build small enough for tests: generated photos of a few places, and a stand-in embedder that needs no weights.

Run as a program it builds, and can kill itself (-9) at the n-th file it finishes writing, in any stage.
"""

import json
import os
import signal
import sys
from pathlib import Path
from unittest import mock

import cv2
import numpy as np

from lmr_tools.config import BuildConfig
from lmr_tools.images import encode_png

RECIPE = {
    "size": 96,
    "max_side": 400,
    "max_features": 600,
    "candidates": 8,
    "groups_per_photo": 2,
    "val_share": 0.1,
    "test_share": 0.1,
    "shard_samples": 6,
    "clip_model": "stand-in",
    "allow_partial": True,
}


class StandInEmbedder:
    """Small grey thumbnails as vectors: enough to tell generated places apart. Not a learned embedding."""

    name = "stand-in (thumbnail)"
    key = "thumbnail1"
    dimension = 64
    size = 32
    interpolation = "bicubic"
    batch_photos = 4
    parallel = 1

    def __init__(self, *, views: int = 7, **ignored: object) -> None:
        self.views = views

    def embed(self, views_BSSC: np.ndarray) -> np.ndarray:
        grey = views_BSSC.astype(np.float32).mean(axis=3)
        small = grey.reshape(len(grey), 8, 4, 8, 4).mean(axis=(2, 4)).reshape(len(grey), 64)
        small -= small.mean(axis=1, keepdims=True)
        return small / np.maximum(np.linalg.norm(small, axis=1, keepdims=True), 1e-6)


def place(seed: int, height: int = 700, width: int = 900) -> np.ndarray:
    """A textured picture with structure at every scale, so that SIFT finds the same points in its views."""
    random = np.random.default_rng(seed)
    picture = np.full((height, width, 3), 128.0)
    for step, strength in ((2, 30), (5, 26), (14, 26), (60, 40)):
        rough = random.normal(0, strength, (height // step + 2, width // step + 2, 3)).astype(np.float32)
        picture += cv2.resize(rough, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(picture, 0, 255).astype(np.uint8)


def view(picture: np.ndarray, seed: int, *, height: int = 300, width: int = 400) -> np.ndarray:
    """A photo of part of a place: shifted, zoomed, turned a little, exposed differently."""
    random = np.random.default_rng(seed)
    zoom, turn = 2 ** random.uniform(-0.5, 0.5), np.deg2rad(random.uniform(-12, 12))
    middle = np.array(picture.shape[1::-1]) / 2 + random.uniform(-70, 70, 2)
    rotation = zoom * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shift = np.array([width, height]) / 2 - rotation @ middle
    warped = cv2.warpAffine(picture, np.column_stack([rotation, shift]), (width, height), flags=cv2.INTER_AREA)
    return np.clip(warped * random.uniform(0.85, 1.1) + random.uniform(-8, 8), 0, 255).astype(np.uint8)


def write_photos(folder: Path, places: int = 4, views: int = 6, *, first_view: int = 0) -> None:
    """`places` x `views` photos in one flat folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(places):
        picture = place(number)
        for k in range(first_view, first_view + views):
            (folder / f"p{number}_{k}.png").write_bytes(encode_png(view(picture, 1000 * number + k)))


def run(
    photos: Path | tuple[Path, ...],
    out: Path,
    *,
    workers: int = 1,
    remove: Path | None = None,
    models: list[Path] = (),
    **changes: object,
) -> dict:
    """Build in this process with the stand-in embedder."""
    from lmr_tools.dataset import claim
    from pipelines.build_dataset import build

    config = BuildConfig(**{**RECIPE, **changes})
    given = (str(photos),) if isinstance(photos, Path) else tuple(map(str, photos))
    with mock.patch("lmr_tools.embed.OpenClipEmbedder", StandInEmbedder), claim(out):
        return build(given, out, config, workers=workers, remove=remove, models=models)


def bytes_of(out: Path) -> dict[str, bytes]:
    """Every file of a dataset but its work folder and lock."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.name != ".lmr-dataset")
    return {str(p.relative_to(out)): p.read_bytes() for p in files if p.relative_to(out).parts[0] != "work"}


def main() -> None:
    """small_build.py PHOTOS OUT KILL_AT CHANGES: KILL_AT 0 lets the build finish and prints how often it wrote."""
    photos, out, kill_at, changes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), json.loads(sys.argv[4])
    written = 0
    replace = Path.replace

    def counted(self: Path, target: Path) -> Path:
        nonlocal written
        written += 1
        if written == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    with mock.patch.object(Path, "replace", counted):
        run(photos, out, **changes)
    print(written)


if __name__ == "__main__":
    main()
