"""Layouts, plans and protocols: pairing by name, what is said of a wrong folder, pixels under both protocols."""

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from lmr_tools.dataset import table_path
from lmr_tools.images import encode_png, resize
from lmr_tools.protocol import Item, cut_back
from lmr_tools.schema import GroupRow, LmrError, Split
from lmr_tools.tables import read_rows
from lmr_tools.testset_layouts import Entry
from lmr_tools.testsets import choose_references, plan_testset, read_items
from tests.lmr_tools.dataset_fixture import make_dataset


def picture(seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def put(path: Path, seed: int, height: int = 40, width: int = 48) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = picture(seed, height, width)
    path.write_bytes(encode_png(pixels))
    return pixels


def cufed(folder: Path, groups: Sequence[str] = ("000", "007")) -> Path:
    for group in groups:
        for number in range(6):
            put(folder / f"{group}_{number}.png", int(group) * 10 + number, 41 + number, 50 - number)
    return folder


def read(benchmark: str, data: Path, protocol: str = "native", **options: Split) -> list[tuple[Entry, Item | LmrError]]:
    plan = plan_testset(benchmark, data, **options)
    return list(read_items(plan.entries, benchmark=benchmark, protocol=protocol))


def items(benchmark: str, data: Path, protocol: str = "native") -> list[Item]:
    found = [item for _, item in read(benchmark, data, protocol)]
    assert all(isinstance(item, Item) for item in found), found
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("protocol", ["official", "native"])
def test_cufed5(tmp_path: Path, protocol: str) -> None:
    cufed(tmp_path)
    first, second = items("cufed5", tmp_path, protocol)
    assert (first.image_id, second.image_id) == ("000", "007")
    assert second.reference_ids == tuple(f"007_{number}.png" for number in range(1, 6))
    target = picture(70, 41, 50)[:40, :48]
    np.testing.assert_array_equal(second.target, target)
    if protocol == "native":
        np.testing.assert_array_equal(second.lr, resize(target, 12, 10))
        np.testing.assert_array_equal(second.references[4], picture(75, 46, 45))
    else:
        canvas = np.zeros((500, 500, 3), np.uint8)
        canvas[:40, :48] = target
        np.testing.assert_array_equal(second.lr, resize(canvas, 125, 125))
        np.testing.assert_array_equal(second.references[4][:46, :45], picture(75, 46, 45))
        assert second.references[4].shape == (500, 500, 3)
        assert not second.references[4][46:].any() and not second.references[4][:, 45:].any()


def test_a_missing_reference_is_named_and_nothing_shifts(tmp_path: Path) -> None:
    cufed(tmp_path)
    (tmp_path / "000_3.png").unlink()
    with pytest.raises(LmrError, match=r"000_3\.png: is missing; a CUFED5 group is 000_0\.png to 000_5\.png"):
        plan_testset("cufed5", tmp_path)


def test_extra_files_are_listed(tmp_path: Path) -> None:
    cufed(tmp_path, ["001"])
    put(tmp_path / "001_6.png", 1)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / ".hidden").write_text("x")
    plan = plan_testset("cufed5", tmp_path)
    assert plan.ignored == ("001_6.png", "notes.txt")
    assert [len(entry.references) for entry in plan.entries] == [5]
    put(tmp_path / "001_2.PNG", 1)
    with pytest.raises(LmrError, match=r"holds 001_2\.PNG and 001_2\.png; keep one of them"):
        plan_testset("cufed5", tmp_path)


def test_an_unreadable_picture_fails_alone(tmp_path: Path) -> None:
    cufed(tmp_path, ["000", "001", "002"])
    data = (tmp_path / "001_4.png").read_bytes()
    (tmp_path / "001_4.png").write_bytes(data[: len(data) // 2])
    (_, first), (entry, failure), (_, last) = read("cufed5", tmp_path)
    assert isinstance(first, Item) and isinstance(last, Item) and last.image_id == "002"
    assert entry.image_id == "001" and isinstance(failure, LmrError)
    assert "001_4.png: broken" in str(failure)


def test_pictures_too_small_or_too_large(tmp_path: Path) -> None:
    cufed(tmp_path, ["001"])
    put(tmp_path / "001_2.png", 1, 40, 504)
    ((_, failure),) = read("cufed5", tmp_path, "official")
    assert "504x48 do not fit the official canvas of 500x500; give --protocol native" in str(failure)
    assert isinstance(read("cufed5", tmp_path, "native")[0][1], Item)
    put(tmp_path / "001_0.png", 1, 15, 11)
    ((_, failure),) = read("cufed5", tmp_path)
    assert "001: the target is 11x15, at least 12 pixels a side are needed" in str(failure)


@pytest.mark.parametrize("name", ["0000_1234_o.jpg.png", "0078_a b.png"])
def test_lmr(tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    put(folder / name[5:], 1, 61, 47)
    put(folder / "b.png", 2, 50, 70)
    put(folder / "a.png", 3, 66, 41)
    (item,) = items("lmr", tmp_path, "official")
    assert item.image_id == name and item.reference_ids == ("a.png", "b.png")
    assert item.target.shape == (60, 44, 3) and item.lr.shape == (17, 18, 3)
    assert {reference.shape for reference in item.references} == {(68, 72, 3)}
    np.testing.assert_array_equal(item.references[1][:50, :70], picture(2, 50, 70))
    (folder / name[5:]).unlink()
    with pytest.raises(LmrError, match="is missing; the folder is named after the target"):
        plan_testset("lmr", tmp_path)


def test_wr_sr(tmp_path: Path) -> None:
    for name in ("001", "002"):
        put(tmp_path / "input" / f"{name}.png", int(name), 41, 50)
        put(tmp_path / "ref" / f"{name}_ref.png", 10 + int(name), 39, 59)
    _, second = items("wr-sr", tmp_path, "official")
    assert second.reference_ids == ("002_ref.png",)
    # Both are cropped to a multiple of 4 before they are padded to one canvas.
    assert second.references[0].shape == (40, 56, 3) and second.lr.shape == (10, 14, 3)
    np.testing.assert_array_equal(second.references[0][:36], picture(12, 39, 59)[:36, :56])
    assert not second.references[0][36:].any()
    put(tmp_path / "ref" / "003_ref.png", 5)
    assert plan_testset("wr-sr", tmp_path).ignored == ("003_ref.png",)
    (tmp_path / "ref" / "001_ref.png").unlink()
    with pytest.raises(LmrError, match=r"001_ref\.png: is missing; it is the reference of 001\.png"):
        plan_testset("wr-sr", tmp_path)


def test_sun80(tmp_path: Path) -> None:
    put(tmp_path / "Sun_Hays_SR_groundtruth" / "hr_01.png", 1)
    references = tmp_path / "Sun_Hays_SR_scenematches" / "hr_01.png"
    for number in range(20):
        put(references / f"m{number:02}.png", number, 20 + number, 30)
    (item,) = items("sun80", tmp_path)
    assert len(item.references) == 20 and item.reference_ids[7] == "m07.png"
    (entry,) = plan_testset("sun80", tmp_path).entries
    five = choose_references(entry, benchmark="sun80", count=5, tiers=[])
    assert [reference.name for reference in five.references] == ["m00.png", "m04.png", "m08.png", "m12.png", "m16.png"]
    shutil.rmtree(references)
    with pytest.raises(LmrError, match=r"hr_01\.png: is missing or holds no picture"):
        plan_testset("sun80", tmp_path)


def test_urban100_refers_to_its_own_lr(tmp_path: Path) -> None:
    put(tmp_path / "img_001_SRF_4_HR.png", 1, 41, 50)
    put(tmp_path / "img_001_SRF_4_LR.png", 2, 10, 12)
    assert plan_testset("urban100", tmp_path).ignored == ("img_001_SRF_4_LR.png",)
    (item,) = items("urban100", tmp_path)
    assert item.reference_ids == ("lr",)
    np.testing.assert_array_equal(item.references[0], item.lr)
    (official,) = items("urban100", tmp_path, "official")
    assert official.references[0].shape == official.target.shape == (40, 48, 3)
    np.testing.assert_array_equal(official.references[0][:10, :12], item.lr)
    np.testing.assert_array_equal(official.lr, item.lr)


def test_manga109_takes_another_page(tmp_path: Path) -> None:
    for number in range(7):
        put(tmp_path / f"page{number}.png", number)
    plan = plan_testset("manga109", tmp_path)
    chosen = {entry.target.name: entry.references[0].name for entry in plan.entries}
    assert len(chosen) == 7 and all(target != reference for target, reference in chosen.items())
    assert len(set(chosen.values())) > 2
    assert plan == plan_testset("manga109", tmp_path)
    for number in range(1, 7):
        (tmp_path / f"page{number}.png").unlink()
    with pytest.raises(LmrError, match=r"expected two pages or more.*; found page0\.png"):
        plan_testset("manga109", tmp_path)


def test_own_folder(tmp_path: Path) -> None:
    for name in ("L1", "zoo", "M1", "H", "target", "M2"):
        put(tmp_path / "tower" / f"{name}.png", len(name))
    (entry,) = plan_testset("folder", tmp_path).entries
    assert entry.image_id == "tower" and entry.target.name == "target.png"
    assert [(r.name, r.tier) for r in entry.references] == [
        ("H.png", "H"), ("M1.png", "M"), ("M2.png", "M"), ("L1.png", "L"), ("zoo.png", "")
    ]  # fmt: skip
    medium = choose_references(entry, benchmark="folder", count=1, tiers=["M", "L"])
    assert [r.name for r in medium.references] == ["M1.png"]
    (tmp_path / "tower" / "target.png").unlink()
    with pytest.raises(
        LmrError, match=r"tower: expected target\.png and references .*; found H\.png, L1\.png, M1\.png"
    ):
        plan_testset("folder", tmp_path)


def test_own_pictures_without_references(tmp_path: Path) -> None:
    put(tmp_path / "baby.png", 1)
    put(tmp_path / "bird.png", 2)
    first, second = items("folder", tmp_path, "official")
    assert (first.image_id, second.image_id) == ("baby", "bird") and not first.references
    assert first.lr.shape == (10, 12, 3)


@pytest.mark.parametrize("layout", ["cufed5", "lmr", "wr-sr", "sun80", "urban100", "manga109", "folder"])
def test_wrong_folders_say_what_was_expected(tmp_path: Path, layout: str) -> None:
    with pytest.raises(LmrError, match=r"expected .*; found an empty folder"):
        plan_testset(layout, tmp_path)
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(LmrError, match=r"expected .*; found readme\.md"):
        plan_testset(layout, tmp_path)
    with pytest.raises(LmrError, match=f"no-such: no such folder; --data names the folder of {layout}"):
        plan_testset(layout, tmp_path / "no-such")


def test_dataset_split(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    ((entry, item),) = read("dataset", dataset)
    assert isinstance(item, Item) and entry.shard is not None and entry.shard.split == "test"
    assert item.image_id == entry.image_id and len(item.references) == 5
    assert item.tiers == tuple(reference.tier for reference in entry.references)
    train = read("dataset", dataset, split=Split.TRAIN)
    rows = [row for row in read_rows(table_path(dataset, "groups"), GroupRow) if row.split == "train"]
    assert sorted(entry.image_id for entry, _ in train) == sorted({row.group_id for row in rows})
    assert all(isinstance(item, Item) for _, item in train)
    # The same group may be asked for more than once, with other references.
    single = [dataclasses.replace(entry, references=(reference,)) for reference in entry.references]
    alone = [found for _, found in read_items(single, benchmark="dataset", protocol="native")]
    assert [found.reference_ids for found in alone if isinstance(found, Item)] == [(i,) for i in item.reference_ids]
    only_low = choose_references(entry, benchmark="dataset", count=None, tiers=["L"])
    ((_, low),) = read_items([only_low], benchmark="dataset", protocol="official")
    assert isinstance(low, Item) and set(low.tiers) == {"L"}
    np.testing.assert_array_equal(low.references[0], item.references[item.tiers.index("L")])


def test_damaged_shard(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    ((entry, _),) = read("dataset", dataset)
    data = bytearray(entry.target.read_bytes())
    data[len(data) // 3] ^= 255
    entry.target.write_bytes(bytes(data))
    try:
        ((_, failure),) = read("dataset", dataset)
        assert isinstance(failure, LmrError) and entry.target.name in str(failure)
    except LmrError as error:  # the byte was one that a decoder does not notice
        assert "sha256" in str(error)
    entry.target.unlink()
    ((_, failure),) = read("dataset", dataset)
    assert "can not be read" in str(failure)


def test_cut_back_refuses_another_size(tmp_path: Path) -> None:
    cufed(tmp_path, ["001"])
    (item,) = items("cufed5", tmp_path, "official")
    sr = picture(3, 500, 500)
    np.testing.assert_array_equal(cut_back(sr, item), sr[:40, :48])
    with pytest.raises(LmrError, match="the method made 500x496 of an LR of 125x125"):
        cut_back(sr[:496], item)
