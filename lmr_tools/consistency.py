"""Cross-checks of a dataset's tables: frames in, problem lines out. Nothing is read here.

Every line names the table and the id. A check that finds many rows of a kind names the first and counts the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from lmr_tools.schema import Split, Tier

LIMIT = 20  # rows named per kind of problem
STATUS = ("used", "unused", "rejected")
SLOT = r"[HML](?:[1-9][0-9]?)?"
ANNOTATION = "annotation"  # rejects of this stage are lines of an imported annotation, not photos
ROUNDED = 1e-6  # the tables hold overlaps and scale ratios with six digits
PAIR = ["target_image", "ref_image"]
# What all rows of one group have in common.
OF_GROUP = ["split", "shard", "target_image", "target_x", "target_y", "size", "scene"]
# The columns of a reference that come from its pair, unchanged.
OF_PAIR = ["tier", "overlap", "scale_ratio", "clip_score"]

Frames = Mapping[str, pd.DataFrame]


def _lines(table: str, frame: pd.DataFrame, wrong: pd.Series, text: str) -> Iterator[str]:
    """One line for each row where `wrong` holds; `text` may name the columns."""
    if not wrong.any():
        return
    rows = frame[wrong]
    for row in rows.head(LIMIT).to_dict("records"):
        # A missing value is null in the table, whatever pandas calls it.
        values = {str(n): "null" if isinstance(v, float) and v != v else v for n, v in row.items()}
        yield f"tables/{table}.parquet: {text.format(**values)}"
    if len(rows) > LIMIT:
        yield f"tables/{table}.parquet: {len(rows) - LIMIT} more rows like the last"


def check_images(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """images = used + unused + rejected, each id once; used is what the groups use, rejected what `rejects` lists."""
    images, rejects, groups = frames["images"], frames["rejects"], frames["groups"]
    rejects = rejects[rejects["stage"] != ANNOTATION]
    for table, frame in (("images", images), ("rejects", rejects)):
        yield from _lines(table, frame, frame["image_id"].duplicated(), "{image_id}: listed twice")
    yield from _lines("images", images, ~images["status"].isin(STATUS), "{image_id}: unknown status {status!r}")
    listed = images["image_id"].isin(rejects["image_id"])
    rejected = images["status"] == "rejected"
    yield from _lines("images", images, rejected & ~listed, "{image_id}: rejected, but no row in rejects says why")
    yield from _lines("images", images, ~rejected & listed, "{image_id}: {status}, but rejects lists it")
    unknown = ~rejects["image_id"].isin(images["image_id"])
    yield from _lines("rejects", rejects, unknown, "{image_id}: not a photo of images")
    in_groups = images["image_id"].isin(pd.concat([groups["target_image"], groups["ref_image"]]))
    used = images["status"] == "used"
    yield from _lines("images", images, used & ~in_groups, "{image_id}: used, but no group uses it")
    yield from _lines("images", images, ~used & in_groups, "{image_id}: {status}, but a group uses it")


def check_pairs(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Candidates and pairs name known photos, once each; tiers and numbers are possible and fit the thresholds."""
    known = frames["images"]["image_id"]
    for table in ("candidates", "pairs"):
        frame = frames[table]
        strange = ~(frame["target_image"].isin(known) & frame["ref_image"].isin(known))
        yield from _lines(table, frame, strange, "{target_image} {ref_image}: names a photo that images lacks")
        own = frame["target_image"] == frame["ref_image"]
        yield from _lines(table, frame, own, "{target_image}: paired with itself")
        yield from _lines(table, frame, frame.duplicated(PAIR), "{target_image} {ref_image}: listed twice")
    pairs = frames["pairs"]
    possible = pairs["overlap"].between(0, 1) & (pairs["scale_ratio"] > 0) & (pairs["scale_ratio"] <= 1)
    # A published annotation gives a tier and no numbers: both are null then.
    possible |= pairs["overlap"].isna() & pairs["scale_ratio"].isna()
    impossible = "{target_image} {ref_image}: overlap {overlap} or scale ratio {scale_ratio} is impossible"
    yield from _lines("pairs", pairs, ~possible & pairs["tier"].notna(), impossible)
    strange = pairs["tier"].notna() & ~pairs["tier"].isin(list(Tier))
    yield from _lines("pairs", pairs, strange, "{target_image} {ref_image}: unknown tier {tier!r}")
    for tier, name in ((Tier.HIGH, "high"), (Tier.MEDIUM, "medium")):
        overlap, scale = recipe.get(f"{name}_overlap"), recipe.get(f"{name}_scale")
        if isinstance(overlap, float | int) and isinstance(scale, float | int):
            below = (pairs["overlap"] < overlap - ROUNDED) | (pairs["scale_ratio"] < scale - ROUNDED)
            text = f"{{target_image}} {{ref_image}}: tier {tier}, but overlap {{overlap}}, scale ratio {{scale_ratio}}"
            yield from _lines("pairs", pairs, below & (pairs["tier"] == tier), f"{text} miss its thresholds")


def check_embeddings(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Every used photo has an embedding, and every embedding a photo."""
    images, embeddings = frames["images"], frames["embeddings"]
    missing = (images["status"] == "used") & ~images["image_id"].isin(embeddings["image_id"])
    yield from _lines("embeddings", images, missing, "{image_id}: used, but it has no embedding")
    unknown = ~embeddings["image_id"].isin(images["image_id"])
    yield from _lines("embeddings", embeddings, unknown, "{image_id}: not a photo of images")
    twice = embeddings.duplicated(["image_id", "view"])
    yield from _lines("embeddings", embeddings, twice, "{image_id}: view {view} listed twice")


def check_groups(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Rows of a group agree; slots, photos, sizes and shards are what a group of this recipe can have."""
    groups = frames["groups"]
    counts = groups.groupby("group_id", sort=True)[OF_GROUP].nunique(dropna=False)
    for column in OF_GROUP:
        for group_id in counts.index[counts[column] > 1][:LIMIT]:
            yield f"tables/groups.parquet: {group_id}: its rows differ in {column}"
    yield from _lines("groups", groups, groups.duplicated(["group_id", "slot"]), "{group_id}: slot {slot} twice")
    twice = groups.duplicated(["group_id", "ref_image"]) | (groups["target_image"] == groups["ref_image"])
    yield from _lines("groups", groups, twice, "{group_id}: photo {ref_image} serves twice")
    yield from _lines("groups", groups, ~groups["split"].isin(list(Split)), "{group_id}: unknown split {split!r}")
    named = groups["slot"].str.fullmatch(SLOT)
    yield from _lines("groups", groups, ~named, "{group_id}: unknown slot {slot!r}")
    order = {str(tier): place for place, tier in enumerate(Tier)}
    # A reference may fill a slot below its tier, never one above it.
    above = groups["tier"].map(order).fillna(9) > groups["slot"].str[:1].map(order).fillna(9)
    yield from _lines("groups", groups, above, "{group_id}: tier {tier} can not fill slot {slot}")
    if isinstance(size := recipe.get("size"), int):
        yield from _lines("groups", groups, groups["size"] != size, f"{{group_id}}: size {{size}}, not {size}")
    wanted = [number for name in ("high", "medium", "low") if isinstance(number := recipe.get(name), int)]
    if not recipe.get("allow_partial") and len(wanted) == 3:
        held = groups.groupby("group_id").agg(number=("slot", "size")).reset_index()
        text = f"{{group_id}}: {{number}} references, the recipe says {sum(wanted)}"
        yield from _lines("groups", held, held["number"] != sum(wanted), text)


def check_crops(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Every photo of a group is in images, and every crop lies inside its photo."""
    photos = frames["images"].drop_duplicates("image_id").set_index("image_id")[["width", "height"]]
    for role in ("target", "ref"):
        rows = frames["groups"].join(photos, on=f"{role}_image")
        right, bottom = rows[f"{role}_x"] + rows["size"], rows[f"{role}_y"] + rows["size"]
        unknown = f"{{group_id}}: {{{role}_image}} is not a photo of images"
        yield from _lines("groups", rows, rows["width"].isna(), unknown)
        inside = (rows[f"{role}_x"] >= 0) & (rows[f"{role}_y"] >= 0)
        inside &= (right <= rows["width"]) & (bottom <= rows["height"])
        outside = ~inside & rows["width"].notna()
        if role == "target":
            outside &= ~rows["group_id"].duplicated()
        text = f"{{group_id}}: the crop of {{{role}_image}} at ({{{role}_x}}, {{{role}_y}}) leaves its photo"
        yield from _lines("groups", rows, outside, text)


def check_tiers(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """Tier and numbers of every reference are those of its pair."""
    pairs = frames["pairs"].drop_duplicates(PAIR)[[*PAIR, *OF_PAIR]]
    rows = frames["groups"].merge(pairs, on=PAIR, how="left", suffixes=("", "_pair"), indicator="found")
    missing = rows["found"] == "left_only"
    yield from _lines("groups", rows, missing, "{group_id}: slot {slot}: {target_image} {ref_image} is not in pairs")
    for column in OF_PAIR:
        here, there = rows[column], rows[f"{column}_pair"]
        differs = ~missing & (here != there) & ~(here.isna() & there.isna())
        text = f"{{group_id}}: slot {{slot}}: {column} {{{column}}}, pairs says {{{column}_pair}} for {{ref_image}}"
        yield from _lines("groups", rows, differs, text)


def check_splits(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """No scene and no photo is in two splits, no photo in two scenes."""
    groups = frames["groups"]
    roles = [
        groups[["split", "scene", f"{role}_image"]].rename(columns={f"{role}_image": "photo"})
        for role in ("target", "ref")
    ]
    rows = pd.concat(roles).drop_duplicates()
    for what, where in (("scene", "split"), ("photo", "split"), ("photo", "scene")):
        found = (
            rows[[what, where]].drop_duplicates().groupby(what, sort=True)[where].agg(lambda v: ", ".join(sorted(v)))
        )
        shared = found[found.str.contains(", ", regex=False)]
        for name, places in shared.head(LIMIT).items():
            yield f"tables/groups.parquet: {what} {name} is in more than one {where}: {places}"
        if len(shared) > LIMIT:
            yield f"tables/groups.parquet: {len(shared) - LIMIT} more {what}s in more than one {where}"


def check_shards(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """The shards table and the groups table name the same shards, splits and numbers of samples."""
    shards, groups = frames["shards"], frames["groups"]
    yield from _lines("shards", shards, shards["shard"].duplicated(), "{shard}: listed twice")
    held = groups.drop_duplicates("group_id").groupby("shard").agg(groups=("group_id", "size"), of=("split", "first"))
    rows = shards.join(held, on="shard").fillna({"groups": 0})
    different = rows["samples"] != rows["groups"]
    yield from _lines("shards", rows, different, "{shard}: {samples} samples, but the groups table has {groups:.0f}")
    mixed = rows["of"].notna() & (rows["split"] != rows["of"])
    yield from _lines("shards", rows, mixed, "{shard}: split {split}, but its groups are {of}")
    strange = ~groups["shard"].isin(shards["shard"]) & ~groups["group_id"].duplicated()
    yield from _lines("groups", groups, strange, "{group_id}: shard {shard} is not in the shards table")


def check_samples(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """The samples table lists every group once, in its shard, split and scene, at a range inside that shard."""
    samples, groups = frames["samples"], frames["groups"].drop_duplicates("group_id")
    yield from _lines("samples", samples, samples["group_id"].duplicated(), "{group_id}: listed twice")
    unknown = ~samples["group_id"].isin(groups["group_id"])
    yield from _lines("samples", samples, unknown, "{group_id}: not in the groups table")
    missing = ~groups["group_id"].isin(samples["group_id"])
    yield from _lines("groups", groups, missing, "{group_id}: not in the samples table")
    columns = ["shard", "split", "scene"]
    rows = samples.join(groups.set_index("group_id")[columns].add_suffix("_group"), on="group_id")
    for column in columns:
        differs = ~unknown & (rows[column] != rows[f"{column}_group"])
        text = f"{{group_id}}: {column} {{{column}}}, the groups table says {{{column}_group}}"
        yield from _lines("samples", rows, differs, text)
    room = samples["shard"].map(frames["shards"].drop_duplicates("shard").set_index("shard")["bytes"])
    outside = (samples["offset"] < 0) | (samples["bytes"] <= 0) | (samples["offset"] + samples["bytes"] > room)
    yield from _lines("samples", samples, outside, "{group_id}: bytes {offset} + {bytes} leave {shard}")


# Each check with the tables it needs: a damaged table takes only its own checks away.
CHECKS = (
    (check_images, ("images", "rejects", "groups")),
    (check_pairs, ("images", "candidates", "pairs")),
    (check_embeddings, ("images", "embeddings")),
    (check_groups, ("groups",)),
    (check_crops, ("images", "groups")),
    (check_tiers, ("pairs", "groups")),
    (check_splits, ("groups",)),
    (check_shards, ("groups", "shards")),
    (check_samples, ("samples", "groups", "shards")),
)


def cross_check(frames: Frames, recipe: Mapping[str, Any]) -> Iterator[str]:
    """All problems between the tables that could be read; `recipe` is that of dataset.json, {} if it is lost."""
    for check, needed in CHECKS:
        if all(name in frames for name in needed):
            yield from check(frames, recipe)


def counts_of(frames: Frames) -> dict[str, Any]:
    """The counts that dataset.json gives, from the tables: photos, rejects, groups, references, scenes."""
    counts: dict[str, Any] = {}
    if "images" in frames:
        status = frames["images"]["status"].value_counts()
        found = {"found": len(frames["images"])}
        counts["photos"] = found | {name: int(status.get(name, 0)) for name in ("used", "unused", "rejected")}
    if "rejects" in frames:
        reasons = frames["rejects"]["stage"] + ": " + frames["rejects"]["reason"]
        counts["rejects"] = _sorted_counts(reasons)
    if "groups" in frames:
        groups = frames["groups"]
        per_split = groups.drop_duplicates("group_id")["split"].value_counts()
        counts["groups"] = {str(split): int(per_split.get(str(split), 0)) for split in Split}
        counts["references"] = _sorted_counts(groups["slot"].str[:1] + " slot, " + groups["tier"] + " pair")
        counts["scenes"] = int(groups["scene"].nunique())
    return counts


def _sorted_counts(values: pd.Series) -> dict[str, int]:
    return {str(name): int(number) for name, number in values.value_counts().sort_index().items()}
