"""Which reference fills which slot."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmr_tools.groups import Counts, Option, Plan, PlannedGroup, PlannedReference, choose, plan_from_json, plan_to_json
from lmr_tools.schema import ImageRow, Tier

LMR = Counts(high=1, medium=2, low=2, strict_tiers=False, allow_partial=False)


def row(name: str) -> ImageRow:
    return ImageRow(
        image_id=name,
        path=f"{name}.jpg",
        width=400,
        height=400,
        sha256=name * 4,
        scene=None,
        status="unused",
        source=0,
        offset=None,
        bytes=1,
        phash="0" * 64,
        sharpness=100.0,
        texture=1.0,
        no_target=None,
    )


def option(name: str, tier: Tier, overlap: float, *, verified: bool = True, via: str | None = None) -> Option:
    return Option(
        row=row(name), tier=tier, overlap=overlap, scale_ratio=1.0, clip_score=None, verified=verified, via=via
    )


H, M, L = Tier.HIGH, Tier.MEDIUM, Tier.LOW
OPTIONS = st.lists(st.tuples(st.sampled_from(list(Tier)), st.floats(0.01, 1)), max_size=12).map(
    lambda drawn: [option(f"p{n}", tier, overlap) for n, (tier, overlap) in enumerate(drawn)]
)


def test_each_tier_takes_its_most_similar() -> None:
    options = [option(n, t, o) for n, t, o in [("a", H, 0.5), ("b", H, 0.9), ("c", M, 0.2), ("d", M, 0.3)]]
    options += [option("e", L, 0.05), option("f", L, 0.06)]
    chosen = choose(options, LMR)
    assert chosen is not None
    assert [(slot, o.row.image_id) for slot, o in chosen] == [
        ("H", "b"), ("M1", "d"), ("M2", "c"), ("L1", "f"), ("L2", "e"),
    ]  # fmt: skip


def test_surplus_fills_lower_slots_least_similar_last() -> None:
    options = [option(name, H, overlap) for name, overlap in zip("abcde", (0.9, 0.8, 0.7, 0.6, 0.5), strict=True)]
    chosen = choose(options, LMR)
    assert chosen is not None
    assert [(slot, o.row.image_id, o.tier) for slot, o in chosen] == [
        ("H", "a", H), ("M1", "b", H), ("M2", "c", H), ("L1", "d", H), ("L2", "e", H),
    ]  # fmt: skip
    assert choose(options, dataclasses.replace(LMR, strict_tiers=True)) is None


def test_verified_low_pairs_come_before_chained_ones_and_those_before_labels() -> None:
    options = [option("a", H, 0.9), option("b", M, 0.2), option("c", M, 0.2)]
    options += [option("label", L, 0.0, verified=False), option("chain", L, 0.0, verified=False, via="b")]
    options += [option("seen", L, 0.01)]
    chosen = choose(options, LMR)
    assert chosen is not None
    assert [o.row.image_id for _, o in chosen][-2:] == ["seen", "chain"]


def test_a_missing_reference_is_a_partial_group_or_none() -> None:
    options = [option("a", H, 0.9), option("b", M, 0.2)]
    assert choose(options, LMR) is None
    chosen = choose(options, dataclasses.replace(LMR, allow_partial=True))
    assert chosen is not None and [slot for slot, _ in chosen] == ["H", "M1"]
    assert choose([], dataclasses.replace(LMR, allow_partial=True)) is None


@given(OPTIONS, st.booleans(), st.booleans())
def test_no_photo_serves_twice_and_no_tier_is_raised(options: list[Option], strict: bool, partial: bool) -> None:
    counts = dataclasses.replace(LMR, strict_tiers=strict, allow_partial=partial)
    chosen = choose(options, counts)
    if chosen is None:
        return
    names = [o.row.image_id for _, o in chosen]
    assert len(set(names)) == len(names)
    order = "HML"
    for slot, o in chosen:
        assert o.tier == slot[0] if strict else order.index(o.tier) <= order.index(slot[0])
    assert partial or len(chosen) == 5


@given(OPTIONS)
def test_the_order_of_the_options_does_not_matter(options: list[Option]) -> None:
    assert choose(options, LMR) == choose(options[::-1], LMR)


@pytest.mark.parametrize("counts", [(1, 1, 1), (2, 0, 1), (0, 3, 0)])
def test_slot_names_number_only_what_comes_twice(counts: tuple[int, int, int]) -> None:
    high, medium, low = counts
    slots = Counts(high=high, medium=medium, low=low, strict_tiers=False, allow_partial=False).slots()
    names = [name for name, _ in slots]
    assert len(set(names)) == len(names) == sum(counts)
    assert all((name == str(tier)) == (sum(t == tier for _, t in slots) == 1) for name, tier in slots)


def test_a_plan_survives_json() -> None:
    reference = PlannedReference(
        image_id="r", slot="M1", tier="H", overlap=0.5, scale_ratio=0.9, clip_score=None, x=1, y=2, landing="matched"
    )
    group = PlannedGroup(target_image="t", x=3, y=4, references=(reference,))
    plan = Plan(target_image="t", groups=(group,), duplicates=("d",), reason="")
    assert plan_from_json(plan_to_json(plan)) == plan
