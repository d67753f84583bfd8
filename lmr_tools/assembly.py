"""From tables and shards as they lie in a folder to a whole dataset: counts, card, pictures, manifest.

For datasets that no build made: rebuilt, imported, merged. Imports what it writes with (`card`, `dataset`, `preview`,
`shards`), `consistency`, which counts, and `sources`, which knows a dataset when it meets one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from lmr_tools.card import write_card
from lmr_tools.consistency import counts_of
from lmr_tools.dataset import MADE_BY, MANIFEST, TABLES, claim, finish, manifest_of, table_path, work_folder
from lmr_tools.preview import contact_sheet, tier_histograms
from lmr_tools.schema import LmrError, PairRow, SampleRow, ShardRow, Split, embedding_schema
from lmr_tools.shards import WrittenShard, read_shard
from lmr_tools.sources import DATASET_MARKER
from lmr_tools.tables import iter_rows, read_json, read_rows, read_table, write_json, write_rows, write_table

PREVIEWED = 12
# What a dataset without vectors says of them.
NO_EMBEDDER: Mapping[str, Any] = {"model": None, "key": None, "dimension": None, "views": None}
NO_INDEX: Mapping[str, Any] = {"kind": None, "k": None, "recall": None}


@contextmanager
def claim_new(out: Path, made_by: Mapping[str, Any]) -> Iterator[None]:
    """Take a new or empty folder for a dataset, or one that the same command left unfinished; LmrError otherwise.

    `made_by` says which command with which inputs writes: what another one left is not touched.
    """
    receipt = work_folder(out) / MADE_BY
    if (out / MANIFEST).exists():
        raise LmrError(f"{out}: holds a dataset already; name a new folder")
    if (out / DATASET_MARKER).exists() and (read_json(receipt) != made_by if receipt.is_file() else _holds_work(out)):
        raise LmrError(f"{out}: holds an unfinished dataset of another command or other inputs; name a new folder")
    with claim(out):
        write_json(receipt, made_by)
        yield


def _holds_work(out: Path) -> bool:
    """Whether a claimed folder holds anything yet; a full disk or a kill may have come before its receipt."""
    return any(path.is_file() and path.name != DATASET_MARKER and path.suffix != ".tmp" for path in out.rglob("*"))


def refuse_others(out: Path) -> None:
    """LmrError when another command than a build made, or is making, the dataset in `out`: a build would replace it."""
    receipt = work_folder(out) / MADE_BY
    if receipt.is_file():
        command = read_json(receipt).get("command")
        raise LmrError(f"{out}: was made by lmr {command}; a build would replace it, name another folder")


def draw_previews(out: Path) -> None:
    """The contact sheet of each split and the histograms of the tiers, from the shards and the `pairs` table."""
    folder = out / "preview"
    shards = read_rows(table_path(out, "shards"), ShardRow)
    for split in Split:
        sheet = folder / f"{split}.jpg"
        sheet.unlink(missing_ok=True)
        first = next((row for row in shards if row.split == split), None)
        if first is not None:
            contact_sheet(list(islice(read_shard(out / "shards" / first.shard, first), PREVIEWED)), sheet)
    tier_histograms(iter_rows(table_path(out, "pairs"), PairRow), folder / "tiers.png")


def write_shard_tables(out: Path, written: Sequence[WrittenShard]) -> None:
    """The tables `shards` and `samples` of shards as they were written."""
    write_rows(table_path(out, "shards"), [shard.row for shard in written], ShardRow)
    write_rows(table_path(out, "samples"), (row for shard in written for row in shard.samples), SampleRow)


def renamed(shard: WrittenShard, name: str) -> WrittenShard:
    """The same tar under another name."""
    samples = tuple(replace(row, shard=name) for row in shard.samples)
    return WrittenShard(row=replace(shard.row, shard=name), samples=samples)


def no_embeddings(out: Path) -> None:
    """Write the empty `embeddings` table of a dataset without vectors."""
    write_table(table_path(out, "embeddings"), pa.table(embedding_schema(1).empty_table()))


def complete(
    out: Path,
    *,
    recipe: Mapping[str, Any],
    sources: Sequence[str],
    embedder: Mapping[str, Any],
    index: Mapping[str, Any],
    counts: Mapping[str, Any],
    more: Mapping[str, Any],
) -> dict[str, Any]:
    """Write card, pictures and, last, dataset.json for the TABLES and shards in `out`; returns the manifest.

    `counts` holds what the tables do not tell (other_files, annotations); `more` is `manifest_of`'s.
    """
    frames = {name: read_table(table_path(out, name)).to_pandas() for name in ("images", "rejects", "groups")}
    rows = {name: read_table(table_path(out, name), []).num_rows for name in TABLES}
    manifest = manifest_of(
        out,
        recipe=recipe,
        sources=sources,
        embedder=embedder,
        index=index,
        counts=counts_of(frames) | dict(counts),
        rows=rows,
        more=more,
    )
    write_card(out, manifest)
    draw_previews(out)
    finish(out, manifest)
    return manifest
