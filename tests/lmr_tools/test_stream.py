"""Streaming by byte ranges: what is read is what whole tars hold, and damage is named before or when it is met."""

import dataclasses
import hashlib
import json
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from lmr_tools.schema import Group, LmrError, SampleRow, ShardRow
from lmr_tools.shards import read_shard
from lmr_tools.stream import open_samples
from lmr_tools.tables import read_rows, write_rows
from tests.lmr_tools.painted_dataset import paint_dataset, write_manifest

SHARD = "train-000001.tar"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_dataset(tmp_path_factory.mktemp("sound") / "dataset")


@pytest.fixture
def dataset(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "dataset")


@pytest.fixture
def url() -> Iterator[str]:
    yield "memory://stream-test/dataset"
    MemoryFileSystem.store.clear()


def upload(dataset: Path, url: str) -> str:
    files, base = fsspec.core.url_to_fs(url)
    for path in dataset.rglob("*"):
        if path.is_file():
            files.pipe_file(f"{base}/{path.relative_to(dataset).as_posix()}", path.read_bytes())
    return url


def same(a: Group, b: Group) -> bool:
    plain = [
        dataclasses.replace(g, target=0, references=tuple(dataclasses.replace(r, pixels=0) for r in g.references))
        for g in (a, b)
    ]
    pixels = zip((a.target, *(r.pixels for r in a.references)), (b.target, *(r.pixels for r in b.references)))
    return plain[0] == plain[1] and all(np.array_equal(x, y) for x, y in pixels)


@pytest.mark.parametrize("remote", [False, True])
def test_any_order_gives_what_the_whole_tars_hold(sound: Path, url: str, remote: bool) -> None:
    store = open_samples(upload(sound, url) if remote else sound, "train")
    groups = [g for name in store.shards for g in read_shard(sound / "shards" / name)]
    assert len(store) == len(groups) == 11 and len(store.shards) == 3
    order = [int(n) for n in np.random.default_rng(0).permutation(11)] + [3, 3]
    read = store.read(order)
    assert [sample.group_id for sample in read] == [groups[number].group_id for number in order]
    assert all(same(sample.group(), groups[number]) for sample, number in zip(read, order, strict=True))
    assert [store.group_id(number) for number in range(11)] == [group.group_id for group in groups]
    by_scene = [[g.scene for g, s in zip(groups, store.scenes, strict=True) if s == code] for code in set(store.scenes)]
    assert all(len(set(names)) == 1 for names in by_scene) and len(by_scene) == 6
    assert [s.group_id for s in open_samples(sound, "val").read([0, 3])] == ["g11", "g14"]


def test_only_the_named_members_are_decoded(sound: Path) -> None:
    sample = open_samples(sound, "train").read([2])[0]
    group = sample.group(decode={"ref1.png"})
    assert sample.references == 5
    assert np.array_equal(group.references[1].pixels, sample.group().references[1].pixels)
    assert not group.target.any() and not group.references[0].pixels.any()


def test_ranges_are_those_tarfile_finds(sound: Path) -> None:
    rows = read_rows(sound / "tables" / "samples.parquet", SampleRow)
    for shard in {row.shard for row in rows}:
        with tarfile.open(sound / "shards" / shard, "r:") as tar:
            members = tar.getmembers()
        data = (sound / "shards" / shard).read_bytes()
        for row in (row for row in rows if row.shard == shard):
            own = [m for m in members if m.name.split(".")[0] == row.group_id]
            last = own[-1].offset_data + -(-own[-1].size // 512) * 512
            assert (row.offset, row.offset + row.bytes) == (own[0].offset, last) and len(own) == 7
            assert row.sha256 == hashlib.sha256(data[row.offset : row.offset + row.bytes]).hexdigest()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 1024 * 512])


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (Path.unlink, rf"/shards/{SHARD}: missing; "),
        (cut, rf"/shards/{SHARD}: \d+ bytes, the shards table says \d+; it is cut short"),
    ],
)
def test_a_missing_or_cut_shard_is_named_at_once(
    dataset: Path, url: str, remote: bool, damage: Callable[[Path], None], text: str
) -> None:
    damage(dataset / "shards" / SHARD)
    place = upload(dataset, url) if remote else dataset
    with pytest.raises(LmrError, match=text) as caught:
        open_samples(place, "train", pause=0)
    assert "\n" not in str(caught.value) and "more" not in str(caught.value)
    assert len(open_samples(place, "val")) == 4  # another split is not touched
    for path in (dataset / "shards").glob("train*"):
        path.unlink()
    with pytest.raises(LmrError, match=r"train-000000.tar: missing; .* \(2 more of 3 shards as well\)"):
        open_samples(dataset, "train", pause=0)


@pytest.mark.parametrize("remote", [False, True])
def test_an_altered_shard_is_named_with_the_sample(dataset: Path, url: str, remote: bool) -> None:
    path = dataset / "shards" / SHARD
    row = next(r for r in read_rows(dataset / "tables" / "samples.parquet", SampleRow) if r.group_id == "g06")
    data = bytearray(path.read_bytes())
    data[row.offset + row.bytes - 1] ^= 1  # the last byte of the range, padding: no decoder would notice
    path.write_bytes(data)
    store = open_samples(upload(dataset, url) if remote else dataset, "train", pause=0)
    number = [store.group_id(n) for n in range(len(store))].index("g06")
    assert [s.group_id for s in store.read([number - 1, number + 1])] == ["g05", "g07"]
    with pytest.raises(LmrError, match=rf"/shards/{SHARD}: sample g06: its sha256 is not that of the samples table"):
        store.read([number - 1, number])
    cut(path)  # after the dataset was opened
    store = open_samples(dataset, "val")
    path = dataset / "shards" / "val-000000.tar"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(LmrError, match=r"/shards/val-000000.tar: sample g14: 0 of its \d+ bytes are there; .*cut"):
        dataclasses.replace(store, files=dataclasses.replace(store.files, pause=0)).read([3])
    path.unlink()
    with pytest.raises(LmrError, match=r"/shards/val-000000.tar: sample g14: missing"):
        store.read([3])


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[Any]], list[int]]:
    """Makes a method of MemoryFileSystem do the given things first; returns a list that grows with each call."""

    def fail(method: str, first: list[Any]) -> list[int]:
        calls: list[int] = []
        true = getattr(MemoryFileSystem, method)

        def call(self: MemoryFileSystem, *values: Any, **options: Any) -> Any:
            calls.append(1)
            act = first.pop(0) if first else None
            if isinstance(act, Exception):
                raise act
            found = true(self, *values, **options)
            return act(found) if act else found

        monkeypatch.setattr(MemoryFileSystem, method, call)
        return calls

    return fail


def test_passing_errors_are_tried_again(sound: Path, url: str, failing: Callable[..., list[int]]) -> None:
    upload(sound, url)
    calls = failing("cat_file", [ConnectionError("reset"), TimeoutError("slow")])
    store = open_samples(url, "train", tries=3, pause=0)
    assert len(calls) == 2 + 3  # manifest and two tables
    calls = failing("cat_ranges", [ConnectionError("reset"), lambda found: [data[:-1] for data in found]])
    assert [s.group_id for s in store.read([4, 0])] == ["g04", "g00"]
    assert len(calls) == 3


def test_a_stuck_read_is_left_behind_and_made_again(sound: Path, url: str, failing: Callable[..., list[int]]) -> None:
    store = open_samples(upload(sound, url), "train", tries=3, pause=0)
    # On a busy machine a call that is not stuck may take longer than so short a limit, too.
    patient = dataclasses.replace(store, files=dataclasses.replace(store.files, limit=0.2, tries=100))
    store = dataclasses.replace(store, files=dataclasses.replace(store.files, limit=0.2))
    go_on = threading.Event()
    calls = failing("cat_ranges", [lambda found: go_on.wait() and found])
    try:
        assert [s.group_id for s in patient.read([0])] == ["g00"]
        assert len(calls) >= 2
        failing("cat_ranges", [lambda found: go_on.wait() and found] * 3)
        with pytest.raises(LmrError, match=r"sample g00: can not be read \(TimeoutError: no answer in 0.2 s\)"):
            store.read([0])
    finally:
        go_on.set()


def test_credentials_of_a_url_are_not_told(sound: Path, failing: Callable[..., list[int]]) -> None:
    upload(sound, "memory://user:secret@host/dataset")
    store = open_samples("memory://user:secret@host/dataset", "train", pause=0)
    assert store.root == "memory://host/dataset" and len(store.read([0])) == 1
    failing("cat_ranges", [PermissionError("403 for https://user:secret@host/x?X-Amz-Signature=secret")])
    with pytest.raises(LmrError, match="memory://host/dataset/shards") as caught:
        store.read([0])
    assert "secret" not in str(caught.value)
    with pytest.raises(LmrError, match="memory://host/nothing: not a dataset"):
        open_samples("memory://user:secret@host/nothing", "train", pause=0)
    with pytest.raises(LmrError) as caught:
        open_samples("nosuch://user:secret@host/nothing", "train", pause=0)
    assert "secret" not in str(caught.value)
    MemoryFileSystem.store.clear()


def test_a_server_without_ranges_is_named(sound: Path, url: str, failing: Callable[..., list[int]]) -> None:
    store = open_samples(upload(sound, url), "train", tries=2, pause=0)
    failing("cat_ranges", [lambda found: [data + b"and the rest" for data in found]] * 2)
    with pytest.raises(LmrError, match=r"sample g03: more than the range .* does not serve byte ranges"):
        store.read([3])


def test_a_range_that_comes_again_is_only_the_failed_one(
    sound: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_samples(upload(sound, url), "train", pause=0)
    asked: list[list[str]] = []
    true = MemoryFileSystem.cat_ranges

    def call(self: MemoryFileSystem, paths: list[str], starts: Any, ends: Any, **options: Any) -> list[Any]:
        asked.append(list(paths))
        found = true(self, paths, starts, ends, **options)
        return [OSError("once") if len(asked) == 1 and place == 1 else data for place, data in enumerate(found)]

    monkeypatch.setattr(MemoryFileSystem, "cat_ranges", call)
    assert [s.group_id for s in store.read([0, 5, 9])] == ["g00", "g05", "g09"]
    assert [len(paths) for paths in asked] == [3, 1] and asked[1] == asked[0][1:2]


def test_lasting_errors_end_after_the_tries_and_name_the_file(
    sound: Path, url: str, failing: Callable[..., list[int]]
) -> None:
    upload(sound, url)
    store = open_samples(url, "train", tries=3, pause=0)
    calls = failing("cat_ranges", [ConnectionError("reset")] * 9)
    with pytest.raises(LmrError, match=r"train-000000.tar: sample g00: can not be read \(ConnectionError: reset\)"):
        store.read([0])
    assert len(calls) == 3
    calls = failing("cat_file", [PermissionError("denied")] * 9)
    with pytest.raises(LmrError, match=r"dataset.json: can not be read \(PermissionError: denied\)"):
        open_samples(url, "train", pause=0)
    assert len(calls) == 1
    failing("cat_file", [ConnectionError("refused")] * 9)
    with pytest.raises(LmrError, match=r"ConnectionError: refused\); check address, access and connection$"):
        open_samples(url, "train", tries=2, pause=0)


def edit_manifest(**values: Any) -> Callable[[Path], None]:
    def change(dataset: Path) -> None:
        path = dataset / "dataset.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def edit_table(name: str, row_type: type, **values: Any) -> Callable[[Path], None]:
    def change(dataset: Path) -> None:
        path = dataset / "tables" / f"{name}.parquet"
        rows = read_rows(path, row_type)
        write_rows(path, [dataclasses.replace(rows[0], **values), *rows[1:]], row_type)
        write_manifest(dataset)

    return change


def unfinished(dataset: Path) -> None:
    (dataset / "dataset.json").rename(dataset / ".lmr-dataset")


def changed_table(dataset: Path) -> None:
    path = dataset / "tables" / "samples.parquet"
    write_rows(path, read_rows(path, SampleRow)[1:], SampleRow)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (shutil.rmtree, r"dataset: not a dataset of lmr-tools \(no dataset.json there\)"),
        (unfinished, "has not finished; run the command that was making it again"),
        (edit_manifest(format="other"), "dataset.json: not the manifest of an lmr-tools dataset"),
        (edit_manifest(version=7), "dataset.json: version 7; this program reads 1"),
        (edit_manifest(tables={}), "no table shards, an older version built it"),
        (edit_manifest(tables=3), "no table shards, an older version built it"),
        (edit_manifest(recipe=3), "its recipe has no size"),
        (lambda d: (d / "dataset.json").write_text("{"), "dataset.json: not a readable JSON file"),
        (lambda d: (d / "tables/samples.parquet").unlink(), r"tables/samples.parquet: missing"),
        (changed_table, "tables/samples.parquet: its sha256 is not that of dataset.json"),
        (edit_table("samples", SampleRow, offset=10**9), 'impossible row {"group_id": "g00"'),
        (edit_table("samples", SampleRow, offset=-512), "impossible row"),
        (edit_table("samples", SampleRow, shard="val-000000.tar"), "impossible row"),
        (edit_table("samples", SampleRow, group_id="a/b"), "impossible row"),
        (edit_table("samples", SampleRow, sha256="x"), "impossible row"),
        (edit_table("shards", ShardRow, shard="../../etc/x.tar"), "'../../etc/x.tar' is no name of a shard"),
    ],
)
def test_what_is_no_sound_dataset_is_one_clear_line(dataset: Path, change: Callable[[Path], Any], text: str) -> None:
    change(dataset)
    with pytest.raises(LmrError, match=text) as caught:
        open_samples(dataset, "train", pause=0)
    assert "\n" not in str(caught.value) and str(dataset) in str(caught.value)


def test_splits_and_urls_that_are_not_there(dataset: Path, url: str) -> None:
    for split in ("test", "dev"):
        with pytest.raises(LmrError, match=f"split {split} has no groups; there are groups in: train, val"):
            open_samples(dataset, split)
    with pytest.raises(LmrError, match="not a dataset of lmr-tools"):
        open_samples(url)
    with pytest.raises(LmrError, match="nosuch://x: "):
        open_samples("nosuch://x")
    (dataset / "file").touch()
    with pytest.raises(LmrError, match="not a dataset"):
        open_samples(dataset / "file")


def test_a_wrong_range_with_a_right_hash_is_refused(dataset: Path) -> None:
    rows = read_rows(dataset / "tables" / "samples.parquet", SampleRow)
    data = (dataset / "shards" / rows[0].shard).read_bytes()
    for size in (rows[0].bytes + rows[1].bytes, rows[0].bytes - 512, 512):  # two samples, a cut one, a header
        sha256 = hashlib.sha256(data[:size]).hexdigest()
        edit_table("samples", SampleRow, offset=0, bytes=size, sha256=sha256)(dataset)
        with pytest.raises(LmrError, match=rf"{rows[0].shard}: sample g00: "):
            open_samples(dataset, "train", pause=0).read([0])[0].group()
