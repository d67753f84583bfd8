"""The verifier must find every kind of damage: each test damages a sound dataset in one way and reads the report."""

import dataclasses
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lmr_tools.dataset import TABLES
from lmr_tools.schema import LmrError, ShardRow
from lmr_tools.tables import read_rows, sha256_file, write_json, write_rows, write_table
from lmr_tools.verify import verify_dataset
from tests.lmr_tools.dataset_fixture import make_dataset, refresh

SHARD = "train-000000.tar"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("sound"))


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "dataset")


def problems(dataset: Path, **options: Any) -> list[str]:
    found = verify_dataset(dataset, **options).problems
    assert all(line.isprintable() for line in found)
    return list(found)


def change_table(dataset: Path, name: str, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    """Rewrite a table and make dataset.json and the card agree: only cross-checks can notice."""
    path = dataset / "tables" / f"{name}.parquet"
    table = pq.read_table(path)
    write_table(path, pa.Table.from_pylist(change(table.to_pylist()), schema=table.schema))
    refresh(dataset)


def edit(index: int | Callable[[dict[str, Any]], bool], **values: Any) -> Callable[..., list[dict[str, Any]]]:
    """A change that sets columns of one row, or of those that fit."""

    def change(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            row | values if (index(row) if callable(index) else number == index) else row
            for number, row in enumerate(rows)
        ]

    return change


def change_shard(dataset: Path, change: Callable[[dict[str, bytes]], dict[str, bytes]], shard: str = SHARD) -> None:
    """Rewrite a tar and make its row in `shards` agree: only its content can give it away."""
    path = dataset / "shards" / shard
    with tarfile.open(path, "r:") as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    with tarfile.open(path, "w:") as tar:
        for name, data in change(members).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = read_rows(dataset / "tables" / "shards.parquet", ShardRow)
    size, sha256 = path.stat().st_size, sha256_file(path)
    rows = [dataclasses.replace(row, bytes=size, sha256=sha256) if row.shard == shard else row for row in rows]
    write_rows(dataset / "tables" / "shards.parquet", rows, ShardRow)
    refresh(dataset)


def test_a_sound_dataset_has_no_problem(sound: Path) -> None:
    report = verify_dataset(sound)
    assert report.problems == ()
    assert (report.shards, report.samples, report.pictures) == (4, 7, 42)
    assert report.rows["pairs"] == 180 and report.decoded
    assert report.bytes == sum(path.stat().st_size for path in (sound / "shards").iterdir())
    assert verify_dataset(sound, decode=False).problems == ()


@pytest.mark.parametrize(("place", "decode"), [(0.02, True), (0.5, True), (0.77, False), (0.999, False)])
def test_a_flipped_byte_in_a_shard(dataset: Path, place: float, decode: bool) -> None:
    path = dataset / "shards" / SHARD
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 0x10
    path.write_bytes(data)
    assert any(line.startswith(f"shards/{SHARD}: sha256 ") for line in problems(dataset, decode=decode))


@pytest.mark.parametrize("name", TABLES)
def test_a_flipped_byte_in_a_table(dataset: Path, name: str) -> None:
    path = dataset / "tables" / f"{name}.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)
    assert any(f"tables/{name}.parquet: " in line for line in problems(dataset))


def test_a_shard_cut_on_a_block_boundary(dataset: Path) -> None:
    path = dataset / "shards" / SHARD
    with tarfile.open(path, "r:") as tar:
        second = sorted({member.name.split(".")[0] for member in tar})[1]
        at = min(member.offset for member in tar if member.name.startswith(second))
    path.write_bytes(path.read_bytes()[:at])
    found = "\n".join(problems(dataset))
    assert f"shards/{SHARD}: ends after 1 samples without a tar end mark" in found
    assert f"shards/{SHARD}: sample {second}: in the groups table, but not in the tar" in found
    assert f"shards/{SHARD}: bytes {at}" in found


def test_a_missing_a_foreign_and_an_unreadable_shard(dataset: Path) -> None:
    (dataset / "shards" / SHARD).rename(dataset / "shards" / "train-000009.tar")
    (dataset / "shards" / "val-000000.tar").write_bytes(b"\x1f\x8b not a tar" * 100)
    found = "\n".join(problems(dataset))
    assert f"shards/{SHARD}: can not be read (No such file" in found
    assert "shards/train-000009.tar: not in the shards table" in found
    assert "shards/val-000000.tar: not a plain tar" in found


def drop_sample(members: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in members.items() if not name.startswith("g1-0.")}


def add_sample(members: dict[str, bytes]) -> dict[str, bytes]:
    copy = {n.replace("g1-0", "g9-9"): d.replace(b'"g1-0"', b'"g9-9"') for n, d in members.items() if "g1-0" in n}
    return members | copy


def swap_json(*names: str) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    """Exchange what the JSON says of the first two references of g1-0."""

    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        meta = json.loads(members["g1-0.json"])
        first, second = meta["references"][:2]
        for name in names:
            first[name], second[name] = second[name], first[name]
        return members | {"g1-0.json": json.dumps(meta).encode()}

    return change


def set_json(**values: Any) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        return members | {"g1-0.json": json.dumps(json.loads(members["g1-0.json"]) | values).encode()}

    return change


def shrink(members: dict[str, bytes]) -> dict[str, bytes]:
    """A smaller picture whose JSON says so too."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    meta = json.loads(members["g1-0.json"])
    meta["target"] |= {"width": 32, "height": 32}
    return members | {"g1-0.target.png": buffer.getvalue(), "g1-0.json": json.dumps(meta).encode()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (drop_sample, "sample g1-0: in the groups table, but not in the tar"),
        (drop_sample, "samples 1, the shards table says 2"),
        (add_sample, "sample g9-9: not in the groups table"),
        (add_sample, "samples 3, the shards table says 2"),
        (swap_json("tier"), 'sample g1-0: H\'s tier "M" in the tar, "H" in the tables'),
        (swap_json("slot"), 'sample g1-0: references ["M1", "H", "M2", "L1", "L2"] in the tar'),
        (swap_json("overlap"), "sample g1-0: M1's overlap "),
        (swap_json("image_id"), "sample g1-0: H's photo "),
        (swap_json("path"), "sample g1-0: H's path "),
        (swap_json("x", "y"), "sample g1-0: H's corner "),
        (set_json(split="test"), 'sample g1-0: split "test" in the tar, "train" in the tables'),
        (set_json(scene="elsewhere"), 'sample g1-0: scene "elsewhere" in the tar'),
        (set_json(references=[]), "sample g1-0: ref0.png is missing or too much"),
        (shrink, "sample g1-0: target's pixels [32, 32] in the tar, [64, 64] in the tables"),
        (lambda m: m | {"g1-0.ref2.png": m["g1-0.ref2.png"][:200]}, "sample g1-0: ref2.png does not decode"),
        (lambda m: m | {"g1-0.ref2.png": b"GIF89a" * 20}, "sample g1-0: ref2.png is not a PNG"),
        (lambda m: m | {"g1-0.evil.pyd": b""}, "unexpected member 'g1-0.evil.pyd'"),
    ],
)
def test_a_shard_that_says_something_else(dataset: Path, change: Callable[..., Any], expected: str) -> None:
    with tarfile.open(dataset / "shards" / SHARD) as tar:
        shard = SHARD if "g1-0.json" in tar.getnames() else "train-000001.tar"
    change_shard(dataset, change, shard)
    found = problems(dataset)
    assert any(line.startswith(f"shards/{shard}: {expected}") for line in found), found


@pytest.mark.parametrize(
    ("table", "change", "expected"),
    [
        ("images", lambda rows: rows[1:], "tables/groups.parquet: g0-0: s0v0 is not a photo of images"),
        ("pairs", lambda rows: rows[1:], "tables/groups.parquet: g0-0: slot M1: s0v0 s0v2 is not in pairs"),
        ("groups", lambda rows: rows[1:], f"shards/{SHARD}: sample g0-0: references "),
        ("groups", lambda rows: rows[5:], f"shards/{SHARD}: sample g0-0: not in the groups table"),
        ("groups", edit(0, tier="M"), f'shards/{SHARD}: sample g0-0: H\'s tier "H" in the tar, "M" in the tables'),
        (
            "groups",
            edit(0, ref_image="s4v1"),
            "tables/groups.parquet: photo s4v1 is in more than one split: test, train",
        ),
        ("shards", lambda rows: rows[1:], f"shards/{SHARD}: not in the shards table"),
        ("shards", edit(0, sha256="0" * 64), f"shards/{SHARD}: sha256 "),
        ("shards", edit(0, shard="../../x.tar"), "shards/../../x.tar: can not be read"),
        ("samples", lambda rows: rows[1:], f"shards/{SHARD}: sample g0-0: not in the samples table"),
        ("samples", edit(0, offset=512), f"shards/{SHARD}: sample g0-0: offset 0 in the tar, 512 in the tables"),
        ("samples", edit(0, bytes=512), f"shards/{SHARD}: sample g0-0: bytes "),
        ("samples", edit(0, sha256="0" * 64), f"shards/{SHARD}: sample g0-0: range's sha256 "),
        ("samples", edit(0, shard="train-000001.tar"), f"shards/{SHARD}: sample g0-0: not in the samples table"),
    ],
)
def test_tables_that_disagree(dataset: Path, table: str, change: Callable[..., Any], expected: str) -> None:
    change_table(dataset, table, change)
    found = problems(dataset)
    assert any(line.startswith(expected) for line in found), found


def test_an_edited_table_is_seen_by_its_hash_and_rows(dataset: Path) -> None:
    path = dataset / "tables" / "candidates.parquet"
    table = pq.read_table(path)
    write_table(path, table.slice(0, table.num_rows - 1))
    found = problems(dataset)
    assert "tables/candidates.parquet: 179 rows, dataset.json says 180" in found
    assert "tables/candidates.parquet: its sha256 is not that of dataset.json; the file was changed" in found


def test_columns_are_checked(dataset: Path) -> None:
    path = dataset / "tables" / "pairs.parquet"
    write_table(path, pq.read_table(path).drop_columns(["overlap"]))
    images = dataset / "tables" / "images.parquet"
    table = pq.read_table(images)
    place = table.column_names.index("width")
    write_table(images, table.set_column(place, "width", table.column("width").cast(pa.float64())))
    found = problems(dataset)
    assert "tables/pairs.parquet: column overlap is missing, not double" in found
    assert "tables/images.parquet: column width is double, not int64" in found


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"format": "other"}, "not the manifest"),
        ({"version": 2}, "version 2; this program reads 1"),
        ({"tables": {}}, "dataset.json: does not list the table pairs"),
        ({"tables": []}, "dataset.json: does not list the table pairs"),
        ({"counts": {"scenes": 4}}, "dataset.json: counts scenes 4, the tables hold 5"),
        (
            {"counts": {"photos": {"found": 1}}},
            'dataset.json: counts photos {"found": 1}, the tables hold {"found": 36',
        ),
        ({"counts": {"groups": {"train": 7}}}, 'dataset.json: counts groups {"train": 7}'),
        ({"embedder": {"dimension": 16}}, "tables/embeddings.parquet: column vector is fixed_size_list"),
        ({"recipe": {"size": 128}}, "tables/groups.parquet: g0-0: size 64, not 128"),
    ],
)
def test_a_manifest_that_does_not_fit(dataset: Path, change: dict[str, Any], expected: str) -> None:
    manifest = json.loads((dataset / "dataset.json").read_text())
    write_json(dataset / "dataset.json", manifest | change)
    found = problems(dataset)
    assert any(expected in line for line in found), found


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": "lmr-dataset", "version": 1, "recipe": 3}', "\xff"])
def test_a_broken_manifest_is_a_problem_not_a_crash(dataset: Path, text: str) -> None:
    (dataset / "dataset.json").write_text(text, encoding="latin-1")
    assert problems(dataset)


def test_missing_files_are_named(dataset: Path) -> None:
    for name in ("dataset.json", "README.md", "croissant.json", "tables/pairs.parquet"):
        (dataset / name).unlink()
    found = "\n".join(problems(dataset))
    for expected in (
        "no dataset.json",
        "README.md: missing",
        "croissant.json: no such",
        "tables/pairs.parquet: no such",
    ):
        assert expected in found
    with pytest.raises(LmrError, match="no such folder"):
        verify_dataset(dataset / "absent")


def test_croissant_must_name_the_tables(dataset: Path) -> None:
    description = json.loads((dataset / "croissant.json").read_text())
    description["distribution"][0]["sha256"] = "0" * 64
    write_json(dataset / "croissant.json", description)
    name = description["distribution"][0]["@id"]
    assert problems(dataset) == [f"croissant.json: its sha256 of {name} is not that of dataset.json"]
    write_json(dataset / "croissant.json", {"distribution": 3})
    assert problems(dataset) == ["croissant.json: no list of files (distribution)"]


def test_hostile_names_stay_on_one_line(dataset: Path) -> None:
    change_table(dataset, "images", edit(3, image_id="s1\n\x1b[31mv3", status="lo\nst"))
    found = problems(dataset)
    assert any(r"s1\n\x1b[31mv3: unknown status 'lo\nst'" in line for line in found), found
