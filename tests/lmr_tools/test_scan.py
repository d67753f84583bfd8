"""Sources of every kind are listed in one order, read again by address, and every bad file becomes a reject."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage

from lmr_tools import dedup
from lmr_tools.dataset import claim
from lmr_tools.images import encode_png
from lmr_tools.scan import Scan, perceptual_hash, quality, scan
from lmr_tools.schema import LmrError
from lmr_tools.sources import list_photos, parse_source, read_photo
from lmr_tools.workers import ProcessMapper


def quiet(items, total, label):
    return iter(items)


def photo(seed: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Noise over several scales: sharp and textured, like a photo."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3))
    for step in (4, 8, 32):
        rough = random.normal(0, 40, (height // step + 2, width // step + 2, 3))
        picture += np.kron(rough, np.ones((step, step, 1)))[:height, :width]
    return np.clip(picture + 128, 0, 255).astype(np.uint8)


def look(*given: Path | str, work: Path, rehash: bool = False, labelled: bool = False, workers: int = 1) -> Scan:
    with ProcessMapper(workers) as mapper:
        sources = [parse_source(str(text)) for text in given]
        return scan(sources, work, mapper, quiet, labelled=labelled, rehash=rehash)


def test_hostile_and_broken_files_become_rejects_and_everything_adds_up(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    good = encode_png(photo(0))
    jpeg = io.BytesIO()
    PilImage.fromarray(photo(1)).save(jpeg, "JPEG", quality=95)
    (photos / "good.png").write_bytes(good)
    (photos / "dotted.name.v2.png").write_bytes(encode_png(photo(2)))
    (photos / "Größe 日本.png").write_bytes(encode_png(photo(3)))
    (photos / "same name.png").mkdir()
    (photos / "same name.png" / "good.png").write_bytes(encode_png(photo(4)))
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "text.jpg").write_text("not a picture")
    (photos / "cut.jpg").write_bytes(jpeg.getvalue()[: len(jpeg.getvalue()) // 2])
    (photos / "phone.heic").write_bytes(b"....ftypheic")
    (photos / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (photos / "loop").symlink_to(photos)
    (photos / "notes.txt").write_text("")
    (photos / "._good.png").write_text("resource fork")
    found = look(photos, work=tmp_path / "work")
    assert {row.path for row in found.photos} == {
        "good.png", "dotted.name.v2.png", "Größe 日本.png", "same name.png/good.png",
    }  # fmt: skip
    assert {row.path: row.reason for row in found.rejects} == {
        "empty.jpg": "empty file",
        "text.jpg": "not an image",
        "cut.jpg": "broken",
        "phone.heic": "unsupported format",
        "gone.jpg": "unreadable",
    }
    assert {row.image_id for row in found.refused} == {row.image_id for row in found.rejects}
    assert found.other_files == 1
    assert len({row.image_id for row in (*found.photos, *found.refused)}) == 9


def test_a_file_name_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "ok.png").write_bytes(encode_png(photo(0)))
    try:
        Path(os.fsdecode(os.fsencode(photos) + b"/\xff.png")).write_bytes(encode_png(photo(1)))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    found = look(photos, work=tmp_path / "work")
    assert [(row.reason, row.path) for row in found.rejects] == [("name", "\\udcff.png")]


def test_tar_members_are_read_by_offset_and_a_cut_tar_is_named(tmp_path: Path) -> None:
    images = {f"a/{n}.png": photo(n) for n in range(4)}
    path = tmp_path / "crawl.tar"
    with tarfile.open(path, "w") as tar:
        for name, image in images.items():
            data = encode_png(image)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
            tar.addfile(tarfile.TarInfo(name.replace("png", "json")))
        escape = tarfile.TarInfo("../../escape.png")
        escape.type, escape.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(escape)
    found = look(path, work=tmp_path / "work")
    sources = [parse_source(str(path))]
    assert [row.path for row in found.photos] == [f"crawl.tar::{name}" for name in images]
    for row, image in zip(found.photos, images.values(), strict=True):
        assert np.array_equal(read_photo(sources, row), image)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    cut = look(path, work=tmp_path / "work")
    assert [(row.path, row.reason) for row in cut.rejects if row.path == "crawl.tar"] == [("crawl.tar", "broken tar")]


def test_a_folder_whose_name_is_not_utf8_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(LmrError, match="the path is not UTF-8"):
        parse_source(f"{tmp_path}/\udcff")
    with pytest.raises(LmrError, match="the path is not UTF-8"), claim(tmp_path / "\udcff"):
        pass
    assert not any(tmp_path.iterdir())


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> list[int]:
    """Write a plain tar; returns where the headers of its members stand."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with tarfile.open(path) as tar:
        return [member.offset for member in tar]


@pytest.mark.parametrize(
    "harm",
    [
        lambda data, at: data[:at] + b"x" * 512 + data[at + 512 :],
        lambda data, at: data[:at] + bytes(512) + data[at + 512 :],
        lambda data, at: data[:at] + bytes(2**21),  # room that a download had not filled yet
        lambda data, at: data[: at + 100],
        lambda data, at: data[:at],
        lambda data, at: data + data,
    ],
    ids=["damaged header", "zeros inside", "zeros to the end", "cut in a header", "cut between members", "two in one"],
)
def test_a_tar_that_ends_too_soon_is_named_wherever_it_breaks(tmp_path: Path, harm) -> None:
    path = tmp_path / "crawl.tar"
    at = tar_of(path, [(f"{n}.png", encode_png(photo(n))) for n in range(4)])[2]
    whole = path.read_bytes()
    assert not list_photos([parse_source(str(path))]).refused
    path.write_bytes(harm(whole, at))
    listing = list_photos([parse_source(str(path))])
    assert [file.path for file in listing.found][:2] == ["crawl.tar::0.png", "crawl.tar::1.png"]
    assert [(file.path, reason) for file, reason, _ in listing.refused] == [("crawl.tar", "broken tar")]


def test_odd_members_of_a_tar_are_read_or_named(tmp_path: Path) -> None:
    path = tmp_path / "crawl.tar"
    data = encode_png(photo(0))
    tar_of(path, [("\xff\xe9.png", data), ("a.heic", b"x"), ("a.json", b"{}")])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("hard.png")
        link.type, link.linkname = tarfile.LNKTYPE, "a.heic"
        tar.addfile(link)
    found = look(path, work=tmp_path / "work")
    assert [row.path for row in found.photos] == ["crawl.tar::\\xff\\xe9.png"]
    assert np.array_equal(read_photo([parse_source(str(path))], found.photos[0]), photo(0))
    assert [(row.path, row.reason) for row in found.rejects] == [
        ("crawl.tar::a.heic", "unsupported format"),
        ("crawl.tar::hard.png", "not a plain member"),
    ]


def test_what_can_not_be_looked_into_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    for name in ("a.png", "locked/b.png", "c.tar.gz", "d.ZIP"):
        (tmp_path / name).write_bytes(encode_png(photo(0)))
    real = os.scandir

    def scandir(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    listing = list_photos([parse_source(str(tmp_path))])
    assert [file.path for file in listing.found] == ["a.png"]
    assert [(file.path, reason) for file, reason, _ in listing.refused] == [
        ("c.tar.gz", "packed archive"),
        ("d.ZIP", "packed archive"),
        ("locked", "unreadable folder"),
    ]


def test_a_glob_lists_a_photo_once_and_no_built_dataset(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "built" / "preview").mkdir(parents=True)
    (tmp_path / "built" / ".lmr-dataset").touch()
    for name in ("a/1.png", "2.png", "._2.png", "built/preview/train.png"):
        (tmp_path / name).write_bytes(encode_png(photo(0)))
    (tmp_path / "gone.png").symlink_to("nowhere")
    for pattern in ("**", "**/*"):
        listing = list_photos([parse_source(str(tmp_path / pattern))])
        assert [file.path for file in listing.found] == ["2.png", "a/1.png", "gone.png"]


def test_a_url_gives_the_same_photos_as_the_folder(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    photos = tmp_path / "photos"
    (photos / "sub").mkdir(parents=True)
    for n, name in enumerate(("a.png", "sub/b.png", "sub/c.png")):
        (photos / name).write_bytes(encode_png(photo(n)))
        memory.pipe_file(f"/scan/{name}", encode_png(photo(n)))
    local = look(photos, work=tmp_path / "w1")
    remote = look("memory://scan", work=tmp_path / "w2")
    globbed = look("memory://scan/sub/*.png", work=tmp_path / "w3")
    assert [(r.path, r.sha256, r.image_id) for r in remote.photos] == [
        (r.path, r.sha256, r.image_id) for r in local.photos
    ]
    assert [row.sha256 for row in globbed.photos] == [row.sha256 for row in local.photos[1:]]
    source = [parse_source("memory://scan")]
    assert np.array_equal(read_photo(source, remote.photos[2]), photo(2))


def test_globs_single_files_and_several_sources(tmp_path: Path) -> None:
    for scene in "xy":
        (tmp_path / scene).mkdir()
        for n in range(2):
            (tmp_path / scene / f"{n}.png").write_bytes(encode_png(photo(ord(scene) + n)))
    found = look(tmp_path / "*" / "1.png", tmp_path / "x" / "0.png", work=tmp_path / "work")
    assert [(row.source, row.path) for row in found.photos] == [(0, "x/1.png"), (0, "y/1.png"), (1, "0.png")]
    with pytest.raises(LmrError, match="no such file or folder"):
        parse_source(str(tmp_path / "nothing"))
    (tmp_path / "void").mkdir()
    with pytest.raises(LmrError, match="no photos found"):
        look(tmp_path / "void", work=tmp_path / "work")


def test_labels_are_the_first_folder_only_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "p" / "tower" / "day").mkdir(parents=True)
    (tmp_path / "p" / "tower" / "day" / "a.png").write_bytes(encode_png(photo(0)))
    (tmp_path / "p" / "b.png").write_bytes(encode_png(photo(1)))
    assert [r.scene for r in look(tmp_path / "p", work=tmp_path / "w", labelled=True).photos] == [None, "tower"]
    assert [r.scene for r in look(tmp_path / "p", work=tmp_path / "w").photos] == [None, None]


def test_a_second_look_opens_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import lmr_tools.scan as room

    photos, work = tmp_path / "photos", tmp_path / "work"
    photos.mkdir()
    for n in range(3):
        (photos / f"{n}.png").write_bytes(encode_png(photo(n)))
    first = look(photos, work=work)
    opened: list[str] = []
    real = room.read_bytes
    monkeypatch.setattr(room, "read_bytes", lambda sources, found: opened.append(found.path) or real(sources, found))
    assert look(photos, work=work) == first
    assert opened == []
    (photos / "3.png").write_bytes(encode_png(photo(3)))
    (photos / "1.png").write_bytes(encode_png(photo(9)))
    second = look(photos, work=work)
    assert sorted(opened) == ["1.png", "3.png"]
    assert [row for row in second.photos if row.path in {"0.png", "2.png"}] == [first.photos[0], first.photos[2]]
    opened.clear()
    look(photos, work=work, rehash=True)
    assert len(opened) == 4


def test_a_photo_that_changed_behind_the_table_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(encode_png(photo(0)))
    found = look(tmp_path / "a.png", work=tmp_path / "work")
    path.write_bytes(encode_png(photo(1)))
    with pytest.raises(LmrError, match="changed since it was scanned"):
        read_photo([parse_source(str(path))], found.photos[0])


def test_one_and_two_workers_see_the_same(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(9):
        (photos / f"{n}.png").write_bytes(encode_png(photo(n)) if n % 4 else b"bad")
    assert look(photos, work=tmp_path / "w1") == look(photos, work=tmp_path / "w2", workers=2)


def test_a_dataset_among_the_photos_is_not_scanned(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encode_png(photo(0)))
    (tmp_path / "built" / "preview").mkdir(parents=True)
    (tmp_path / "built" / ".lmr-dataset").touch()
    (tmp_path / "built" / "preview" / "train.png").write_bytes(encode_png(photo(1)))
    assert [file.path for file in list_photos([parse_source(str(tmp_path))]).found] == ["a.png"]


def test_copies_of_every_kind_leave_one_survivor(tmp_path: Path) -> None:
    image = photo(0, 400, 480)
    (tmp_path / "a.png").write_bytes(encode_png(image))
    (tmp_path / "b.png").write_bytes(encode_png(image))
    PilImage.fromarray(image).resize((240, 200)).save(tmp_path / "c.png")
    PilImage.fromarray(image).save(tmp_path / "d.jpg", quality=60)
    (tmp_path / "other.png").write_bytes(encode_png(photo(5, 400, 480)))
    rows = list(look(tmp_path, work=tmp_path / "work").photos)
    gone = dedup.exact_duplicates(rows)
    assert [(reject.path, reject.image_id) for reject in gone] == [("b.png", rows[0].image_id + "-1")]
    rows = dedup.staying(rows, gone)
    every_pair = [(a, b, 1.0) for a in range(len(rows)) for b in range(a)]
    gone = dedup.near_duplicates(rows, every_pair, max_bits=12)
    assert {reject.path for reject in gone} == {"c.png", "d.jpg"}
    assert all("(a.png)" in reject.detail for reject in gone)


def test_blurred_flat_and_small_photos_are_told_apart(tmp_path: Path) -> None:
    import cv2

    sharp = photo(0, 400, 480)
    pictures = {
        "sharp": sharp,
        "blurred": cv2.GaussianBlur(sharp, (0, 0), 6),
        "flat": np.full((400, 480, 3), 90, np.uint8),
        "small": sharp[:100],
    }
    for name, picture in pictures.items():
        (tmp_path / f"{name}.png").write_bytes(encode_png(picture))
    rows = look(tmp_path, work=tmp_path / "work").photos
    gone = dedup.poor_photos(rows, min_side=300, min_sharpness=30, min_texture=0.05)
    assert {Path(reject.path).stem: reject.reason for reject in gone} == {
        "blurred": "blurred", "flat": "flat", "small": "too small",
    }  # fmt: skip


def test_the_hash_ignores_coding_and_size_but_not_content() -> None:
    import cv2

    grey = cv2.cvtColor(photo(0, 400, 480), cv2.COLOR_RGB2GRAY)
    half = cv2.resize(grey, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    other = cv2.cvtColor(photo(1, 400, 480), cv2.COLOR_RGB2GRAY)

    def distance(a: np.ndarray, b: np.ndarray) -> int:
        return (int(perceptual_hash(a), 16) ^ int(perceptual_hash(b), 16)).bit_count()

    assert distance(grey, half) <= 6
    assert distance(grey, other) > 60
    assert quality(grey)[0] > 10 * quality(cv2.GaussianBlur(grey, (0, 0), 4))[0]


def test_list_order_does_not_depend_on_the_file_system(tmp_path: Path) -> None:
    names = ["b/2.png", "a/9.png", "c.png", "a/10.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    listing = list_photos([parse_source(str(tmp_path))])
    assert [file.path for file in listing.found] == sorted(names)
