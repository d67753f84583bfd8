"""Rebuilding: every byte again from tables and photos, wherever those have gone; what is lost or removed is told."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner, Result

from lmr_tools.dataset import read_manifest
from lmr_tools.images import decode, encode_png
from lmr_tools.shards import read_shard
from lmr_tools.tables import sha256_file, write_json
from lmr_tools.verify import verify_dataset
from pipelines.cli import cli

from .small_build import bytes_of, run, write_photos


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder, places=4, views=5)
    return folder


@pytest.fixture(scope="module")
def built(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "dataset"
    run(photos, out, allow_partial=False, high=1, medium=1, low=1)
    return out


def published(built: Path, folder: Path) -> Path:
    """Manifest and tables alone."""
    folder.mkdir()
    shutil.copy(built / "dataset.json", folder)
    shutil.copytree(built / "tables", folder / "tables")
    return folder


def table(out: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(out / "tables" / f"{name}.parquet")


def lmr(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def rebuild(dataset: Path, source: Path, out: Path, *more: object) -> Result:
    return lmr("rebuild", dataset, "--source", source, "--out", out, "--workers", 1, *more)


def samples_of(out: Path) -> dict[str, tuple[str, str]]:
    rows = table(out, "samples")
    return {row.group_id: (row.shard, row.sha256) for row in rows.itertuples()}


def test_every_byte_comes_back_from_tables_and_moved_photos(built: Path, photos: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved" / "deep"
    moved.mkdir(parents=True)
    for number, path in enumerate(sorted(photos.iterdir())):
        shutil.copy(path, moved / f"renamed {number}.png")
    tables = published(built, tmp_path / "published")
    result = rebuild(tables / "dataset.json", tmp_path / "moved", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert bytes_of(tmp_path / "out") == bytes_of(built)
    assert verify_dataset(tmp_path / "out").problems == ()


def test_a_stopped_rebuild_goes_on_without_hashing_or_cutting_again(
    built: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("lmr_tools.assembly.draw_previews", stop)
        assert rebuild(built, photos, tmp_path / "out").exit_code == 130
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr("lmr_tools.locate._hash", stop)
        assert rebuild(built, photos, tmp_path / "out").exit_code == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "shards").iterdir()}
    assert bytes_of(tmp_path / "out") == bytes_of(built)


def test_missing_and_changed_photos_are_named(built: Path, photos: Path, tmp_path: Path) -> None:
    source = tmp_path / "photos"
    shutil.copytree(photos, source)
    used = table(built, "images").query("status == 'used'")
    gone, changed = used["path"].iloc[0], used["path"].iloc[-1]
    (source / gone).unlink()
    (source / changed).write_bytes((source / changed).read_bytes() + b"more")
    result = rebuild(built, source, tmp_path / "out")
    assert result.exit_code == 1
    assert f"{gone}: missing" in result.output
    assert f"{changed}: changed" in result.output
    assert "2 photos that the groups need are not there" in result.output
    assert not (tmp_path / "out" / "dataset.json").exists()

    # The same command without the two goes on: other groups stay as they were, the tables say what is lost.
    result = rebuild(built, source, tmp_path / "out", "--drop-missing")
    assert result.exit_code == 3, result.output
    assert verify_dataset(tmp_path / "out").problems == ()
    lost = set(used["image_id"].iloc[[0, -1]])
    before, after = table(built, "groups"), table(tmp_path / "out", "groups")
    touched = before[before["target_image"].isin(lost) | before["ref_image"].isin(lost)]["group_id"]
    assert set(after["group_id"]) == set(before["group_id"]) - set(touched)
    assert 0 < len(set(touched)) < before["group_id"].nunique()
    old, new = samples_of(built), samples_of(tmp_path / "out")
    assert {name: sha256 for name, (_, sha256) in new.items()} == {name: old[name][1] for name in new}
    rejects = table(tmp_path / "out", "rejects").query("stage == 'rebuild'")
    assert dict(zip(rejects["path"], rejects["reason"], strict=True)) == {gone: "missing", changed: "changed"}
    assert read_manifest(tmp_path / "out")["rebuilt"]["missing_photos"] == 2


def test_removed_photos_leave_and_stay_out(built: Path, photos: Path, tmp_path: Path) -> None:
    groups, images = table(built, "groups"), table(built, "images").set_index("image_id")
    # A photo of one shard's groups: the other shards must not change.
    per_photo = groups.groupby("ref_image")["shard"].nunique().sort_values(kind="stable")
    victim = per_photo.index[0]
    listed = tmp_path / "remove.txt"
    listed.write_text(f"# on request\n\n{images.loc[victim, 'path']}\n{'0' * 64}\n", encoding="utf-8")
    without = tmp_path / "photos"
    shutil.copytree(photos, without)
    (without / images.loc[victim, "path"]).unlink()  # it need not be there any more
    result = rebuild(built, without, tmp_path / "out", "--remove", listed)
    assert result.exit_code == 0, result.output
    assert verify_dataset(tmp_path / "out").problems == ()
    after = table(tmp_path / "out", "groups")
    assert victim not in {*after["target_image"], *after["ref_image"]}
    touched = groups[(groups["target_image"] == victim) | (groups["ref_image"] == victim)]
    assert set(after["group_id"]) == set(groups["group_id"]) - set(touched["group_id"])
    for name in ("embeddings", "candidates", "pairs"):
        rows = table(tmp_path / "out", name)
        assert not rows[[c for c in rows.columns if c.endswith("image") or c == "image_id"]].isin([victim]).any().any()
    # Shards that did not hold it are the same files.
    old, new = (table(out, "shards").set_index("shard")["sha256"] for out in (built, tmp_path / "out"))
    untouched = set(groups["shard"]) - set(touched["shard"])
    assert {old[name] for name in untouched} <= set(new)
    entries = read_manifest(tmp_path / "out")["removed"]
    assert {entry["sha256"] for entry in entries} == {images.loc[victim, "sha256"], "0" * 64}

    # It stays out of a rebuild of the rebuilt dataset, without any list: equal bytes again.
    result = rebuild(tmp_path / "out", without, tmp_path / "again")
    assert result.exit_code == 0, result.output
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")


def test_a_partial_group_loses_only_the_reference(photos: Path, tmp_path: Path) -> None:
    built = tmp_path / "built"
    run(photos, built, allow_partial=True)
    groups = table(built, "groups")
    sizes = groups.groupby("group_id")["slot"].size()
    victim = groups[groups["group_id"] == sizes.idxmax()]["ref_image"].iloc[1]
    (tmp_path / "list").write_text(victim)
    assert rebuild(built, photos, tmp_path / "out", "--remove", tmp_path / "list").exit_code == 0
    after = table(tmp_path / "out", "groups")
    expected = groups[(groups["target_image"] != victim) & (groups["ref_image"] != victim)]
    columns = ["group_id", "slot", "ref_image", "ref_x", "tier", "overlap"]
    pd.testing.assert_frame_equal(
        after[columns].sort_values(columns[:2], ignore_index=True),
        expected[columns].sort_values(columns[:2], ignore_index=True),
    )
    assert verify_dataset(tmp_path / "out").problems == ()


def test_a_build_honours_the_list_and_remembers_it(photos: Path, tmp_path: Path) -> None:
    source, out = tmp_path / "photos", tmp_path / "out"
    shutil.copytree(photos, source)
    run(source, out)
    images = table(out, "images").set_index("image_id")
    victim = table(out, "groups")["ref_image"].value_counts().index[0]
    (tmp_path / "list").write_text(images.loc[victim, "path"])
    stamps = {path: path.stat().st_mtime_ns for path in (out / "work").rglob("*.sift")}
    run(source, out, remove=tmp_path / "list")
    groups = table(out, "groups")
    assert victim not in {*groups["target_image"], *groups["ref_image"]}
    assert len(groups)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps  # nothing is measured again
    assert verify_dataset(out).problems == ()
    # Later runs know the list: the photo comes back under another name, and a copy of it with other bytes.
    picture = decode((source / images.loc[victim, "path"]).read_bytes())
    (source / images.loc[victim, "path"]).rename(source / "new name.png")
    (source / "copy.png").write_bytes(encode_png(picture // 2 * 2))
    run(source, out)
    reasons = table(out, "rejects").query("stage == 'removal'").set_index("path")["reason"].to_dict()
    assert reasons == {"new name.png": "removed on request", "copy.png": "copy of a removed photo"}
    # Also after a kill that left no manifest.
    (out / "dataset.json").unlink()
    run(source, out)
    assert read_manifest(out)["removed"][0]["sha256"] == images.loc[victim, "sha256"]
    assert victim not in set(table(out, "groups")["ref_image"])
    # It equals a dataset built without the photo from the start, in everything the groups say.
    (source / "new name.png").unlink()
    (source / "copy.png").unlink()
    run(source, tmp_path / "fresh")
    pd.testing.assert_frame_equal(table(out, "groups"), table(tmp_path / "fresh", "groups"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("p0_0.png\nno-such-photo.jpg\n", "line 2: no photo has the id, path or sha256 'no-such-photo.jpg'"),
        ("../../etc/passwd\n", "line 1: no photo"),
        (b"\xff\xfe\x00", "not a readable removal list"),
    ],
)
def test_a_bad_list_changes_nothing(built: Path, photos: Path, tmp_path: Path, text: str | bytes, reason: str) -> None:
    (tmp_path / "list").write_bytes(text.encode() if isinstance(text, str) else text)
    result = rebuild(built, photos, tmp_path / "out", "--remove", tmp_path / "list")
    assert result.exit_code == 1
    assert reason in result.output
    assert not (tmp_path / "out").exists()


def test_altered_tables_are_refused(built: Path, photos: Path, tmp_path: Path) -> None:
    tables = published(built, tmp_path / "published")
    shutil.copy(tables / "tables" / "rejects.parquet", tables / "tables" / "groups.parquet")
    assert "is not the table that dataset.json names" in rebuild(tables, photos, tmp_path / "a").output
    (tables / "tables" / "groups.parquet").unlink()
    assert "groups.parquet: is missing" in rebuild(tables, photos, tmp_path / "b").output


def test_other_bytes_are_told_and_may_be_accepted(built: Path, photos: Path, tmp_path: Path) -> None:
    """As if another Pillow had packed the published shards: their hashes are others."""
    tables = published(built, tmp_path / "published")
    shards = table(tables, "shards")
    first = shards["shard"].iloc[0]
    shards.loc[0, "sha256"] = "0" * 64
    shards.to_parquet(tables / "tables" / "shards.parquet", index=False)
    manifest = json.loads((tables / "dataset.json").read_text())
    manifest["tables"]["shards"]["sha256"] = sha256_file(tables / "tables" / "shards.parquet")
    manifest["versions"]["pillow"] = "1.0"
    write_json(tables / "dataset.json", manifest)
    result = rebuild(tables, photos, tmp_path / "out")
    assert result.exit_code == 4
    assert first in result.output
    assert "pillow 1.0 then" in result.output
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert rebuild(tables, photos, tmp_path / "out", "--other-bytes").exit_code == 0
    assert verify_dataset(tmp_path / "out").problems == ()


def test_no_other_folder_is_overwritten(built: Path, photos: Path, tmp_path: Path) -> None:
    assert "holds a dataset already" in rebuild(built, photos, built).output
    unfinished = tmp_path / "unfinished"
    shutil.copytree(built, unfinished)
    (unfinished / "dataset.json").unlink()
    before = bytes_of(unfinished)
    assert "unfinished dataset of another command" in rebuild(built, photos, unfinished).output
    assert bytes_of(unfinished) == before
    rebuild(built, photos, tmp_path / "out")
    result = lmr("build-dataset", photos, "--out", tmp_path / "out")
    assert result.exit_code == 1
    assert "was made by lmr rebuild" in result.output
    assert {group.group_id for group in read_shard(next((tmp_path / "out" / "shards").glob("*.tar")))}
