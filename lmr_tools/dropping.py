"""The tables of a dataset without some of its photos: groups that used one leave, everything else stays as it is.

Nothing is measured or drawn again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lmr_tools.schema import ImageRow, RejectRow, Split, arrow_schema

Tables = Mapping[str, pa.Table]
NO_GROUP = "its groups used a photo that was taken out"


def drop_photos(tables: Tables, gone: Mapping[str, RejectRow], *, allow_partial: bool) -> dict[str, pa.Table]:
    """`tables` without the photos of `gone` (by image id), whose rows become rejects.

    A group that used one is dropped; with `allow_partial` it only loses the reference, unless it was the target or the
    last one. Shards are numbered anew where one became empty (`groups` alone says so: the tars are not touched).
    """
    names = pa.array(sorted(gone), pa.string())

    def names_one(table: pa.Table, *columns: str) -> Any:
        mask = pc.is_in(table[columns[0]], value_set=names)
        for column in columns[1:]:
            mask = pc.or_(mask, pc.is_in(table[column], value_set=names))
        return mask

    groups = tables["groups"]
    touched = names_one(groups, "target_image", "ref_image")
    if not allow_partial:
        touched = pc.is_in(groups["group_id"], value_set=pc.unique(groups.filter(touched)["group_id"]))
    kept = groups.filter(pc.invert(touched))
    return with_groups(
        {
            **tables,
            "candidates": tables["candidates"].filter(
                pc.invert(names_one(tables["candidates"], "target_image", "ref_image"))
            ),
            "pairs": tables["pairs"].filter(pc.invert(names_one(tables["pairs"], "target_image", "ref_image"))),
            "embeddings": tables["embeddings"].filter(pc.invert(names_one(tables["embeddings"], "image_id"))),
        },
        renumbered(kept),
        gone,
        reason=NO_GROUP,
    )


def with_groups(tables: Tables, groups: pa.Table, gone: Mapping[str, RejectRow], *, reason: str) -> dict[str, pa.Table]:
    """`tables` with these `groups`: the status of every photo follows, `gone` photos are rejects.

    `reason` stands as `no_target` where a photo's last group as a target went.
    """
    images, rejects = tables["images"], tables["rejects"]
    targets, references = set(groups["target_image"].to_pylist()), set(groups["ref_image"].to_pylist())
    status, no_target = images["status"].to_pylist(), images["no_target"].to_pylist()
    for place, name in enumerate(images["image_id"].to_pylist()):
        if name in gone:
            status[place], no_target[place] = "rejected", None
        elif status[place] != "rejected":
            status[place] = "used" if name in targets or name in references else "unused"
            no_target[place] = None if name in targets else no_target[place] or reason
    columns = {name: images[name] for name in images.column_names} | {"status": status, "no_target": no_target}
    # A photo that was a reject before is one for the new reason.
    old = rejects.filter(pc.invert(pc.is_in(rejects["image_id"], value_set=pa.array(sorted(gone), pa.string()))))
    schema = arrow_schema(RejectRow)
    fresh = {name: [getattr(row, name) for row in gone.values()] for name in schema.names}
    return {
        **tables,
        "images": pa.table(columns, schema=arrow_schema(ImageRow)),
        "rejects": pa.concat_tables([old.select(schema.names).cast(schema), pa.table(fresh, schema=schema)]),
        "groups": groups,
    }


def renumbered(groups: pa.Table) -> pa.Table:
    """`groups` whose shards are numbered without gaps, in the order in which they come."""
    new_names = shard_names(dict(zip(groups["shard"].to_pylist(), groups["split"].to_pylist(), strict=True)))
    shards = pa.array([new_names[name] for name in groups["shard"].to_pylist()], pa.string())
    return groups.set_column(groups.column_names.index("shard"), groups.schema.field("shard"), shards)


def shard_names(split_of: Mapping[str, str]) -> dict[str, str]:
    """A new name for every shard, by split: train-000000.tar and so on, in order."""
    numbers: Counter[str] = Counter()
    names = {}
    for split in Split:
        for shard, own in split_of.items():
            if own == split:
                names[shard] = f"{split}-{numbers[split]:06d}.tar"
                numbers[split] += 1
    return names
