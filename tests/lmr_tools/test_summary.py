"""The summary of a dataset against plain counting."""

import json
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest

from lmr_tools.summary import BINS, printable, slot_table, summarise
from tests.lmr_tools.dataset_fixture import make_dataset


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    dataset = make_dataset(tmp_path_factory.mktemp("summary"))
    return {path.stem: pq.read_table(path).to_pandas() for path in (dataset / "tables").glob("*.parquet")}


@pytest.mark.parametrize("split", [None, "train", "val"])
def test_counts_are_those_of_the_rows(frames: dict[str, pd.DataFrame], split: str | None) -> None:
    summary = summarise(frames, split)
    rows = [row for row in frames["groups"].to_dict("records") if split in (None, row["split"])]
    per_split = Counter(s for _, s in {(row["group_id"], row["split"]) for row in rows})
    assert {entry["split"]: entry["groups"] for entry in summary["splits"] if entry["groups"]} == per_split
    assert {row["slot"]: row["references"] for row in summary["slots"]} == Counter(row["slot"] for row in rows)
    assert summary["scenes"]["count"] == len({row["scene"] for row in rows})
    for tier, facts in summary["tiers"].items():
        own = [row["overlap"] for row in rows if row["tier"] == tier]
        assert facts["references"] == len(own)
        assert facts["overlap"]["quantiles"][2] == pytest.approx(float(np.median(own)))
        expected, _ = np.histogram(own, bins=BINS, range=(0, 1))
        assert facts["overlap"]["histogram"] == expected.tolist()
    assert summary["photos"] == {"used": 30, "unused": 5, "rejected": 1}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_unscored_references_and_shortages(frames: dict[str, pd.DataFrame]) -> None:
    images = frames["images"].copy()
    images["no_target"] = images["no_target"].astype(object)
    images.loc[0:2, "no_target"] = ["too few references: 1 H, 0 M", "too few references: 0 H, 0 M", "no crop"]
    groups = frames["groups"].assign(clip_score=np.nan)
    summary = summarise({**frames, "images": images, "groups": groups})
    assert summary["no_target"] == {"too few references": 2, "no crop": 1}
    assert summary["tiers"]["H"]["clip_score"] == {"quantiles": None, "histogram": [0] * BINS}
    assert summary["slots"][0]["clip_score"] is None


def test_slots_stand_in_the_order_of_tiers() -> None:
    slots = ["L1", "M2", "H", "M1", "L2", "M10"]
    rows = pd.DataFrame({"slot": slots, "tier": [slot[0] for slot in slots], "landing": "matched"})
    rows = rows.assign(overlap=0.5, scale_ratio=0.5, clip_score=0.5)
    assert slot_table(rows)["slot"].tolist() == ["H", "M1", "M2", "M10", "L1", "L2"]


def test_a_split_without_groups(frames: dict[str, pd.DataFrame]) -> None:
    empty = frames["groups"][frames["groups"]["split"] != "test"]
    summary = summarise({**frames, "groups": empty}, "test")
    assert summary["slots"] == [] and summary["scenes"] == {"count": 0, "largest": {}}


def test_control_characters_are_shown() -> None:
    assert printable("a\x1b[31m\nb é") == "a\\x1b[31m\\nb é"
