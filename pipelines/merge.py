"""`lmr merge`: several datasets as one, without a photo read or a crop cut again."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .progress import note, track

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lmr_tools.rebuild import Published
    from lmr_tools.removal import Removed


@click.command()
@click.argument("dataset", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the merged dataset.")
@click.option("--remove", type=click.Path(path_type=Path), metavar="LIST", help="Leave these photos out (and keep so).")
@click.option("--workers", type=click.IntRange(1), help="Processes; the result does not depend on it.  [all cores]")
def merge(dataset: tuple[Path, ...], out: Path, remove: Path | None, workers: int | None) -> None:
    """Merge DATASET... into a new one. With --remove, one dataset is enough: photos leave without any source photo.

    Splits stay as they are and share no place: where one dataset holds out a place (test, val), groups that another
    one has of it in a less held-out split are left out. Places are one when they share a photo or a near copy. Photos
    and groups that are in two datasets are taken once, from the first. Shards that need no change are copied as they
    are. What was left out is printed and stands in dataset.json.
    """
    from lmr_tools.assembly import claim_new
    from lmr_tools.merging import check_parts
    from lmr_tools.rebuild import read_published
    from lmr_tools.removal import gather
    from lmr_tools.tables import fingerprint, sha256_file
    from lmr_tools.workers import default_workers

    if len(dataset) < 2 and not remove:
        raise click.UsageError("name two datasets or more, or one and --remove LIST")
    published = [read_published(path) for path in dataset]
    check_parts(published)
    removed = gather(published, remove)
    made_by = {
        "command": "merge",
        "of": [sha256_file(part.folder / "dataset.json") for part in published],
        "removed": fingerprint([entry.sha256 for entry in removed]),
    }
    with claim_new(out, made_by):
        manifest = run(published, out, removed, workers=workers or default_workers())
    counts = manifest["counts"]["groups"]
    click.echo(
        f"{out}: {sum(counts.values())} groups ({', '.join(f'{n} {split}' for split, n in counts.items())}) of "
        f"{len(published)} datasets"
    )
    for reason, number in manifest["merged"]["left_out"].items():
        note(f"left out: {number} groups of {reason}")


def run(published: Sequence[Published], out: Path, removed: Sequence[Removed], *, workers: int = 1) -> dict[str, Any]:
    """The flow; returns the manifest. LmrError when no group stays."""
    from functools import partial

    import pyarrow as pa

    from lmr_tools import dataset, merging
    from lmr_tools.assembly import NO_INDEX, complete, no_embeddings, write_shard_tables
    from lmr_tools.dropping import drop_photos, with_groups
    from lmr_tools.removal import as_json, newly_removed, record
    from lmr_tools.schema import GroupRow, ImageRow, LmrError, RejectRow, arrow_schema
    from lmr_tools.tables import rows_of, sha256_file, write_table
    from lmr_tools.transplant import graft
    from lmr_tools.workers import ProcessMapper

    bits = merging.near_bits(published)
    parts = []
    for one in published:
        # 1. What must stay out leaves each dataset first.
        rows, rejects = rows_of(one.tables["images"], ImageRow), rows_of(one.tables["rejects"], RejectRow)
        gone = newly_removed(rows, rejects, removed, {"near_hash_bits": bits})
        keep_partial = bool(one.recipe.get("allow_partial"))
        tables = drop_photos(one.tables, gone, allow_partial=keep_partial) if gone else one.tables
        parts.append(merging.Part(published=one, tables=tables))
    # 2. Which photos, places and groups there are, and from which tar each group comes.
    merged = merging.merge_parts(parts, max_bits=bits)
    if not merged.groups:
        raise LmrError(f"{out}: no group is left to merge; {len(removed)} photos must stay out")
    plans = merging.grafts(parts, merged)
    # 3. The tars: copied, or packed anew with the same pictures.
    wanted = {plan.name for plan in plans}
    for path in sorted((out / "shards").glob("*.tar")):
        if path.name not in wanted:
            path.unlink()
    with ProcessMapper(workers) as mapper:
        task = partial(graft, folder=out / "shards", work=dataset.work_folder(out) / "shards")
        written = list(track(mapper(task, plans), len(plans), "shards"))
    # 4. The tables.
    rows_out = [row for group in merged.groups for row in group.rows]
    joined = {
        name: pa.table(
            {column: [getattr(row, column) for row in rows] for column in arrow_schema(kind).names},
            schema=arrow_schema(kind),
        )
        for name, rows, kind in (
            ("images", merged.images, ImageRow),
            ("rejects", merged.rejects, RejectRow),
            ("groups", rows_out, GroupRow),
        )
    }
    joined |= merging.pair_tables(parts, merged)
    joined = with_groups(joined, joined["groups"], {}, reason="its groups were left out of the merge")
    vectors, embedder = merging.embeddings(parts)
    for name, table in joined.items():
        write_table(dataset.table_path(out, name), table)
    if vectors is None:
        no_embeddings(out)
    else:
        write_table(dataset.table_path(out, "embeddings"), vectors)
    write_shard_tables(out, written)
    record(out, removed)
    known = [one.manifest["counts"] for one in published]
    lines = [counts["annotations"] for counts in known if "annotations" in counts]
    counts = {"other_files": sum(counts.get("other_files", 0) for counts in known)}
    return complete(
        out,
        recipe=merging.common_recipe(published),
        sources=[source for one in published for source in one.manifest["sources"]],
        embedder=embedder,
        index=NO_INDEX,
        counts=counts | ({"annotations": {name: sum(c[name] for c in lines) for name in lines[0]}} if lines else {}),
        more={
            "removed": as_json(removed),
            "merged": {
                "parts": [
                    merging.origin(part, number, merged, sha256_file(part.published.folder / "dataset.json"))
                    for number, part in enumerate(parts)
                ],
                "left_out": merged.left_out,
                "near_copies": merged.close,
                "shards_copied": sum(plan.whole for plan in plans),
            },
        },
    )
