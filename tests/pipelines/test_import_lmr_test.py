"""The LMR test set as a dataset: its own groups, measured here; a photo may lie in several folders."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from lmr_tools.dataset import read_manifest
from lmr_tools.images import encode_png
from lmr_tools.shards import read_shard
from lmr_tools.verify import verify_dataset
from pipelines.cli import cli

from .small_build import bytes_of, place, view

SIZE = 96
# folder -> the views of its scene that lie beside the target, which the folder is named after
FOLDERS = {"0000_a.png": "bcd", "0000_b.png": "ac", "0003_a.png": "bcdef", "5013_c.png": "ab"}


@pytest.fixture(scope="module")
def test_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "LMR_Test"
    for name, beside in FOLDERS.items():
        scene = int(name[:4])
        (root / name).mkdir(parents=True)
        for letter in name[5] + beside:
            (root / name / f"{letter}.png").write_bytes(photo(scene, letter))
    return root


def photo(scene: int, letter: str) -> bytes:
    # Each in a light of its own: crops of equally exposed views are duplicates.
    light = 1 - 0.07 * (ord(letter) - ord("a"))
    return encode_png((view(place(scene), 1000 * scene + ord(letter)) * light).astype(np.uint8))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def import_set(test_set: Path, out: Path, *more: object) -> Result:
    return run("import-lmr", test_set, "--out", out, "--size", SIZE, "--workers", 1, *more)


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(out / "tables" / f"{name}.parquet")


@pytest.fixture(scope="module")
def dataset(test_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "out"
    result = import_set(test_set, out)
    assert result.exit_code == 0, result.output
    assert "4 groups (0 train, 0 val, 4 test) from 4 of 4 folders" in result.output
    return out


def test_a_group_is_its_folder_and_everything_is_test(test_set: Path, dataset: Path) -> None:
    assert verify_dataset(dataset).problems == ()
    images = table(dataset, "images").set_index("image_id")
    same = images.reset_index().groupby("sha256")["path"].agg(set)
    groups = [group for path in sorted((dataset / "shards").glob("*.tar")) for group in read_shard(path)]
    seen = set()
    for group in groups:
        (folder,) = {path.split("/")[0] for path in same[images.loc[group.target_image, "sha256"]]} & {
            name for name in FOLDERS if f"{name}/{name[5:]}" in same[images.loc[group.target_image, "sha256"]]
        }
        seen.add(folder)
        assert group.scene == folder[:4] and group.split == "test"
        assert 2 <= len(group.references) <= len(FOLDERS[folder])
        for reference in group.references:
            assert any(path.startswith(f"{folder}/") for path in same[images.loc[reference.image_id, "sha256"]])
            assert reference.overlap is not None and reference.clip_score is None
    assert seen == set(FOLDERS)
    # Views of one place are matched, not joined by their label alone.
    rows = table(dataset, "groups")
    assert {"matched"} <= set(rows["landing"]) <= {"matched", "elsewhere"} and "H" in set(rows["tier"])
    pairs = table(dataset, "pairs")
    assert len(pairs) == sum(map(len, FOLDERS.values()))
    counts = read_manifest(dataset)["counts"]
    assert counts["annotations"] == {"lines": 4, "used": 4, "rejected": 0}
    assert counts["rejects"] == {"dedup: exact duplicate": 3}  # a, b and c of scene 0000 lie in two folders
    card = (dataset / "README.md").read_text()
    assert "4 of 4 folders" in card and "were measured here" in card and "2-D matches, not" in card


def test_the_result_depends_on_photos_and_seed_alone(test_set: Path, dataset: Path, tmp_path: Path) -> None:
    assert import_set(test_set, tmp_path / "b", "--workers", 2).exit_code == 0
    assert bytes_of(tmp_path / "b") == bytes_of(dataset)
    (tmp_path / "b" / "dataset.json").unlink()  # as a kill before the end leaves it
    assert import_set(test_set, tmp_path / "b").exit_code == 0
    assert bytes_of(tmp_path / "b") == bytes_of(dataset)
    assert import_set(test_set, tmp_path / "c", "--seed", 1).exit_code == 0
    corners = [table(out, "groups")[["target_x", "target_y"]] for out in (tmp_path / "c", dataset)]
    assert not corners[0].equals(corners[1])
    done = run("rebuild", dataset, "--source", test_set, "--out", tmp_path / "d", "--workers", 1)
    assert done.exit_code == 0, done.output
    assert bytes_of(tmp_path / "d") == bytes_of(dataset)


def test_other_commands_take_it(dataset: Path, tmp_path: Path) -> None:
    group_id = table(dataset, "groups")["group_id"].iloc[0]
    shown = run("explain", dataset, group_id, "--json")
    assert shown.exit_code == 0, shown.output
    chosen = {one["slot"] for one in json.loads(shown.stdout)["considered"] if one["slot"]}
    assert chosen == set(table(dataset, "groups").query("group_id == @group_id")["slot"])
    assert run("inspect", dataset).exit_code == 0
    results = ["--data", dataset, "--method", "bicubic", "--out", tmp_path / "r", "--metrics", "psnr_y"]
    assert run("evaluate", *results).exit_code == 0
    frame = pd.read_parquet(tmp_path / "r" / "results.parquet")
    assert len(frame) == len(FOLDERS)


def test_crops_per_pair_asks_for_more_crops_of_a_target(test_set: Path, dataset: Path, tmp_path: Path) -> None:
    assert import_set(test_set, tmp_path / "out", "--crops-per-pair", 3).exit_code == 0
    assert len(set(table(tmp_path / "out", "groups")["group_id"])) > len(FOLDERS)
    assert verify_dataset(tmp_path / "out").problems == ()


def test_folders_without_a_group_are_told_and_counted(test_set: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(test_set, tmp_path / "LMR_Test")
    (copy / "0000_b.png" / "b.png").write_bytes(b"no picture")  # the photo lies whole in another folder, too
    for letter in "ab":
        (copy / "5013_c.png" / f"{letter}.png").write_bytes(photo(77, letter))
    shutil.copytree(copy / "0003_a.png", copy / "0004_a.png")
    result = import_set(copy, tmp_path / "out")
    assert result.exit_code == 3, result.output
    assert "2 groups (0 train, 0 val, 2 test) from 2 of 5 folders" in result.output
    rows = table(tmp_path / "out", "rejects").query("stage == 'annotation'").set_index("path")
    assert rows["reason"].to_dict() == {
        "0000_b.png": "photo not usable",
        "0004_a.png": "repeated target",
        "5013_c.png": "no group",
    }
    assert "0003_a.png" in rows.loc["0004_a.png", "detail"]
    assert verify_dataset(tmp_path / "out").problems == ()
    assert read_manifest(tmp_path / "out")["counts"]["annotations"] == {"lines": 5, "used": 2, "rejected": 3}


@pytest.mark.parametrize(
    ("break_it", "text"),
    [
        (lambda root: (root / "0000_a.png" / "a.png").unlink(), "a.png: is missing"),
        (lambda root: (root / "else").mkdir(), "expected one folder SCENE_TARGETFILE"),
        (lambda root: [path.unlink() for path in root.glob("5013*/[ab].png")], "no reference"),
    ],
)
def test_another_layout_is_named(test_set: Path, tmp_path: Path, break_it, text: str) -> None:
    copy = shutil.copytree(test_set, tmp_path / "LMR_Test")
    break_it(copy)
    result = import_set(copy, tmp_path / "out")
    assert result.exit_code == 1 and text in result.output and result.output.count("\n") == 1
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_no_group_at_all_is_one_line(test_set: Path, tmp_path: Path) -> None:
    result = import_set(test_set, tmp_path / "out", "--size", 2000)
    assert result.exit_code == 1
    assert "none of 4 folders makes a group; 0000_a.png: too few references" in result.output
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_options_of_the_annotation_are_refused(test_set: Path, tmp_path: Path) -> None:
    for more in ((test_set,), ("--test-scene", "0001"), ("--val-share", 0.1)):
        result = run("import-lmr", test_set, *more, "--out", tmp_path / "out")
        assert result.exit_code == 2 and "is a folder, so the test set" in result.output
    (tmp_path / "a.csv").write_text("x")
    result = run("import-lmr", tmp_path / "a.csv", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "name ROOT" in result.output
