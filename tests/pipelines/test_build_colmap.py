"""A build on a reconstruction: tiers, scales and crops follow from the cameras that made the photos."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from lmr_tools.dataset import read_manifest
from lmr_tools.images import encode_png
from lmr_tools.schema import LmrError
from lmr_tools.verify import verify_dataset
from pipelines.cli import cli
from tests.lmr_tools.reconstruction_fixture import Seen, camera_of_view, observed, write_binary, write_text

from .small_build import RECIPE, bytes_of, place, run, view

SIZE = RECIPE["size"]
PLACES, VIEWS = 3, 6


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, Seen]]:
    """(photos, models, cameras by path): one model a place; the last photo of each place is in no model."""
    root = tmp_path_factory.mktemp("colmap")
    cameras = {}
    for number in range(PLACES):
        picture = place(number)
        folder = root / "photos" / f"place{number}"
        folder.mkdir(parents=True)
        own = []
        for k in range(VIEWS):
            seed = 1000 * number + k
            (folder / f"{k}.png").write_bytes(encode_png(view(picture, seed)))
            own.append(camera_of_view(f"{k}.png", seed))
        random = np.random.default_rng(number)
        points = {n + 1: random.uniform([0, 0], [900, 700]) for n in range(700)}
        own = observed(own[:-1], points, number)
        write = write_text if number else write_binary
        write(root / "models" / f"place{number}" / "sparse" / "0", own, points)
        cameras |= {f"place{number}/{camera.name}": camera for camera in own}
    return root / "photos", root / "models", cameras


@pytest.fixture(scope="module")
def built(scene: tuple[Path, Path, dict[str, Seen]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "dataset"
    run(scene[0], out, models=[scene[1]])
    return out


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(out / "tables" / f"{name}.parquet")


def test_pairs_are_what_the_cameras_say(scene: tuple[Path, Path, dict[str, Seen]], built: Path) -> None:
    cameras = scene[2]
    path = table(built, "images").set_index("image_id")["path"]
    pairs = table(built, "pairs").query("hops == 1")
    assert len(pairs) >= PLACES * 10
    for pair in pairs.itertuples():
        a, b = cameras[path[pair.target_image]], cameras[path[pair.ref_image]]
        shared = a.places.keys() & b.places.keys()
        assert path[pair.target_image].split("/")[0] == path[pair.ref_image].split("/")[0]
        assert pair.consistent == len(shared)
        assert pair.overlap == pytest.approx(len(shared) / len(a.places), abs=1e-6)
        assert pair.scale_log2 == pytest.approx(np.log2(b.zoom / a.zoom), abs=1e-4)
        tier = "H" if pair.overlap > 0.3 and pair.scale_ratio > 0.9 else "L"
        tier = "M" if tier == "L" and pair.overlap > 0.1 and pair.scale_ratio > 0.66 else tier
        assert pair.tier == tier or (pd.isna(pair.tier) and "duplicate" in pair.reason)
    # All pairs of a place that share points are there, whatever the embeddings mined.
    for number in range(PLACES):
        own = [camera for name, camera in cameras.items() if name.startswith(f"place{number}/")]
        expected = sum(len(a.places.keys() & b.places.keys()) >= 10 for a, b in itertools.permutations(own, 2))
        assert (path[pairs["target_image"]].str.startswith(f"place{number}/").to_numpy()).sum() == expected


def test_crops_are_centred_where_the_cameras_say(scene: tuple[Path, Path, dict[str, Seen]], built: Path) -> None:
    cameras = scene[2]
    path = table(built, "images").set_index("image_id")["path"]
    rows = table(built, "groups").query("landing == 'matched'")
    assert len(rows) >= 10
    assert verify_dataset(built).problems == ()
    for row in rows.itertuples():
        a, b = cameras[path[row.target_image]], cameras[path[row.ref_image]]
        centre = np.array([row.target_x, row.target_y]) + (SIZE - 1) / 2
        plane = np.linalg.solve(a.matrix[:, :2], centre - a.matrix[:, 2])
        wanted = b.matrix @ [*plane, 1.0] - (SIZE - 1) / 2
        wanted = np.clip(wanted, 0, [400 - SIZE, 300 - SIZE])
        assert np.abs(wanted - [row.ref_x, row.ref_y]).max() <= 1.0
    used = set(path[rows["target_image"]]) | set(path[rows["ref_image"]])
    assert not any(name.endswith(f"/{VIEWS - 1}.png") for name in used)


def test_the_dataset_says_so_and_is_made_again(
    scene: tuple[Path, Path, dict[str, Seen]], built: Path, tmp_path: Path
) -> None:
    about = read_manifest(built)["geometry"]
    assert (about["kind"], about["photos"], about["images"]) == ("colmap", PLACES * (VIEWS - 1), PLACES * (VIEWS - 1))
    card = (built / "README.md").read_text()
    assert "COLMAP reconstruction" in card
    assert "2-D matches, not" not in card
    run(scene[0], tmp_path / "again", models=[scene[1]], workers=2)
    assert bytes_of(tmp_path / "again") == bytes_of(built)
    # On one work folder both geometries stay apart.
    run(scene[0], tmp_path / "again")
    assert "geometry" not in read_manifest(tmp_path / "again")
    run(scene[0], tmp_path / "again", models=[scene[1]])
    assert bytes_of(tmp_path / "again") == bytes_of(built)


def test_a_model_of_other_photos_is_refused(scene: tuple[Path, Path, dict[str, Seen]], tmp_path: Path) -> None:
    write_text(tmp_path / "model", [camera_of_view("elsewhere/a.png", 1)], {})
    with pytest.raises(LmrError, match="none of 18 photos is one of its 1 images"):
        run(scene[0], tmp_path / "out", models=[tmp_path / "model"])
    arguments = ["build-dataset", scene[0], "--out", tmp_path / "out", "--geometry", "colmap", tmp_path / "photos"]
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code != 0
    assert "no such folder" in result.output
