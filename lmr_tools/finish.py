"""The last stage of the build: tables, card, pictures and manifest of a dataset whose shards are written.

Joins what every other stage made; nothing is decided here. Imports what it writes with (`assembly`,
`card`, `dataset`, `shards`) and what it writes (`embed`, `grading`, `groups`, `index`, `removal`,
`scan`, `sharding`, `vectors`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lmr_tools.assembly import draw_previews
from lmr_tools.card import write_card
from lmr_tools.dataset import finish, manifest_of, table_path
from lmr_tools.embed import Embedder
from lmr_tools.grading import Corpus, candidate_rows, pair_rows
from lmr_tools.groups import Plan
from lmr_tools.index import Mined
from lmr_tools.removal import Removed, as_json
from lmr_tools.scan import Scan
from lmr_tools.schema import (
    CandidateRow,
    GroupRow,
    ImageRow,
    LmrError,
    PairRow,
    RejectRow,
    SampleRow,
    ShardRow,
    Split,
)
from lmr_tools.sharding import ShardPlan, group_rows
from lmr_tools.shards import WrittenShard
from lmr_tools.tables import write_rows, write_tables
from lmr_tools.vectors import embedding_tables


@dataclass(frozen=True, kw_only=True)
class Built:
    """Everything the stages of a build made, by the names the flow gives it."""

    recipe: dict[str, Any]
    sources: Sequence[str]
    embedder: Embedder
    found: Scan
    rejects: Sequence[RejectRow]
    removed: Sequence[Removed]
    mined: Mined
    corpus: Corpus
    plans: Sequence[Plan]
    shards: Sequence[ShardPlan]
    written: Sequence[WrittenShard]
    reconstruction: Mapping[str, Any] | None = None


def write_dataset(out: Path, built: Built) -> dict[str, Any]:
    """Write tables, card, pictures and, last, dataset.json; returns the manifest.

    LmrError when there is no group: the tables, which say why, are there then, but no manifest.
    """
    duplicates = {plan.target_image: plan.duplicates for plan in built.plans if plan.duplicates}
    images = list(_image_rows(built))
    rows = {
        "images": write_rows(table_path(out, "images"), images, ImageRow),
        "rejects": write_rows(table_path(out, "rejects"), built.rejects, RejectRow),
        "candidates": write_rows(table_path(out, "candidates"), candidate_rows(built.corpus), CandidateRow),
        "pairs": write_rows(
            table_path(out, "pairs"), (row for part in pair_rows(built.corpus, duplicates) for row in part), PairRow
        ),
        "groups": write_rows(table_path(out, "groups"), group_rows(built.shards), GroupRow),
        "shards": write_rows(table_path(out, "shards"), [shard.row for shard in built.written], ShardRow),
        "samples": write_rows(
            table_path(out, "samples"), (row for shard in built.written for row in shard.samples), SampleRow
        ),
    }
    assert built.corpus.vectors is not None  # a build embeds
    rows["embeddings"] = write_tables(
        table_path(out, "embeddings"), embedding_tables(built.corpus.rows, built.corpus.vectors)
    )
    if not built.written:
        raise LmrError(f"{out}: no group could be made; {_why_none(built)}")
    manifest = manifest_of(
        out,
        recipe=built.recipe,
        sources=built.sources,
        embedder={
            "model": built.embedder.name,
            "key": built.embedder.key,
            "dimension": built.embedder.dimension,
            "views": built.embedder.views,
        },
        index={"kind": built.mined.kind, "k": built.recipe["candidates"], "recall": built.mined.recall},
        counts=_counts(built, images),
        rows=rows,
        more={"removed": as_json(built.removed), "geometry": built.reconstruction},
    )
    write_card(out, manifest)
    draw_previews(out)
    finish(out, manifest)
    return manifest


def _image_rows(built: Built) -> Iterator[ImageRow]:
    rejected = {row.image_id for row in built.rejects}
    used = {plan.target_image for plan in built.plans if plan.groups}
    used |= {r.image_id for plan in built.plans for group in plan.groups for r in group.references}
    no_target = {plan.target_image: plan.reason for plan in built.plans if not plan.groups}
    for row in (*built.found.photos, *built.found.refused):
        status = "rejected" if row.image_id in rejected else "used" if row.image_id in used else "unused"
        yield replace(row, status=status, no_target=no_target.get(row.image_id))


def _counts(built: Built, images: Sequence[ImageRow]) -> dict[str, Any]:
    status = Counter(row.status for row in images)
    groups = Counter({str(split): 0 for split in Split})
    slots: Counter[str] = Counter()
    for shard in built.shards:
        groups[str(shard.split)] += len(shard.groups)
        slots.update(f"{r.slot[0]} slot, {r.tier} pair" for g in shard.groups for r in g.plan.references)
    return {
        "photos": {"found": len(images), **{name: status[name] for name in ("used", "unused", "rejected")}},
        "other_files": built.found.other_files,
        "rejects": dict(sorted(Counter(f"{row.stage}: {row.reason}" for row in built.rejects).items())),
        "groups": dict(groups),
        "references": dict(sorted(slots.items())),
        "scenes": len({group.scene for shard in built.shards for group in shard.groups}),
    }


def _why_none(built: Built) -> str:
    reason, count = Counter(plan.reason for plan in built.plans).most_common(1)[0]
    return (
        f"for {count} of {len(built.plans)} photos: {reason} (see tables/pairs.parquet); add photos of the same "
        "places, or use --allow-partial or a smaller --size"
    )
