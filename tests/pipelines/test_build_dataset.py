"""The build as a whole: same bytes from any number of workers, after any kill, and little work on a grown folder."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

from lmr_tools.dataset import claim, read_manifest
from lmr_tools.images import encode_png
from lmr_tools.schema import LmrError
from lmr_tools.shards import read_shard
from lmr_tools.verify import verify_dataset
from pipelines.cli import cli

from .small_build import RECIPE, bytes_of, place, run, view, write_photos

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder)
    return folder


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "dataset"
    run(photos, out)
    return out


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(out / "tables" / f"{name}.parquet")


def in_a_process(photos: Path, out: Path, kill_at: int, **changes: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.pipelines.small_build", str(photos), str(out), str(kill_at)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, json.dumps(changes)], cwd=ROOT, capture_output=True, text=True, check=False, env=environment
    )


def test_a_build_makes_groups_of_one_place_that_verify(built: Path) -> None:
    groups, images = table(built, "groups"), table(built, "images").set_index("image_id")
    assert len(groups) >= 20
    place_of = images["path"].str.split("_").str[0]
    assert (place_of[groups["target_image"]].to_numpy() == place_of[groups["ref_image"]].to_numpy()).all()
    assert verify_dataset(built).problems == ()
    manifest = read_manifest(built)
    assert manifest["embedder"]["model"].startswith("stand-in")
    assert manifest["index"]["recall"] == 1.0


def test_every_photo_is_accounted_for(built: Path) -> None:
    images, rejects, groups = table(built, "images"), table(built, "rejects"), table(built, "groups")
    used = set(groups["target_image"]) | set(groups["ref_image"])
    assert set(images[images["status"] == "used"]["image_id"]) == used
    assert set(images[images["status"] == "rejected"]["image_id"]) == set(rejects["image_id"])
    assert images["status"].isin(["used", "unused", "rejected"]).all()
    targets = images["image_id"].isin(groups["target_image"])
    assert (images["no_target"].isna() == (targets | (images["status"] == "rejected"))).all()


def test_splits_share_no_photo_and_no_scene(built: Path) -> None:
    groups = table(built, "groups")
    assert groups["split"].nunique() == 3
    for column in ("target_image", "ref_image", "scene"):
        assert (groups.groupby(column)["split"].nunique() == 1).all()
    both = pd.concat([groups[["target_image", "split"]].set_axis(["i", "s"], axis=1),
                      groups[["ref_image", "split"]].set_axis(["i", "s"], axis=1)])  # fmt: skip
    assert (both.groupby("i")["s"].nunique() == 1).all()


def test_crops_show_the_same_place(built: Path) -> None:
    """The reference crop's centre shows what the target crop's centre shows: better than a shifted cut does."""
    groups = {group.group_id: group for path in (built / "shards").glob("*.tar") for group in read_shard(path)}
    closer = 0
    total = 0
    for group in groups.values():
        for reference in group.references:
            if reference.tier == "H":
                total += 1
                middle = slice(28, 68)
                aligned = np.corrcoef(group.target[middle, middle].ravel(), reference.pixels[middle, middle].ravel())
                moved = np.corrcoef(group.target[middle, middle].ravel(), reference.pixels[:40, :40].ravel())
                closer += aligned[0, 1] > moved[0, 1]
    assert total >= 10
    assert closer >= 0.9 * total


def test_the_number_of_workers_changes_no_byte(photos: Path, built: Path, tmp_path: Path) -> None:
    done = in_a_process(photos, tmp_path / "two", 0, workers=2)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "two") == bytes_of(built)


def test_killed_anywhere_it_goes_on_to_the_same_bytes(photos: Path, built: Path, tmp_path: Path) -> None:
    whole = in_a_process(photos, tmp_path / "whole", 0)
    writes = int(whole.stdout.split()[-1])
    out = tmp_path / "killed"
    # One folder is killed again and again: each run must live with what the last one left.
    for kill_at in (2, 9, writes // 3, writes // 4, 12, 6):
        killed = in_a_process(photos, out, kill_at)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert not (out / "dataset.json").exists()
        with pytest.raises(LmrError, match="has not finished"):
            read_manifest(out)
    assert in_a_process(photos, out, 0).returncode == 0
    assert bytes_of(out) == bytes_of(built)
    assert not list(out.rglob("*.tmp"))


def test_a_kill_while_shards_and_tables_are_written(photos: Path, built: Path, tmp_path: Path) -> None:
    out = tmp_path / "late"
    shutil.copytree(built, out)
    for name in ("dataset.json", "shards", "tables"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(out / "work" / "shards")
    for kill_at in (1, 3, 4, 3):
        assert in_a_process(photos, out, kill_at).returncode == -signal.SIGKILL
        for tar in (out / "shards").glob("*.tar"):
            assert tar.read_bytes() == (built / "shards" / tar.name).read_bytes()
    assert in_a_process(photos, out, 0).returncode == 0
    assert bytes_of(out) == bytes_of(built)


def test_a_grown_folder_costs_only_what_is_new(tmp_path: Path) -> None:
    photos, out = tmp_path / "photos", tmp_path / "dataset"
    write_photos(photos, places=3, views=5)
    run(photos, out)
    work = out / "work"
    stamps = {path: path.stat().st_mtime_ns for path in work.rglob("*.sift")}
    pieces = {path: path.read_bytes() for path in work.glob("embeddings-*/*.parquet")}
    old = table(out, "embeddings").set_index(["image_id", "view"])["vector"].map(bytes)
    write_photos(photos, places=3, views=2, first_view=5)
    run(photos, out)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert len(list(work.rglob("*.sift"))) == len(stamps) + 6
    assert {path: path.read_bytes() for path in pieces} == pieces
    new = table(out, "embeddings").set_index(["image_id", "view"])["vector"].map(bytes)
    assert (new[old.index] == old).all()
    fresh = tmp_path / "fresh"
    run(photos, fresh)
    assert bytes_of(fresh) == bytes_of(out)


def test_photos_of_a_benchmark_and_copies_are_kept_out(tmp_path: Path) -> None:
    photos, benchmark = tmp_path / "photos", tmp_path / "benchmark"
    write_photos(photos, places=2, views=5)
    benchmark.mkdir()
    leaked = view(place(0), 0)
    (benchmark / "001_0.png").write_bytes(encode_png(leaked[20:260, 30:350]))  # a crop of p0_0.png
    # More crops than are looked at for one picture, of one whose strongest features are mostly elsewhere.
    (benchmark / "002_0.png").write_bytes(encode_png(place(9)))
    for k in range(14):
        crop = place(9)[20 * k : 20 * k + 350, 30 * k : 30 * k + 450]
        (photos / f"crop_{k:02}.png").write_bytes(encode_png(crop))
    (photos / "copy of p1_1.png").write_bytes((photos / "p1_1.png").read_bytes())
    from lmr_tools.config import BuildConfig
    from pipelines import build_dataset

    from . import small_build

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lmr_tools.embed.OpenClipEmbedder", small_build.StandInEmbedder)
        out = tmp_path / "dataset"
        with claim(out):
            build_dataset.build((str(photos),), out, BuildConfig(**RECIPE), benchmarks=(str(benchmark),))
    rejects = table(out, "rejects").set_index("path")
    assert rejects.loc["p0_0.png", "reason"] == "in benchmark"
    assert "001_0.png" in rejects.loc["p0_0.png", "detail"]
    assert Counter(rejects["reason"][rejects.index.str.startswith("crop_")]) == {"in benchmark": 14}
    assert not rejects[rejects["reason"] == "in benchmark"].index.str.startswith("p1_").any()
    assert Counter(rejects["reason"])["exact duplicate"] == 1


def test_labels_keep_scenes_apart(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos / "one", places=1, views=4)
    write_photos(photos / "two", places=1, views=8)
    for path in sorted((photos / "two").glob("*.png"))[:4]:
        path.unlink()  # the two folders hold different views of one place, under two labels
    manifest = run(photos, tmp_path / "dataset", scenes="folder")
    images = table(tmp_path / "dataset", "images").set_index("image_id")
    groups = table(tmp_path / "dataset", "groups")
    assert manifest["counts"]["scenes"] == 2
    assert (images.loc[groups["target_image"], "scene"].values == images.loc[groups["ref_image"], "scene"].values).all()


def test_bad_input_is_one_line_and_an_exit_code(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").touch()
    out = ["--out", str(tmp_path / "d")]
    cases = [
        ([str(tmp_path / "no"), *out], 1, "no such file or folder"),
        ([str(tmp_path / "empty"), "--out", str(other)], 1, "is not a dataset of lmr-tools"),
        (out, 2, "Missing argument"),
        (["x", *out, "--set", "sise=3"], 2, "unknown key 'sise'"),
        (["x", *out, "--size", "8"], 2, "size: "),
        (["x", *out, "--recipe", str(tmp_path / "r.toml")], 2, "no such recipe"),
    ]
    for arguments, code, text in cases:
        result = CliRunner().invoke(cli, ["build-dataset", *arguments])
        assert result.exit_code == code, result.output
        assert text in result.output
        assert "Traceback" not in result.output
    assert not (tmp_path / "d").exists()
    assert list(other.iterdir()) == [other / "thesis.tex"]


def test_too_few_photos_say_why_and_leave_the_tables(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    write_photos(photos, places=3, views=1)
    with pytest.raises(LmrError, match="no group could be made; for 3 of 3 photos: too few references"):
        run(photos, tmp_path / "dataset")
    assert len(table(tmp_path / "dataset", "images")) == 3
    assert not (tmp_path / "dataset" / "dataset.json").exists()


def test_two_builds_into_one_folder_do_not_meet(tmp_path: Path) -> None:
    with claim(tmp_path / "d"), pytest.raises(LmrError, match="another build"), claim(tmp_path / "d"):
        pass


def test_dry_run_counts_and_writes_nothing(photos: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["build-dataset", str(photos), "--out", str(tmp_path / "d"), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "photos     24" in result.output
    # 24 groups of 6 crops; built datasets of photos hold 1.7 to 2 bytes per pixel.
    assert "shards     at most about 0.03 GB" in result.output
    assert not (tmp_path / "d").exists()
