"""Merging: nothing leaks between splits, nothing is twice, nothing is made again."""

import shutil
from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner, Result

from lmr_tools.dataset import read_manifest
from lmr_tools.holdout import Claim, settle
from lmr_tools.images import decode, encode_png
from lmr_tools.schema import Split
from lmr_tools.shards import read_shard
from lmr_tools.verify import verify_dataset
from pipelines.cli import cli

from .small_build import bytes_of, place, run, view, write_photos


def write_place(folder: Path, number: int, views: range) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    picture = place(number)
    for k in views:
        (folder / f"p{number}_{k}.png").write_bytes(encode_png(view(picture, 1000 * number + k)))


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two datasets: places 0-3, and 2-5, where 2 and 3 have photos in common and some of their own.

    In the second, photo p2_4 is there with other bytes.
    """
    root = tmp_path_factory.mktemp("parts")
    for number in range(4):
        write_place(root / "a", number, range(5))
    for number in range(2, 6):
        write_place(root / "b", number, range(3, 8))
    picture = decode((root / "b" / "p2_4.png").read_bytes())
    (root / "b" / "p2_4.png").write_bytes(encode_png(picture // 2 * 2))
    run(root / "a", root / "first", groups_per_photo=1)
    run(root / "b", root / "second", groups_per_photo=1, seed=3)
    return root / "first", root / "second"


def lmr(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(out / "tables" / f"{name}.parquet")


def contents(out: Path) -> dict[tuple, np.ndarray]:
    """Every group of the tars by what it is of, with its pixels."""
    found = {}
    for path in sorted((out / "shards").glob("*.tar")):
        for group in read_shard(path):
            key = (group.target_image, group.target_x, group.target_y, *(r.image_id for r in group.references))
            found[key] = np.stack([group.target, *(reference.pixels for reference in group.references)])
    return found


def splits_of(out: Path) -> dict[tuple, str]:
    rows = table(out, "groups").groupby("group_id")
    return {
        (own["target_image"].iloc[0], own["target_x"].iloc[0], own["target_y"].iloc[0], *own["ref_image"]): own[
            "split"
        ].iloc[0]
        for _, own in rows
    }


def test_a_merge_is_sound_and_leaks_nothing(parts: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = lmr("merge", *parts, "--out", out, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert verify_dataset(out).problems == ()
    for command in ("inspect", "verify"):
        assert lmr(command, out).exit_code == 0
    groups, images = table(out, "groups"), table(out, "images").set_index("image_id")
    # The true place stands in the file's name: no place is in two splits.
    photos = pd.concat([groups["target_image"], groups["ref_image"]])
    true_place = images["path"].str.split("_").str[0]
    splits = pd.DataFrame({"place": true_place[photos].to_numpy(), "split": [*groups["split"], *groups["split"]]})
    assert (splits.groupby("place")["split"].nunique() == 1).all()
    assert len(set(splits["place"])) >= 5
    # What is left is taken over from the parts, pixel for pixel, and what is not is counted.
    whole = contents(parts[0]) | contents(parts[1])
    merged = contents(out)
    assert all((whole[key] == pixels).all() for key, pixels in merged.items())
    held = [read_manifest(part)["counts"]["groups"] for part in parts]
    about = read_manifest(out)["merged"]
    assert sum(sum(counts.values()) for counts in held) == len(merged) + sum(about["left_out"].values())
    # Photos of both are one row; every photo of both is there.
    before = [table(part, "images") for part in parts]
    assert set(images.index) == set(before[0]["image_id"]) | set(before[1]["image_id"])
    assert about["near_copies"] >= 1
    # Every group is in the split in which it was.
    old_split = splits_of(parts[1]) | splits_of(parts[0])
    assert {key: old_split[key] for key in splits_of(out)} == splits_of(out)
    assert set(groups["split"]) == {"train", "val", "test"}


def test_disjoint_datasets_are_copied_shard_by_shard(parts: tuple[Path, Path], tmp_path: Path) -> None:
    write_place(tmp_path / "c", 8, range(5))
    write_place(tmp_path / "c", 9, range(5))
    run(tmp_path / "c", tmp_path / "third", val_share=0.0, test_share=0.0)
    out = tmp_path / "out"
    assert lmr("merge", parts[0], tmp_path / "third", "--out", out).exit_code == 0
    assert verify_dataset(out).problems == ()
    old = {path.read_bytes() for part in (parts[0], tmp_path / "third") for path in (part / "shards").iterdir()}
    assert {path.read_bytes() for path in (out / "shards").iterdir()} == old
    assert read_manifest(out)["merged"]["shards_copied"] == len(old)
    assert read_manifest(out)["merged"]["left_out"] == {}
    vectors = [table(part, "embeddings") for part in (parts[0], tmp_path / "third")]
    assert len(table(out, "embeddings")) == sum(map(len, vectors))
    pairs = [table(part, "pairs") for part in (parts[0], tmp_path / "third")]
    pd.testing.assert_frame_equal(table(out, "pairs"), pd.concat(pairs, ignore_index=True))
    # A merged dataset is rebuilt from tables and photos like any other.
    sources = ["--source", parts[0].parent / "a", "--source", tmp_path / "c"]
    result = lmr("rebuild", out, *sources, "--out", tmp_path / "again", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert bytes_of(tmp_path / "again") == bytes_of(out)


def test_a_dataset_merged_with_a_copy_of_itself_adds_nothing(parts: tuple[Path, Path], tmp_path: Path) -> None:
    """The copy has other file names and the same photos, so the same groups."""
    assert "is the same dataset as" in lmr("merge", parts[0], parts[0], "--out", tmp_path / "x").output
    source = tmp_path / "renamed"
    shutil.copytree(parts[0].parent / "a", source)
    for path in list(source.iterdir()):
        path.rename(path.with_name(f"new {path.name}"))
    run(source, tmp_path / "copy", groups_per_photo=1)
    out = tmp_path / "out"
    assert lmr("merge", parts[0], tmp_path / "copy", "--out", out, "--workers", 1).exit_code == 0
    assert {path.name: path.read_bytes() for path in (out / "shards").iterdir()} == {
        path.name: path.read_bytes() for path in (parts[0] / "shards").iterdir()
    }
    columns = ["group_id", "target_image", "ref_image", "slot", "split", "overlap"]
    pd.testing.assert_frame_equal(table(out, "groups")[columns], table(parts[0], "groups")[columns])
    assert len(table(out, "pairs")) == len(table(parts[0], "pairs"))
    assert verify_dataset(out).problems == ()


def test_removed_photos_leave_without_any_source_photo(parts: tuple[Path, Path], tmp_path: Path) -> None:
    groups = table(parts[0], "groups")
    victim = groups["ref_image"].value_counts().index[-1]
    (tmp_path / "list").write_text(f"{victim}\n")
    result = lmr("merge", parts[0], "--remove", tmp_path / "list", "--out", tmp_path / "out", "--workers", 1)
    assert result.exit_code == 0, result.output
    assert verify_dataset(tmp_path / "out").problems == ()
    after = table(tmp_path / "out", "groups")
    assert victim not in {*after["target_image"], *after["ref_image"]}
    # The same as a rebuild from photos without it gives: the same tars, though no photo was read here.
    sources = ["--source", parts[0].parent / "a"]
    lmr("rebuild", parts[0], *sources, "--remove", tmp_path / "list", "--out", tmp_path / "rebuilt", "--workers", 1)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out" / "shards").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "rebuilt" / "shards").iterdir()
    }
    # It stays out when that dataset is merged with one that has it.
    run(parts[0].parent / "a", tmp_path / "other", groups_per_photo=1, seed=9)
    assert lmr("merge", tmp_path / "out", tmp_path / "other", "--out", tmp_path / "both").exit_code == 0
    both = table(tmp_path / "both", "groups")
    assert victim not in {*both["target_image"], *both["ref_image"]}
    assert verify_dataset(tmp_path / "both").problems == ()
    images = table(tmp_path / "both", "images").set_index("image_id")
    assert images.loc[victim, "status"] == "rejected"


def test_a_stopped_merge_goes_on(parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lmr_tools.assembly.draw_previews", stop)
        assert lmr("merge", *parts, "--out", tmp_path / "out", "--workers", 1).exit_code == 130
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert "lmr merge has not finished; run the same command again" in lmr("verify", tmp_path / "out").output
    assert "unfinished dataset of another command" in lmr("merge", *parts[::-1], "--out", tmp_path / "out").output
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    assert lmr("merge", *parts, "--out", tmp_path / "out", "--workers", 1).exit_code == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    lmr("merge", *parts, "--out", tmp_path / "fresh", "--workers", 2)
    assert bytes_of(tmp_path / "fresh") == bytes_of(tmp_path / "out")


def test_a_merge_that_could_not_even_begin_goes_on(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("lmr_tools.assembly.write_json", full)
        assert "the disk is full" in lmr("merge", *parts, "--out", tmp_path / "out").output
    assert (tmp_path / "out" / ".lmr-dataset").exists()
    assert lmr("merge", *parts, "--out", tmp_path / "out", "--workers", 1).exit_code == 0


def test_what_can_not_be_merged_is_told(parts: tuple[Path, Path], tmp_path: Path) -> None:
    assert lmr("merge", parts[0], "--out", tmp_path / "x").exit_code == 2
    write_photos(tmp_path / "photos", places=2, views=4)
    run(tmp_path / "photos", tmp_path / "small", size=80)
    assert (
        "only datasets with one crop size" in lmr("merge", parts[0], tmp_path / "small", "--out", tmp_path / "y").output
    )
    damaged = tmp_path / "damaged"
    shutil.copytree(parts[1], damaged)
    tar = next((damaged / "shards").glob("*.tar"))
    data = bytearray(tar.read_bytes())
    data[2000] ^= 1
    tar.write_bytes(bytes(data))
    result = lmr("merge", parts[0], damaged, "--out", tmp_path / "z", "--workers", 1)
    assert result.exit_code == 1
    assert tar.name in result.output
    tar.unlink()
    assert "no such shard" in lmr("merge", parts[0], damaged, "--out", tmp_path / "w", "--workers", 1).output


def test_places_that_are_one_settle_on_the_most_held_out_split() -> None:
    """Against a search through all paths: random scenes, splits and photos."""
    random = np.random.default_rng(5)
    for _ in range(50):
        claims = [
            Claim(
                scene=f"s{scene}",
                split=list(Split)[scene % 3],
                photos=tuple(f"f{p}" for p in random.choice(30, 3, replace=False)),
            )
            for scene in random.integers(0, 12, 14)
        ]
        links = [(f"s{a}", f"s{b}") for a, b in random.integers(0, 14, (2, 2))]
        near = defaultdict(set)
        for x in claims:
            for y in claims:
                if set(x.photos) & set(y.photos) or (x.scene, y.scene) in links or (y.scene, x.scene) in links:
                    near[x.scene].add(y.scene)
        place, reasons = settle(claims, links)
        order = ["train", "val", "test"]
        for claim, reason in zip(claims, reasons, strict=True):
            reached, waiting = {claim.scene}, [claim.scene]
            while waiting:
                fresh = near[waiting.pop()] - reached
                reached |= fresh
                waiting += fresh
            highest = max(order.index(c.split) for c in claims if c.scene in reached)
            assert (reason is None) == (order.index(claim.split) == highest)
            assert {place[scene] for scene in reached} == {next(c.scene for c in claims if c.scene in reached)}
            assert all(place[c.scene] != place[claim.scene] for c in claims if c.scene not in reached)


def test_sources_added_later_cost_only_what_is_new(parts: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = parts[0].parent / "a", parts[0].parent / "b"
    out = tmp_path / "out"
    run((first,), out)
    stamps = {path: path.stat().st_mtime_ns for path in (out / "work").rglob("*.sift")}
    assert len(stamps) == 20
    run((first, second), out)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    run((first, second), tmp_path / "fresh")
    assert bytes_of(out) == bytes_of(tmp_path / "fresh")
    images = table(out, "images")
    assert images["source"].value_counts().to_dict() == {0: 20, 1: 20}
