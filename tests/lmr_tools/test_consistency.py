"""Every cross-check must see its own kind of damage, and none may see any in a sound dataset."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest

from lmr_tools import consistency as c
from tests.lmr_tools.dataset_fixture import SIZE, THRESHOLDS, make_dataset

RECIPE = {"size": SIZE, "high": 1, "medium": 2, "low": 2, "allow_partial": False, **THRESHOLDS}
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    dataset = make_dataset(tmp_path_factory.mktemp("frames"))
    return {path.stem: pq.read_table(path).to_pandas() for path in (dataset / "tables").glob("*.parquet")}


def edit(chosen: int | Callable[[dict[str, Any]], bool], **values: Any) -> Callable[[Rows], Rows]:
    """A change that sets columns of the row of that number, or of those that fit."""

    def change(rows: Rows) -> Rows:
        return [
            row | values if (chosen(row) if callable(chosen) else number == chosen) else row
            for number, row in enumerate(rows)
        ]

    return change


def drop(number: int) -> Callable[[Rows], Rows]:
    return lambda rows: [row for place, row in enumerate(rows) if place != number % len(rows)]


def double(rows: Rows) -> Rows:
    return [*rows, rows[0]]


def in_group(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: bool(row["group_id"] == name)


def photo(name: str) -> Callable[[dict[str, Any]], bool]:
    return lambda row: bool(row["image_id"] == name)


def test_a_sound_dataset_has_no_problem(frames: dict[str, pd.DataFrame]) -> None:
    assert list(c.cross_check(frames, RECIPE)) == []
    assert list(c.cross_check(frames, {})) == []


@pytest.mark.parametrize(
    ("check", "table", "change", "expected"),
    [
        (c.check_images, "images", drop(-1), "rejects.parquet: broken: not a photo of images"),
        (c.check_images, "rejects", drop(0), "images.parquet: broken: rejected, but no row in rejects says why"),
        (c.check_images, "images", double, "images.parquet: s0v0: listed twice"),
        (c.check_images, "rejects", double, "rejects.parquet: broken: listed twice"),
        (c.check_images, "images", edit(photo("s1v3"), status="unused"), "images.parquet: s1v3: unused, but a group"),
        (c.check_images, "images", edit(photo("s0v6"), status="used"), "images.parquet: s0v6: used, but no group"),
        (c.check_images, "images", edit(photo("s1v3"), status="lost"), "images.parquet: s1v3: unknown status 'lost'"),
        (c.check_images, "rejects", edit(0, image_id="s1v3"), "images.parquet: s1v3: used, but rejects lists it"),
        (c.check_images, "groups", edit(0, ref_image="broken"), "images.parquet: broken: rejected, but a group uses"),
        (c.check_pairs, "pairs", double, "pairs.parquet: s0v0 s0v2: listed twice"),
        (c.check_pairs, "pairs", edit(0, tier="H"), "pairs.parquet: s0v0 s0v2: tier H, but overlap 1.0, scale ratio"),
        (c.check_pairs, "pairs", edit(0, scale_ratio=0.5), "pairs.parquet: s0v0 s0v2: tier M, but overlap 1.0"),
        (c.check_pairs, "pairs", edit(0, tier="Q"), "pairs.parquet: s0v0 s0v2: unknown tier 'Q'"),
        (c.check_pairs, "pairs", edit(0, overlap=1.5), "pairs.parquet: s0v0 s0v2: overlap 1.5 or scale ratio"),
        (c.check_pairs, "pairs", edit(0, scale_ratio=0.0), "pairs.parquet: s0v0 s0v2: overlap 1.0 or scale ratio 0.0"),
        (c.check_pairs, "pairs", edit(0, ref_image="s0v0"), "pairs.parquet: s0v0: paired with itself"),
        (c.check_pairs, "candidates", edit(0, ref_image="no"), "candidates.parquet: s0v0 no: names a photo that"),
        (c.check_embeddings, "embeddings", drop(0), "embeddings.parquet: s0v0: used, but it has no embedding"),
        (c.check_embeddings, "embeddings", double, "embeddings.parquet: s0v0: view 0 listed twice"),
        (c.check_embeddings, "embeddings", edit(0, image_id="no"), "embeddings.parquet: no: not a photo of images"),
        (c.check_groups, "groups", drop(0), "groups.parquet: g0-0: 4 references, the recipe says 5"),
        (c.check_groups, "groups", double, "groups.parquet: g0-0: slot H twice"),
        (c.check_groups, "groups", edit(1, slot="H"), "groups.parquet: g0-0: slot H twice"),
        (c.check_groups, "groups", edit(1, slot="X"), "groups.parquet: g0-0: unknown slot 'X'"),
        (c.check_groups, "groups", edit(0, tier="M"), "groups.parquet: g0-0: tier M can not fill slot H"),
        (c.check_groups, "groups", edit(1, tier="L"), "groups.parquet: g0-0: tier L can not fill slot M1"),
        (c.check_groups, "groups", edit(0, size=32), "groups.parquet: g0-0: size 32, not 64"),
        (c.check_groups, "groups", edit(0, ref_image="s0v0"), "groups.parquet: g0-0: photo s0v0 serves twice"),
        (c.check_groups, "groups", edit(0, ref_image="s0v2"), "groups.parquet: g0-0: photo s0v2 serves twice"),
        (c.check_groups, "groups", edit(0, target_x=31), "groups.parquet: g0-0: its rows differ in target_x"),
        (c.check_groups, "groups", edit(0, shard="x.tar"), "groups.parquet: g0-0: its rows differ in shard"),
        (c.check_groups, "groups", edit(0, split="dev"), "groups.parquet: g0-0: unknown split 'dev'"),
        (c.check_crops, "images", drop(0), "groups.parquet: g0-0: s0v0 is not a photo of images"),
        (c.check_crops, "groups", edit(0, ref_x=200), "groups.parquet: g0-0: the crop of s0v1 at (200, "),
        (c.check_crops, "groups", edit(0, ref_y=-1), "groups.parquet: g0-0: the crop of s0v1 at ("),
        (c.check_crops, "groups", edit(0, target_x=-1), "groups.parquet: g0-0: the crop of s0v0 at (-1, 30) leaves"),
        (c.check_crops, "images", edit(photo("s0v1"), height=80), "groups.parquet: g0-0: the crop of s0v1 at ("),
        (c.check_tiers, "pairs", drop(0), "groups.parquet: g0-0: slot M1: s0v0 s0v2 is not in pairs"),
        (c.check_tiers, "groups", edit(0, tier="M"), "groups.parquet: g0-0: slot H: tier M, pairs says H for s0v1"),
        (c.check_tiers, "pairs", edit(0, tier=None), "groups.parquet: g0-0: slot M1: tier M, pairs says null for s0v2"),
        (c.check_tiers, "groups", edit(1, overlap=0.5), "groups.parquet: g0-0: slot M1: overlap 0.5, pairs says 1.0"),
        (
            c.check_tiers,
            "groups",
            edit(1, clip_score=None),
            "groups.parquet: g0-0: slot M1: clip_score null, pairs says",
        ),
        (
            c.check_splits,
            "groups",
            edit(0, ref_image="s4v1"),
            "groups.parquet: photo s4v1 is in more than one split: te",
        ),
        (
            c.check_splits,
            "groups",
            edit(0, ref_image="s1v1"),
            "groups.parquet: photo s1v1 is in more than one scene: s0",
        ),
        (
            c.check_splits,
            "groups",
            edit(in_group("g4-0"), scene="s0v0"),
            "groups.parquet: scene s0v0 is in more than on",
        ),
        (
            c.check_shards,
            "groups",
            edit(in_group("g0-0"), split="val"),
            "shards.parquet: train-000000.tar: split train",
        ),
        (c.check_shards, "shards", edit(0, samples=3), "shards.parquet: train-000000.tar: 3 samples, but the groups"),
        (c.check_shards, "shards", edit(0, split="val"), "shards.parquet: train-000000.tar: split val, but its groups"),
        (c.check_shards, "shards", double, "shards.parquet: train-000000.tar: listed twice"),
        (c.check_shards, "shards", drop(0), "groups.parquet: g0-0: shard train-000000.tar is not in the shards table"),
        (c.check_samples, "samples", drop(0), "groups.parquet: g0-0: not in the samples table"),
        (c.check_samples, "samples", double, "samples.parquet: g0-0: listed twice"),
        (c.check_samples, "samples", edit(0, group_id="x"), "samples.parquet: x: not in the groups table"),
        (c.check_samples, "samples", edit(0, split="val"), "samples.parquet: g0-0: split val, the groups table says"),
        (c.check_samples, "samples", edit(0, scene="s"), "samples.parquet: g0-0: scene s, the groups table says s0v0"),
        (c.check_samples, "samples", edit(0, shard="x"), "samples.parquet: g0-0: shard x, the groups table says train"),
        (c.check_samples, "samples", edit(0, bytes=10**9), "samples.parquet: g0-0: bytes 0 + 1000000000 leave train-0"),
    ],
)
def test_damage_is_seen(
    frames: dict[str, pd.DataFrame],
    check: Callable[[Mapping[str, pd.DataFrame], Mapping[str, Any]], Iterator[str]],
    table: str,
    change: Callable[[Rows], Rows],
    expected: str,
) -> None:
    changed = pd.DataFrame(change(frames[table].to_dict("records")), columns=frames[table].columns)
    found = list(check({**frames, table: changed}, RECIPE))
    assert any(line.startswith(f"tables/{expected}") for line in found), found


def test_partial_groups_are_no_problem_where_the_recipe_allows_them(frames: dict[str, pd.DataFrame]) -> None:
    cut = {**frames, "groups": frames["groups"].drop(index=0)}
    assert list(c.check_groups(cut, RECIPE | {"allow_partial": True})) == []


def test_a_missing_table_takes_only_its_own_checks_away(frames: dict[str, pd.DataFrame]) -> None:
    rest = {name: frame for name, frame in frames.items() if name != "pairs"}
    rest["shards"] = rest["shards"].assign(samples=9)
    assert len(list(c.cross_check(rest, RECIPE))) == len(rest["shards"])


def test_many_problems_of_one_kind_are_counted(frames: dict[str, pd.DataFrame]) -> None:
    pairs = frames["pairs"].assign(tier="Q")
    found = list(c.check_pairs({**frames, "pairs": pairs}, {}))
    assert len(found) == c.LIMIT + 1
    assert found[-1] == f"tables/pairs.parquet: {len(pairs) - c.LIMIT} more rows like the last"


def test_counts_follow_from_the_tables(frames: dict[str, pd.DataFrame]) -> None:
    assert c.counts_of(frames) == {
        "photos": {"found": 36, "used": 30, "unused": 5, "rejected": 1},
        "rejects": {"scan: not an image": 1},
        "groups": {"train": 4, "val": 2, "test": 1},
        "references": {"H slot, H pair": 7, "L slot, L pair": 14, "M slot, M pair": 14},
        "scenes": 5,
    }
    assert c.counts_of({}) == {}
