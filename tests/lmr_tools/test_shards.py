"""Shards: what is written is read, by the strict reader and by plain webdataset; damage of every kind is named."""

import dataclasses
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmr_tools.schema import Group, LmrError, Reference, ShardRow, Split, Tier
from lmr_tools.shards import BLOCK, MAX_JSON_BYTES, read_shard, write_shard


def make_group(number: int, references: int = 5) -> Group:
    random = np.random.default_rng(number)

    def crop() -> np.ndarray:
        return random.integers(0, 256, (16, 20, 3), dtype=np.uint8)

    return Group(
        group_id=f"group_{number:03d}",
        scene="scene-é",
        split=Split.VAL,
        target=crop(),
        target_image="t",
        target_path="photos/a b/ü.jpg",
        target_x=3,
        target_y=4,
        references=tuple(
            Reference(
                pixels=crop(),
                image_id=f"r{place}",
                path=f"r{place}.jpg",
                slot=f"L{place + 1}",
                tier=list(Tier)[place % 3],
                overlap=1 / 3,
                scale_ratio=0.9,
                clip_score=None if place == 1 else 0.1 + 0.2,
                x=place,
                y=0,
            )
            for place in range(references)
        ),
    )


def same(a: Group, b: Group) -> bool:
    """Equal in every field, pixels included."""
    plain = [
        dataclasses.replace(g, target=0, references=tuple(dataclasses.replace(r, pixels=0) for r in g.references))
        for g in (a, b)
    ]
    pixels = zip((a.target, *(r.pixels for r in a.references)), (b.target, *(r.pixels for r in b.references)))
    return plain[0] == plain[1] and all(np.array_equal(x, y) for x, y in pixels)


@pytest.fixture
def shard(tmp_path: Path) -> tuple[Path, ShardRow]:
    path = tmp_path / "val-000000.tar"
    return path, write_shard(path, (make_group(n) for n in range(4))).row


def test_round_trip_and_bytes(tmp_path: Path, shard: tuple[Path, ShardRow]) -> None:
    path, row = shard
    groups = [make_group(n) for n in range(4)]
    assert row.samples == 4 and row.bytes == path.stat().st_size
    read = list(read_shard(path, row))
    assert len(read) == 4 and all(same(a, b) for a, b in zip(groups, read, strict=True))
    assert read[0].target.flags.writeable  # torch refuses read-only arrays with a warning
    with path.open("rb") as file:
        assert [g.group_id for g in read_shard(file, row)] == [g.group_id for g in groups]
    assert write_shard(tmp_path / "again.tar", groups).row.sha256 == row.sha256
    assert [g.group_id for g in read_shard(path, row, only={"group_002"})] == ["group_002"]


def test_tar_members_are_fixed(shard: tuple[Path, ShardRow]) -> None:
    with tarfile.open(shard[0], "r:") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.mode, m.uname, m.gname) for m in members} == {(0, 0, 0, 0o444, "lmr", "lmr")}
    assert not any(m.pax_headers for m in members)
    ends = ["json", *(f"ref{n}.png" for n in range(5)), "target.png"]
    assert [m.name for m in members] == [f"group_{n:03d}.{end}" for n in range(4) for end in ends]


# webdataset leaves closing its file to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_plain_webdataset_reads_it(shard: tuple[Path, ShardRow]) -> None:
    import webdataset  # imports torch: seconds that the other tests need not spend

    dataset = webdataset.WebDataset(str(shard[0]), shardshuffle=False).decode("pil")
    samples = list(dataset)
    assert [sample["__key__"] for sample in samples] == [f"group_{n:03d}" for n in range(4)]
    for number, sample in enumerate(samples):
        group = make_group(number)
        assert np.array_equal(np.asarray(sample["target.png"]), group.target)
        assert np.array_equal(np.asarray(sample["ref4.png"]), group.references[4].pixels)
        assert sample["json"]["references"][2]["tier"] == "L"
        assert sample["json"]["target"] == {
            "image_id": "t", "path": "photos/a b/ü.jpg", "x": 3, "y": 4, "width": 20, "height": 16,
        }  # fmt: skip


@pytest.mark.parametrize("group_id", ["a.b", "", "a/b", "..", "a b", "é", "x" * 81, "a\n"])
def test_unusable_group_ids_are_refused(tmp_path: Path, group_id: str) -> None:
    with pytest.raises(LmrError, match="can not be a shard key"):
        write_shard(tmp_path / "s.tar", [dataclasses.replace(make_group(0), group_id=group_id)])
    assert not list(tmp_path.iterdir())


def test_repeated_id_and_empty_shard_are_refused(tmp_path: Path) -> None:
    with pytest.raises(LmrError, match="group_001 comes twice"):
        write_shard(tmp_path / "s.tar", [make_group(1), make_group(1)])
    with pytest.raises(LmrError, match="no groups"):
        write_shard(tmp_path / "s.tar", [])
    with pytest.raises(ValueError, match="JSON compliant"):
        bad = make_group(1, 1)
        odd = dataclasses.replace(bad.references[0], overlap=float("nan"))
        write_shard(tmp_path / "s.tar", [dataclasses.replace(bad, references=(odd,))])
    assert not list(tmp_path.iterdir())


@given(st.floats(0, 1, exclude_max=True))
def test_every_cut_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: float) -> None:
    folder = tmp_path_factory.getbasetemp() / "cuts"
    path = folder / "whole.tar"
    if not path.exists():
        write_shard(path, [make_group(n, 1) for n in range(2)])
    whole = path.read_bytes()
    samples = [make_group(0, 1), make_group(1, 1)]
    at = int(place * len(whole))
    (folder / "cut.tar").write_bytes(whole[:at])
    row = ShardRow(shard="s", split="val", samples=2, bytes=len(whole), sha256="?")
    with pytest.raises(LmrError, match=r"cut\.tar: .*cut short"):
        list(read_shard(folder / "cut.tar", row))
    # Without any expectation a cut inside the samples is still an error; inside the closing zeros nothing is lost.
    try:
        read = list(read_shard(folder / "cut.tar"))
    except LmrError as error:
        assert "cut" in str(error)
    else:
        assert all(same(a, b) for a, b in zip(samples, read, strict=True))


def test_cut_on_a_block_boundary_that_tarfile_misses(tmp_path: Path, shard: tuple[Path, ShardRow]) -> None:
    with tarfile.open(shard[0], "r:") as tar:
        at = next(m.offset for m in tar if m.name.startswith("group_002"))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(shard[0].read_bytes()[:at])
    with tarfile.open(cut, "r:") as tar:
        assert len(tar.getnames()) == 14  # two samples, and no complaint: what this reader must not do
    for expected in (shard[1], None):
        with pytest.raises(LmrError, match="cut short"):
            list(read_shard(cut, expected))
    with cut.open("rb") as file, pytest.raises(LmrError, match="without a tar end mark"):
        list(read_shard(io.BytesIO(file.read()), shard[1]))
    # The same cut, closed properly: only the expected numbers can tell.
    cut.write_bytes(shard[0].read_bytes()[:at] + bytes(10240))
    assert len(list(read_shard(cut))) == 2
    with cut.open("rb") as file, pytest.raises(LmrError, match="samples 2, the shards table says 4"):
        list(read_shard(file, shard[1]))


@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(1, 255))
def test_every_flipped_byte_is_noticed(tmp_path_factory: pytest.TempPathFactory, place: float, value: int) -> None:
    path = tmp_path_factory.getbasetemp() / "flips" / "whole.tar"
    if not path.exists():
        write_shard(path, [make_group(0, 1)])
    whole = path.read_bytes()
    row = ShardRow(shard="s", split="val", samples=1, bytes=len(whole), sha256="")
    with path.open("rb") as file, pytest.raises(LmrError, match="sha256"):
        list(read_shard(file, row))
    row = dataclasses.replace(row, sha256=hashlib.sha256(whole).hexdigest())
    damaged = bytearray(whole)
    damaged[int(place * len(whole))] ^= value
    with pytest.raises(LmrError, match=r"^s: "):
        list(read_shard(io.BytesIO(bytes(damaged)), row))


def tar_of(members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.type = kind
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    buffer.seek(0)
    return buffer


def members_of(path: Path) -> dict[str, bytes]:
    with tarfile.open(path, "r:") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "kind", "match"),
    [
        ("../../etc/passwd.json", tarfile.REGTYPE, "unexpected member"),
        ("/g.json", tarfile.REGTYPE, "unexpected member"),
        ("g.pyd", tarfile.REGTYPE, "unexpected member"),
        ("g.pickle", tarfile.REGTYPE, "unexpected member"),
        ("g.ref007.png", tarfile.REGTYPE, "unexpected member"),
        ("g.target.png", tarfile.SYMTYPE, "not a plain file"),
        ("g.json", tarfile.LNKTYPE, "not a plain file"),
        ("g" * 120 + ".json", tarfile.REGTYPE, "not a plain file"),
    ],
)
def test_hostile_members_are_refused(name: str, kind: bytes, match: str) -> None:
    with pytest.raises(LmrError, match=match):
        list(read_shard(tar_of([(name, b"")], kind)))


def test_sizes_are_capped_before_reading() -> None:
    info = tarfile.TarInfo("g.json")
    info.size = MAX_JSON_BYTES + 1
    with pytest.raises(LmrError, match="the limit is"):
        list(read_shard(io.BytesIO(info.tobuf() + bytes(BLOCK))))


def test_compressed_tar_is_refused(tmp_path: Path, shard: tuple[Path, ShardRow]) -> None:
    packed = tmp_path / "s.tar.gz"
    packed.write_bytes(gzip.compress(shard[0].read_bytes()))
    with pytest.raises(LmrError, match="not a plain tar"):
        list(read_shard(packed))
    with pytest.raises(LmrError, match="can not be read"):
        list(read_shard(tmp_path / "absent.tar"))
    with pytest.raises(LmrError, match="can not be read"):
        list(read_shard(tmp_path))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"group_id": "other"}, "names group 'other'"),
        ({"split": "dev"}, "'dev' where one of train, val, test"),
        ({"scene": 3}, "no proper 'scene'"),
        ({"version": 2}, "version 1"),
        ({"target": []}, "no proper 'target'"),
        ({"references": []}, "0 references"),
        ({"references": [3] * 5}, "not an object"),
    ],
)
def test_json_that_does_not_fit_is_refused(shard: tuple[Path, ShardRow], change: dict, match: str) -> None:
    members = {n: d for n, d in members_of(shard[0]).items() if n.startswith("group_000")}
    meta = json.loads(members["group_000.json"]) | change
    members["group_000.json"] = json.dumps(meta).encode()
    with pytest.raises(LmrError, match=match) as caught:
        list(read_shard(tar_of(list(members.items()))))
    assert "\n" not in str(caught.value) and "group_000" in str(caught.value)


@pytest.mark.parametrize(
    ("member", "data", "match"),
    [
        ("group_000.json", b"{", "can not be parsed"),
        ("group_000.json", b"[" * 5000, "can not be parsed"),
        ("group_000.json", b"[]", "format lmr-group"),
        ("group_000.target.png", b"\xff\xd8\xff" + bytes(100), "not a PNG"),
        ("group_000.ref1.png", None, "missing or too much"),
    ],
)
def test_members_that_do_not_fit_are_refused(
    shard: tuple[Path, ShardRow], member: str, data: bytes | None, match: str
) -> None:
    members = {n: d for n, d in members_of(shard[0]).items() if n.startswith("group_000")}
    if data is None:
        del members[member]
    else:
        members[member] = data
    with pytest.raises(LmrError, match=match):
        list(read_shard(tar_of(list(members.items()))))


def test_a_bomb_is_refused_by_its_header(shard: tuple[Path, ShardRow]) -> None:
    members = {n: d for n, d in members_of(shard[0]).items() if n.startswith("group_000")}
    png = bytearray(members["group_000.target.png"])
    png[16:24] = (60000).to_bytes(4) * 2
    members["group_000.target.png"] = bytes(png)
    with pytest.raises(LmrError, match="60000x60000"):
        list(read_shard(tar_of(list(members.items()))))
    meta = json.loads(members["group_000.json"])
    meta["target"] |= {"width": 60000, "height": 60000}
    members["group_000.json"] = json.dumps(meta).encode()
    with pytest.raises(LmrError, match="sane size"):
        list(read_shard(tar_of(list(members.items()))))


def test_a_sample_in_two_places_is_refused(shard: tuple[Path, ShardRow]) -> None:
    members = list(members_of(shard[0]).items())
    with pytest.raises(LmrError, match="group_000 comes twice"):
        list(read_shard(tar_of([*members, members[0]])))
    with pytest.raises(LmrError, match=r"group_000\.json comes twice"):
        list(read_shard(tar_of([members[0], members[0]])))
    with pytest.raises(LmrError, match="after the end"):
        list(read_shard(io.BytesIO(shard[0].read_bytes() + b"x")))
