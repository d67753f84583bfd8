"""COLMAP models: read as they were written (and as pycolmap reads them), measured as counting says."""

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lmr_tools.colmap_model import Model, ModelImage, model_folders, read_model
from lmr_tools.landing import landing
from lmr_tools.observations import (
    Observations,
    match_observed,
    most_shared,
    name_photos,
    observations_from_bytes,
    observations_to_bytes,
    observe,
)
from lmr_tools.pairs import PairStore, observation_file, verify_all
from lmr_tools.schema import LmrError

from .reconstruction_fixture import FOCAL, HEIGHT, WIDTH, Seen, camera_of_view, observed, write_binary, write_text


@pytest.fixture(scope="module")
def truth() -> tuple[list[Seen], dict[int, np.ndarray]]:
    random = np.random.default_rng(1)
    points = {3 * n + 5: random.uniform([50, 50], [850, 650]) for n in range(900)}
    return observed([camera_of_view(f"photos/v{n}.png", n) for n in range(7)], points, 2), points


def row(width: int = WIDTH, height: int = HEIGHT) -> SimpleNamespace:
    return SimpleNamespace(width=width, height=height)


def seen_by(image: ModelImage, **size: int) -> Observations:
    value = observe(0, image, row(**size), 1)  # type: ignore[arg-type]
    assert value is not None
    return value


@pytest.mark.parametrize("write", [write_text, write_binary])
def test_a_model_is_read_as_it_was_written(truth: tuple, tmp_path: Path, write: object) -> None:
    cameras, points = truth
    write(tmp_path / "sparse" / "0", cameras, points)  # type: ignore[operator]
    assert model_folders(tmp_path) == [tmp_path / "sparse" / "0"]
    model = read_model(tmp_path / "sparse" / "0")
    assert model.points == len(points)
    assert [image.name for image in model.images] == [camera.name for camera in cameras]
    for image, camera in zip(model.images, cameras, strict=True):
        assert image.ids.tolist() == sorted(camera.places)
        assert np.allclose(image.points, [camera.places[i] + 0.5 for i in image.ids], atol=1e-12)
        assert np.allclose(image.depth, FOCAL / camera.zoom)
        assert image.camera.focal == FOCAL


def test_pycolmap_reads_the_same(truth: tuple, tmp_path: Path) -> None:
    pycolmap = pytest.importorskip("pycolmap")
    write_text(tmp_path / "text", *truth)
    reference = pycolmap.Reconstruction(str(tmp_path / "text"))
    (tmp_path / "binary").mkdir()
    reference.write_binary(str(tmp_path / "binary"))
    for folder in (tmp_path / "text", tmp_path / "binary"):
        model = read_model(folder)
        by_name = {image.name: image for image in reference.images.values()}
        assert len(by_name) == len(model.images)
        for image in model.images:
            other = by_name[image.name]
            expected = {p.point3D_id: p.xy for p in other.points2D if p.has_point3D()}
            assert image.ids.tolist() == sorted(expected)
            assert np.allclose(image.points, [expected[i] for i in image.ids])
            pose = other.cam_from_world() if callable(other.cam_from_world) else other.cam_from_world
            depth = [(pose * reference.points3D[i].xyz)[2] for i in image.ids]
            assert np.allclose(image.depth, depth)


def test_overlap_scale_and_landing_are_those_of_the_cameras(truth: tuple, tmp_path: Path) -> None:
    cameras, points = truth
    write_binary(tmp_path, cameras, points)
    images = read_model(tmp_path).images
    for a, b in itertools.combinations(range(len(cameras)), 2):
        pair = match_observed(seen_by(images[a]), seen_by(images[b]))
        shared = cameras[a].places.keys() & cameras[b].places.keys()
        assert pair.consistent == pair.inliers == pair.matches == len(shared)
        assert pair.overlap_a == len(shared) / len(cameras[a].places)
        assert pair.overlap_b == len(shared) / len(cameras[b].places)
        assert pair.scale_log2 == pytest.approx(np.log2(cameras[b].zoom / cameras[a].zoom), abs=1e-4)
        middle = np.array([[WIDTH / 2, HEIGHT / 2], [120.0, 100.0]])
        back = np.linalg.inv(np.vstack([cameras[a].matrix, [0, 0, 1]]))
        expected = np.column_stack([middle, np.ones(2)]) @ back.T @ cameras[b].matrix.T
        place, _, _ = landing(pair, middle)
        assert np.abs(place - expected).max() < 0.2
        turned = pair.flipped()
        other = match_observed(seen_by(images[b]), seen_by(images[a]))
        assert turned.overlap_a == other.overlap_a
        assert turned.scale_log2 == pytest.approx(other.scale_log2, abs=1e-6)


def test_a_resized_copy_is_measured_in_its_own_pixels(truth: tuple, tmp_path: Path) -> None:
    write_binary(tmp_path, *truth)
    first, second, *_ = read_model(tmp_path).images
    whole = match_observed(seen_by(first), seen_by(second))
    half = match_observed(seen_by(first), seen_by(second, width=WIDTH // 2, height=HEIGHT // 2))
    assert half.overlap_a == whole.overlap_a
    assert half.scale_log2 == pytest.approx(whole.scale_log2 - 1, abs=1e-5)
    assert np.allclose(half.points_b, (whole.points_b + 0.5) / 2 - 0.5, atol=1e-3)
    assert observe(0, first, row(width=WIDTH, height=WIDTH), 1) is None  # type: ignore[arg-type]


def test_points_turn_with_the_photo(truth: tuple, tmp_path: Path) -> None:
    """Against turning a picture in which the points are drawn."""
    from PIL import Image as PilImage

    from lmr_tools.turning import TURNS

    write_binary(tmp_path, *truth)
    image = read_model(tmp_path).images[0]
    moves = {
        **{2: PilImage.Transpose.FLIP_LEFT_RIGHT, 3: PilImage.Transpose.ROTATE_180},
        **{4: PilImage.Transpose.FLIP_TOP_BOTTOM, 5: PilImage.Transpose.TRANSPOSE, 6: PilImage.Transpose.ROTATE_270},
        **{7: PilImage.Transpose.TRANSVERSE, 8: PilImage.Transpose.ROTATE_90},
    }
    straight = seen_by(image)
    place = np.rint(straight.points).astype(int)
    inside = (place >= 1).all(axis=1) & (place < [WIDTH - 1, HEIGHT - 1]).all(axis=1)
    for orientation in TURNS:
        grid = np.arange(WIDTH * HEIGHT, dtype=np.int32).reshape(HEIGHT, WIDTH)
        picture = (
            PilImage.fromarray(grid, "I")
            if orientation == 1
            else PilImage.fromarray(grid).transpose(moves[orientation])
        )
        turned_grid = np.asarray(picture)
        height, width = turned_grid.shape
        value = observe(0, image, row(width=width, height=height), orientation)  # type: ignore[arg-type]
        assert value is not None
        x, y = np.rint(value.points[inside]).astype(int).T
        expected = grid[place[inside][:, 1], place[inside][:, 0]]
        near = np.abs(turned_grid[y, x] - expected)
        # Rounding of a half may go either way: one pixel off in a row or column.
        assert np.isin(near, [0, 1, WIDTH, WIDTH - 1, WIDTH + 1]).all()
        assert (near == 0).mean() > 0.95


def test_who_shares_most_is_what_counting_says(truth: tuple, tmp_path: Path) -> None:
    cameras, points = truth
    write_binary(tmp_path, cameras, points)
    seen = [seen_by(image) for image in read_model(tmp_path).images]
    near = most_shared([*seen[:3], None, *seen[3:]], 4)
    assert (near[3] == -1).all()
    for a, own in enumerate([*cameras[:3], None, *cameras[3:]]):
        if own is None:
            continue
        counts = [
            0 if other is None or other is own else len(own.places.keys() & other.places.keys())
            for other in [*cameras[:3], None, *cameras[3:]]
        ]
        assert sorted((counts[n] for n in near[a] if n >= 0), reverse=True) == sorted(counts, reverse=True)[:4]
        assert 3 not in near[a]


def test_bytes_come_back(truth: tuple, tmp_path: Path) -> None:
    write_binary(tmp_path, *truth)
    value = seen_by(read_model(tmp_path).images[0])
    again = observations_from_bytes(observations_to_bytes(value))
    assert all(np.array_equal(getattr(again, name), getattr(value, name)) for name in value.__dict__)


def test_a_damaged_work_file_is_named_with_the_way_out(tmp_path: Path) -> None:
    store = PairStore(work=tmp_path, max_side=800, max_features=2000, model="m")
    rows = [SimpleNamespace(sha256="a" * 64), SimpleNamespace(sha256="b" * 64)]
    for photo in rows:
        path = observation_file(store, photo.sha256)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"half")
    with pytest.raises(LmrError, match=r"\.points: .*; delete this file and run the build again"):
        list(verify_all(rows, np.array([[1], [0]], np.int32), store, map))  # type: ignore[arg-type]


def test_photos_are_named_without_doubt_or_not_at_all() -> None:
    def model(folder: str, *names: str) -> Model:
        images = [SimpleNamespace(name=name) for name in names]
        return Model(folder=Path(folder), fingerprint="", images=tuple(images), points=0)  # type: ignore[arg-type]

    paths = {
        "a": "0001/x.jpg",
        "b": "0002/x.jpg",
        "c": "deep/er/y.jpg",
        "d": "z.jpg",
        "e": "shard.tar::0003/w.jpg",
        "f": "twice.jpg",
    }
    first = model("/models/0001/sparse", "x.jpg", "er/y.jpg", "images/z.jpg", "0003/w.jpg", "other/y.jpg", "twice.jpg")
    second = model("/models/0002/sparse", "x.jpg", "images/twice.jpg", "nothing.jpg")
    found = name_photos([first, second], paths)
    assert {name: (number, image.name) for name, (number, image) in found.items()} == {
        "a": (0, "x.jpg"),
        "b": (1, "x.jpg"),
        "c": (0, "er/y.jpg"),
        "d": (0, "images/z.jpg"),
        "e": (0, "0003/w.jpg"),
    }


@pytest.mark.parametrize("name", ["cameras", "images", "points3D"])
@pytest.mark.parametrize("write", [write_text, write_binary])
def test_damage_is_told_with_the_file(truth: tuple, tmp_path: Path, name: str, write: object) -> None:
    write(tmp_path, *truth)  # type: ignore[operator]
    suffix = ".txt" if write is write_text else ".bin"
    path = tmp_path / f"{name}{suffix}"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3] if suffix == ".bin" else data[:-30] + b" what")
    with pytest.raises(LmrError, match=f"{name}{suffix}: damaged"):
        read_model(tmp_path)
    if suffix == ".bin":  # a count that no file could hold
        path.write_bytes(b"\xff" * 7 + b"\x7f" + data[8:])
        with pytest.raises(LmrError, match=f"{name}{suffix}: damaged"):
            read_model(tmp_path)


def test_a_text_file_cut_at_a_line_end_is_told_by_its_own_count(truth: tuple, tmp_path: Path) -> None:
    write_text(tmp_path, *truth)
    cameras, points = truth
    whole = read_model(tmp_path)
    for name, noun, count, entry in (
        ("cameras", "cameras", 1, 1),
        ("images", "images", len(cameras), 2),
        ("points3D", "points", len(points), 1),
    ):
        path = tmp_path / f"{name}.txt"
        text = f"# Number of {noun}: {count}, mean observations per image: 3.5\n{path.read_text()}"
        path.write_text(text)
        assert read_model(tmp_path).points == whole.points
        path.write_text("".join(text.splitlines(keepends=True)[:-entry]))
        with pytest.raises(LmrError, match=rf"{name}\.txt: damaged.*counts {count}, it holds {count - 1}"):
            read_model(tmp_path)
        path.write_text(text)


@pytest.mark.parametrize(
    ("old", "new"),
    [("1 1.0 0.0", "1 0.0"), (" 7 ", " nan 7 "), ("3.0 4.0 -1", "3.0 inf -1")],
    ids=["fields missing", "field too much", "observed nowhere"],
)
def test_a_pose_that_is_none_is_damage(truth: tuple, tmp_path: Path, old: str, new: str) -> None:
    cameras, points = truth
    write_text(tmp_path, [replace(cameras[0], turn=0.0)], points)
    path = tmp_path / "images.txt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(LmrError, match=r"images.txt: damaged"):
        read_model(tmp_path)


def test_a_point_at_no_finite_place_is_not_seen(truth: tuple, tmp_path: Path) -> None:
    write_text(tmp_path, *truth)
    whole = read_model(tmp_path)
    path = tmp_path / "points3D.txt"
    lines = path.read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if not line.startswith("#"))
    name = lines[at].split()[0]
    lines[at] = f"{name} nan inf 0 " + lines[at].split(maxsplit=4)[4]
    path.write_text("\n".join(lines))
    for before, image in zip(whole.images, read_model(tmp_path).images, strict=True):
        assert set(before.ids) - {int(name)} == set(image.ids)
        assert np.isfinite(image.depth).all()


def test_a_folder_without_a_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(LmrError, match="no such folder"):
        model_folders(tmp_path / "none")
    (tmp_path / "cameras.txt").write_text("")
    with pytest.raises(LmrError, match="holds no sparse model"):
        model_folders(tmp_path)
    shutil.rmtree(tmp_path)
