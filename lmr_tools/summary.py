"""Numbers that describe a dataset: frames of its tables in, plain values out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from lmr_tools.schema import Split, Tier

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
SCORES = ("overlap", "scale_ratio", "clip_score")
BINS = 20
LARGEST = 5


def printable(text: str) -> str:
    """One line for a terminal: control characters of hostile names (escape codes, line ends) are shown, not sent."""
    return "".join(mark if mark.isprintable() else repr(mark)[1:-1] for mark in text)


def slot_table(groups: pd.DataFrame) -> pd.DataFrame:
    """One row per slot: how many references, how many of the slot's own tier, how many tied by matches, medians."""
    rows = groups.assign(own=groups["tier"] == groups["slot"].str[:1], matched=groups["landing"] == "matched")
    table = rows.groupby("slot", as_index=False).agg(
        references=("slot", "size"),
        own=("own", "sum"),
        matched=("matched", "sum"),
        overlap=("overlap", "median"),
        scale_ratio=("scale_ratio", "median"),
        clip_score=("clip_score", "median"),
    )
    order = sorted(table["slot"], key=lambda slot: ("HML".find(slot[0]), len(slot), slot))
    return table.set_index("slot").loc[order].reset_index()


def summarise(frames: Mapping[str, pd.DataFrame], split: str | None = None) -> dict[str, Any]:
    """What the tables hold: counts by split, tier, slot and scene, rejects, unused photos, score quantiles.

    `frames` holds images, rejects, pairs, groups and shards. With `split` the groups and shards are those of one split;
    photos, rejects and pairs have none. Every value is JSON-serialisable; scores that do not exist are None.
    """
    groups, shards = frames["groups"], frames["shards"]
    if split is not None:
        groups, shards = groups[groups["split"] == split], shards[shards["split"] == split]
    samples = groups.drop_duplicates("group_id")
    per_scene = samples["scene"].value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable")
    images = frames["images"]
    # "too few references: 3 H, 0 M ...": the numbers after the colon differ from photo to photo.
    shortages = images.loc[images["status"] != "rejected", "no_target"].dropna().str.split(":").str[0]
    return {
        "splits": [
            {
                "split": str(name),
                "groups": int((samples["split"] == name).sum()),
                "references": int((groups["split"] == name).sum()),
                "scenes": int(samples.loc[samples["split"] == name, "scene"].nunique()),
                "shards": int((shards["split"] == name).sum()),
                "bytes": int(shards.loc[shards["split"] == name, "bytes"].sum()),
            }
            for name in Split
            if split in (None, str(name))
        ],
        "slots": [{str(k): _number(v) for k, v in row.items()} for row in slot_table(groups).to_dict("records")],
        "tiers": {
            str(tier): {
                "references": int((groups["tier"] == tier).sum()),
                "pairs": int((frames["pairs"]["tier"] == tier).sum()),
                **{score: _spread(groups.loc[groups["tier"] == tier, score]) for score in SCORES},
            }
            for tier in Tier
        },
        "landing": _counts(groups["landing"]),
        "scenes": {
            "count": len(per_scene),
            "largest": {str(name): int(number) for name, number in per_scene.head(LARGEST).items()},
        },
        "photos": {name: int((images["status"] == name).sum()) for name in ("used", "unused", "rejected")},
        "no_target": _counts(shortages),
        "rejects": _counts(frames["rejects"]["stage"] + ": " + frames["rejects"]["reason"]),
        "ungraded_pairs": int(frames["pairs"]["tier"].isna().sum()),
    }


def _counts(values: pd.Series) -> dict[str, int]:
    """Values with their numbers, the most frequent first."""
    counts = values.value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable")
    return {str(name): int(number) for name, number in counts.items()}


def _number(value: Any) -> Any:
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, 6)
    return value


def _spread(values: pd.Series) -> dict[str, Any]:
    """Quantiles and a histogram over [0, 1] of a score; no quantiles when nothing was scored."""
    known = values.dropna()
    quantiles = [round(float(v), 6) for v in known.quantile(list(QUANTILES))] if len(known) else None
    places = (known.clip(0, 1) * BINS).astype(int).clip(upper=BINS - 1).value_counts()
    return {"quantiles": quantiles, "histogram": [int(places.get(place, 0)) for place in range(BINS)]}
