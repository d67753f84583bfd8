"""Pictures: right size and colours in the right places, the same bytes each time, clear refusals."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PilImage
from PIL import ImageColor

from lmr_tools import preview
from lmr_tools.drawing import TARGET, TIER_COLOURS, fit, font
from lmr_tools.preview import CELL, GAP, HEADER, MARGIN, MatchView, contact_sheet, match_sheet, tier_histograms
from lmr_tools.schema import Group, LmrError, PairRow, Reference, Split, Tier


def load(path: Path) -> np.ndarray:
    with PilImage.open(path) as picture:
        return np.array(picture.convert("RGB"))


def flat(value: int, size: tuple[int, int] = (40, 40)) -> np.ndarray:
    return np.full((*size, 3), value, np.uint8)


def reference(slot: str, tier: Tier, value: int) -> Reference:
    return Reference(
        pixels=flat(value),
        image_id=f"photo-{slot}",
        path=f"some/long/folder/name/é/photo-{slot}.jpg",
        slot=slot,
        tier=tier,
        overlap=0.5,
        scale_ratio=0.75,
        clip_score=None if slot == "L1" else 0.8,
        x=0,
        y=0,
    )


def group(name: str = "g", **tiers: Tier) -> Group:
    references = tuple(reference(slot, tier, 30 * n) for n, (slot, tier) in enumerate(tiers.items()))
    return Group(
        group_id=name,
        scene="s",
        split=Split.TRAIN,
        target=flat(200),
        target_image="t",
        target_path="t.jpg",
        target_x=0,
        target_y=0,
        references=references,
    )


FULL = {"H": Tier.HIGH, "M1": Tier.MEDIUM, "M2": Tier.HIGH, "L1": Tier.LOW, "L2": Tier.MEDIUM}


def cell(picture: np.ndarray, row: int, column: int) -> np.ndarray:
    top = MARGIN + HEADER + row * (CELL + preview.CAPTION + GAP)
    left = MARGIN + column * (CELL + GAP)
    return picture[top : top + CELL, left : left + CELL]


def test_contact_sheet_shows_the_crops_in_order_with_frames_of_their_tier(tmp_path: Path) -> None:
    path = tmp_path / "sheet.png"
    contact_sheet([group("a", **FULL), group("b", H=Tier.HIGH, L2=Tier.LOW)], path)
    picture = load(path)
    assert picture.shape[1] == 2 * MARGIN + 6 * CELL + 5 * GAP
    assert (cell(picture, 0, 0)[CELL // 2, CELL // 2] == 200).all()
    assert tuple(cell(picture, 0, 0)[CELL // 2, 1]) == ImageColor.getrgb(TARGET)
    for column, (slot, tier) in enumerate(FULL.items(), 1):
        shown = cell(picture, 0, column)
        assert (shown[CELL // 2, CELL // 2] == 30 * (column - 1)).all(), slot
        assert tuple(shown[CELL // 2, 1]) == ImageColor.getrgb(TIER_COLOURS[tier]), slot
    # The second group fills H and L2 only: the places between them are empty, L2 stands in its own column.
    for column in (2, 3, 4):
        assert (cell(picture, 1, column)[CELL // 2, 10:-10] == 255).all()
    assert tuple(cell(picture, 1, 5)[CELL // 2, 1]) == ImageColor.getrgb(TIER_COLOURS[Tier.LOW])


def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    written: list[str] = []
    real = preview.write

    def note(pen, at, text, *rest, **named):  # type: ignore[no-untyped-def]
        written.append(text)
        real(pen, at, text, *rest, **named)

    monkeypatch.setattr(preview, "write", note)
    return written


def test_an_unmeasured_pair_is_not_shown_as_overlap_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = texts(monkeypatch)
    chained = dataclasses.replace(reference("L1", Tier.LOW, 0), overlap=0.0)
    contact_sheet([dataclasses.replace(group(), references=(chained,))], tmp_path / "sheet.png")
    assert "no own matches, scale 0.75" in written


def test_contact_sheet_says_scores_and_borrowed_slots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = texts(monkeypatch)
    contact_sheet([group("the-id", **FULL)], tmp_path / "sheet.jpg")
    assert written[:6] == ["Target", "High", "Medium", "Medium", "Low", "Low"]
    assert "the-id" in written and "overlap 0.50, scale 0.75" in written
    assert "embedding 0.80" in written and "not embedded" in written
    assert [text for text in written if "slot" in text] == ["M slot, High pair", "L slot, Medium pair"]


@pytest.mark.parametrize("name", ["sheet.png", "sheet.jpg"])
def test_equal_groups_give_equal_bytes(tmp_path: Path, name: str) -> None:
    for folder in ("a", "b"):
        contact_sheet([group(**FULL)], tmp_path / folder / name)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_whole_images_of_any_shape_fit_their_cells(tmp_path: Path) -> None:
    tall = dataclasses.replace(reference("L1", Tier.LOW, 90), pixels=flat(90, (900, 300)))
    wide = dataclasses.replace(group(), target=flat(50, (10, 400)), references=(tall,))
    contact_sheet([wide], tmp_path / "sheet.png")
    picture = load(tmp_path / "sheet.png")
    assert (cell(picture, 0, 1)[CELL // 2, CELL // 2] == 90).all()
    assert (cell(picture, 0, 1)[CELL // 2, :20] == 255).all()


def test_refusals_are_clear(tmp_path: Path) -> None:
    with pytest.raises(LmrError, match="no groups"):
        contact_sheet([], tmp_path / "sheet.png")
    with pytest.raises(LmrError, match=r"sheet\.gif: pictures are written as \.png or \.jpg"):
        contact_sheet([group(**FULL)], tmp_path / "sheet.gif")
    assert not list(tmp_path.iterdir())


def pair(tier: str | None, overlap: float, scale: float) -> PairRow:
    return PairRow(
        target_image="a",
        ref_image="b",
        overlap=overlap,
        scale_ratio=scale,
        inliers=1,
        tier=tier,
        reason="",
        clip_score=None,
        matches=1,
        consistent=1,
        scale_log2=0.0,
        hops=1,
        via=None,
    )


def test_histograms_put_bars_where_the_values_are(tmp_path: Path) -> None:
    path = tmp_path / "tiers.png"
    tier_histograms(
        iter([pair("H", 0.61, 0.96), pair("L", 0.06, 0.31), pair("L", 0.0, 1.0), pair(None, 0.9, 0.9)]), path
    )
    picture = load(path)

    def bars(tier: Tier, column: int) -> set[float]:
        """Where, in [0, 1], bars of this tier's colour stand in one panel."""
        width, left = 400, 110 + column * (400 + 2 * MARGIN)
        found = (picture[70:, left : left + width] == ImageColor.getrgb(TIER_COLOURS[tier])).all(axis=2).any(axis=0)
        return {int(x / width * preview.BARS) / preview.BARS for x in np.flatnonzero(found)}

    assert bars(Tier.HIGH, 0) == {0.6}
    assert bars(Tier.HIGH, 1) == {0.95}
    assert bars(Tier.LOW, 0) == {0.0, 0.05}
    assert bars(Tier.LOW, 1) == {0.3, 0.975}
    assert bars(Tier.MEDIUM, 0) == set()


def test_histograms_of_nothing_are_a_picture(tmp_path: Path) -> None:
    tier_histograms([], tmp_path / "tiers.png")
    assert load(tmp_path / "tiers.png").shape[1] > 500


def test_match_lines_join_the_matched_points(tmp_path: Path) -> None:
    """One match inside the crop: its colour is found at both ends and nowhere off the line's rows."""
    target, other = flat(220, (420, 560)), flat(220, (420, 560))
    views = [
        MatchView(
            image=other,
            box=(300, 100, 64),
            tier=Tier.LOW,
            slot="L1",
            title="other.jpg",
            lines=(),
            target_points=np.array([[120.0, 130.0], [500.0, 400.0]]),
            points=np.array([[330.0, 130.0], [40.0, 400.0]]),
        )
    ]
    match_sheet(target, (100, 100, 64), "title", views, tmp_path / "match.png")
    picture = load(tmp_path / "match.png").astype(int)
    assert picture.shape[1] == 2 * MARGIN + 2 * 560 + 2 * GAP
    top = MARGIN + 34 + 34
    red = np.array(ImageColor.getrgb(TIER_COLOURS[Tier.LOW]))
    near = np.abs(picture - red).sum(axis=2) < 60
    row = near[top + 130]
    left, right = MARGIN + 120, MARGIN + 560 + 2 * GAP + 330
    assert row[left : right + 1].mean() > 0.97, "the line runs from one point to the other"
    assert not row[: left - 5].any() and not row[right + 5 : right + 20].any()
    grey = (picture.max(axis=2) - picture.min(axis=2) < 30) & (picture.mean(axis=2) < 205)
    assert grey[top + 400, MARGIN + 520], "a match outside the crop is drawn grey"


def test_match_sheet_without_points_or_boxes(tmp_path: Path) -> None:
    none = np.zeros((0, 2))
    view = MatchView(
        image=flat(9), box=None, tier=Tier.HIGH, slot="H", title="x", lines=("a", "b"), target_points=none, points=none
    )
    match_sheet(flat(5), None, "t", [view], tmp_path / "match.png")
    assert load(tmp_path / "match.png").shape[1] >= 760


def test_text_is_shortened_in_its_middle() -> None:
    text = "folder/" * 20 + "name.jpg"
    short = fit(text, 14, 180)
    assert font(14).getlength(short) <= 180
    assert short.startswith("folder/") and short.endswith("name.jpg") and "..." in short
    assert fit("short", 14, 180) == "short"
    assert fit("anything", 14, 0) == ""
