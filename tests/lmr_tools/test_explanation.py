"""An explanation lists every photo considered, with the pair's own numbers, and a reason that follows from them."""

import dataclasses
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image as PilImage

from lmr_tools import explanation as e
from lmr_tools.schema import CandidateRow, GroupRow, ImageRow, LmrError, PairRow
from lmr_tools.tables import read_rows, write_rows
from tests.lmr_tools.dataset_fixture import SIZE, SLOTS, WIDTH, WINDOWS, make_dataset


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dataset(tmp_path_factory.mktemp("explained"))


@pytest.fixture
def dataset(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "dataset")


def change(dataset: Path, row_type: type, name: str, ids: tuple[str, str], **values: object) -> None:
    """Set values of one pair's row in a table."""
    path = dataset / "tables" / f"{name}.parquet"
    rows = [
        dataclasses.replace(row, **values) if (row.target_image, row.ref_image) == ids else row
        for row in read_rows(path, row_type)
    ]
    write_rows(path, rows, row_type)


def test_every_photo_considered_is_there_with_its_numbers(built: Path) -> None:
    found = e.explain_group(built, "g1-1")
    assert found.target.image_id == "s1v0"
    assert [row.slot for row in found.rows] == list(SLOTS)
    assert [c.slot for c in found.considered] == [*SLOTS, None]
    pairs = {p.ref_image: p for p in read_rows(built / "tables/pairs.parquet", PairRow) if p.target_image == "s1v0"}
    ranks = {
        c.ref_image: (c.rank, c.clip_score)
        for c in read_rows(built / "tables/candidates.parquet", CandidateRow)
        if c.target_image == "s1v0"
    }
    assert {c.image_id: c.pair for c in found.considered} == pairs
    assert {c.image_id: (c.rank, c.clip_score) for c in found.considered} == ranks
    assert found.considered[1].why == "chosen: Medium pair for slot M1"
    assert found.considered[1].path == "place 1/view-2.png"


LEFT = ("s1v0", "s1v6")


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"overlap": 0.2}, "not chosen: pairs that come first took the Medium slots"),
        ({}, "not chosen: a usable Medium pair, but not for this crop"),
        ({"tier": None, "reason": "not verified: 9 agree"}, "not usable as a reference"),
        ({"tier": "L", "hops": 2, "overlap": 0.0}, "not chosen: pairs that come first took the Low slots"),
        ({"tier": "L", "overlap": 0.9}, "not chosen: a usable Low pair, but not for this crop"),
    ],
)
def test_why_a_photo_was_not_chosen(dataset: Path, values: dict, why: str) -> None:
    change(dataset, PairRow, "pairs", LEFT, **values)
    left = e.explain_group(dataset, "g1-0").considered[-1]
    assert left.image_id == "s1v6" and left.slot is None
    assert left.why.startswith(why)


def test_a_photo_too_small_for_a_crop(dataset: Path) -> None:
    path = dataset / "tables" / "images.parquet"
    rows = [dataclasses.replace(r, width=50) if r.image_id == "s1v6" else r for r in read_rows(path, ImageRow)]
    write_rows(path, rows, ImageRow)
    why = e.explain_group(dataset, "g1-0").considered[-1].why
    assert why == "not chosen: the photo is smaller than a crop (50x180)"


def test_a_borrowed_slot_and_a_chained_pair(dataset: Path) -> None:
    for name, row_type in (("pairs", PairRow), ("groups", GroupRow)):
        change(dataset, row_type, name, ("s1v0", "s1v2"), tier="H")
    change(dataset, PairRow, "pairs", LEFT, hops=2, via="s1v4")
    path = dataset / "tables" / "candidates.parquet"
    write_rows(path, [r for r in read_rows(path, CandidateRow) if r.ref_image != "s1v6"], CandidateRow)
    found = {c.image_id: c for c in e.explain_group(dataset, "g1-0").considered}
    assert found["s1v2"].why == "chosen: High pair, left over; fills slot M1, for which no own pair was usable"
    assert found["s1v6"].rank is None
    assert "not mined from this side" in e.numbers_line(found["s1v6"])


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("g1-2", r"no group 'g1-2'; 7 groups, for example .*g1-[01]"),
        ("zzz", r"no group 'zzz'; 7 groups, for example g0-0, g1-0, g1-1"),
        ("s1v0", "s1v0 is a photo, not a group; it is the target of g1-0, g1-1"),
        ("place 3/view-0.png", "is the target of g3-0, g3-1"),
        ("broken", "broken is a photo that is the target of no group: it is rejected"),
    ],
)
def test_unknown_groups_get_one_helpful_line(built: Path, name: str, match: str) -> None:
    with pytest.raises(LmrError, match=match) as caught:
        e.explain_group(built, name)
    assert "\n" not in str(caught.value)


def test_why_a_photo_is_no_target(dataset: Path) -> None:
    path = dataset / "tables" / "images.parquet"
    reason = "too few references: 1 H, 0 M, 0 L"
    rows = [dataclasses.replace(r, no_target=reason) if r.image_id == "s1v6" else r for r in read_rows(path, ImageRow)]
    write_rows(path, rows, ImageRow)
    with pytest.raises(LmrError, match=f"target of no group: {reason}"):
        e.explain_group(dataset, "s1v6")


def test_damage_is_named(dataset: Path) -> None:
    with pytest.raises(LmrError, match=r"train-000000\.tar: does not hold group g9; run lmr verify"):
        e.read_groups(dataset, {"g9": "train-000000.tar"})
    (dataset / "tables" / "pairs.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(LmrError, match=r"pairs\.parquet: not a readable Parquet table"):
        e.explain_group(dataset, "g1-0")
    (dataset / "tables" / "pairs.parquet").unlink()
    with pytest.raises(LmrError, match=r"pairs\.parquet: no such table"):
        e.explain_group(dataset, "g1-0")
    (dataset / "dataset.json").unlink()
    with pytest.raises(LmrError, match="not a dataset"):
        e.explain_group(dataset, "g1-0")


def test_groups_of_several_shards_come_in_the_order_asked_for(built: Path) -> None:
    shards = {row.group_id: row.shard for row in read_rows(built / "tables/groups.parquet", GroupRow)}
    wanted = {name: shards[name] for name in ("g4-0", "g0-0", "g3-1", "g1-1")}
    assert [group.group_id for group in e.read_groups(built, wanted)] == list(wanted)


class FakeGeometry(ModuleType):
    """Stands for `features` and `geometry`: every pair matches at two points; remembers the pictures it was given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__("fake")
        for name in ("features", "geometry"):
            monkeypatch.setitem(sys.modules, f"lmr_tools.{name}", self)
        self.seen: list[tuple[int, ...]] = []

    def extract_features(self, image: np.ndarray, **limits: int) -> np.ndarray:
        self.seen.append(image.shape)
        return image

    def match_pair(self, a: np.ndarray, b: np.ndarray) -> SimpleNamespace:
        return SimpleNamespace(points_a=[[10.0, 10.0], [40.0, 40.0]], points_b=[[12.0, 10.0], [42.0, 40.0]])


def test_evidence_comes_from_the_photos_or_else_from_the_crops(
    built: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeGeometry(monkeypatch)
    change(dataset, PairRow, "pairs", ("s1v0", "s1v5"), hops=2)
    found = e.explain_group(dataset, "g1-0")
    assert e.draw_evidence(dataset, found, tmp_path / "a.png").startswith("drawn from the source photos")
    # Four of the five pairs have matches of their own; the fifth was joined through another photo.
    assert fake.seen == [(180, WIDTH, 3)] * 8
    photos = built.parent / "photos"
    photos.rename(photos.with_name("moved"))
    try:
        fake.seen.clear()
        note = e.draw_evidence(dataset, found, tmp_path / "b.png")
    finally:
        photos.with_name("moved").rename(photos)
    assert "can not be read" in note and "drawn from the crops" in note
    assert fake.seen == [(SIZE, SIZE, 3)] * 8
    for name in ("a.png", "b.png"):
        with PilImage.open(tmp_path / name) as picture:
            assert picture.height > 1500


def test_a_changed_photo_is_not_drawn_as_if_it_were_the_old_one(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeGeometry(monkeypatch)
    path = dataset / "tables" / "images.parquet"
    rows = [dataclasses.replace(r, sha256="0" * 64) if r.image_id == "s1v2" else r for r in read_rows(path, ImageRow)]
    write_rows(path, rows, ImageRow)
    note = e.draw_evidence(dataset, e.explain_group(dataset, "g1-0"), tmp_path / "a.png")
    assert "changed" in note and "drawn from the crops" in note


def test_matches_lie_where_the_windows_say(built: Path) -> None:
    """With the real geometry: matched points of two views of one picture agree with how the views were cut."""
    found = e.explain_group(built, "g2-0")
    photos = e._photos(built, found)
    for considered, view in zip(found.considered[:3], (1, 2, 3), strict=True):
        a, b = e._matches(photos["s2v0"], photos[considered.image_id], considered.pair, {})
        (x0, y0, w0), (x1, y1, w1) = WINDOWS[0], WINDOWS[view]
        truth = (a * w0 / WIDTH + [x0, y0] - [x1, y1]) * WIDTH / w1
        assert len(a) >= 12
        assert np.median(np.linalg.norm(truth - b, axis=1)) < 1.5
