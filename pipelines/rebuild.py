"""`lmr rebuild`: a dataset again from its tables and the source photos alone, with the same bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from .progress import note, track

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow as pa

    from lmr_tools.locate import Lost
    from lmr_tools.rebuild import Published
    from lmr_tools.removal import Removed
    from lmr_tools.schema import RejectRow
    from lmr_tools.shards import WrittenShard

FAILED_ITEMS = 3
NOT_EQUAL = 4
SHOWN = 20


@click.command()
@click.argument("dataset", type=click.Path(exists=True, path_type=Path))
@click.option("--source", "sources", multiple=True, required=True, metavar="SOURCE", help="Where the photos are now.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the rebuilt dataset.")
@click.option("--remove", type=click.Path(path_type=Path), metavar="LIST", help="Leave these photos out (and keep so).")
@click.option("--drop-missing", is_flag=True, help="Leave groups out whose photos can not be found; exit code 3.")
@click.option("--other-bytes", is_flag=True, help="Accept shards whose bytes differ from the published ones.")
@click.option("--workers", type=click.IntRange(1), help="Processes; the result does not depend on it.  [all cores]")
@click.pass_context
def rebuild(
    ctx: click.Context,
    dataset: Path,
    sources: tuple[str, ...],
    out: Path,
    remove: Path | None,
    drop_missing: bool,
    other_bytes: bool,
    workers: int | None,
) -> None:
    """Make DATASET again in a new folder from its tables and the source photos: the same shards, byte for byte.

    DATASET is a dataset's folder or its dataset.json; needed are dataset.json and tables/ beside it, no shards. A
    SOURCE is what build-dataset takes. Photos are found by content, so they may have been moved or renamed; one that
    is missing or has changed is named. Run the same command again after a stop.

    Exit code: 0 when all is there and equal, 3 when groups were left out for missing photos, 4 when bytes differ.
    """
    from lmr_tools.assembly import claim_new
    from lmr_tools.rebuild import read_published
    from lmr_tools.removal import gather
    from lmr_tools.tables import fingerprint, sha256_file
    from lmr_tools.workers import default_workers

    published = read_published(dataset)
    removed = gather([published], remove)
    made_by = {
        "command": "rebuild",
        "of": sha256_file(published.folder / "dataset.json"),
        "removed": fingerprint([entry.sha256 for entry in removed]),
    }
    with claim_new(out, made_by):
        outcome = run(
            published,
            sources,
            out,
            removed,
            drop_missing=drop_missing,
            other_bytes=other_bytes,
            workers=workers or default_workers(),
        )
    click.echo(outcome.text)
    if outcome.different and not other_bytes:
        ctx.exit(NOT_EQUAL)
    if outcome.lost:
        ctx.exit(FAILED_ITEMS)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a rebuild gave: photos missing, shards with other bytes, and a line that says it."""

    lost: int
    different: int
    text: str


def run(
    published: Published,
    given: tuple[str, ...],
    out: Path,
    removed: Sequence[Removed],
    *,
    drop_missing: bool = False,
    other_bytes: bool = False,
    workers: int = 1,
) -> Outcome:
    """The flow. LmrError when a photo is missing, unless `drop_missing`; unequal bytes leave the dataset unfinished."""
    from lmr_tools import dataset
    from lmr_tools.dropping import drop_photos
    from lmr_tools.locate import locate
    from lmr_tools.rebuild import image_rows, other_versions, plans_of, unlike, used_photos
    from lmr_tools.removal import as_json, newly_removed
    from lmr_tools.schema import GroupRow, LmrError, RejectRow
    from lmr_tools.sharding import build_shards
    from lmr_tools.sources import parse_source
    from lmr_tools.stores import CountingMapper
    from lmr_tools.tables import rows_of
    from lmr_tools.workers import ProcessMapper

    work = dataset.work_folder(out)
    sources = [parse_source(text) for text in given]
    partial = bool(published.recipe.get("allow_partial"))
    tables = dict(published.tables)
    images = image_rows(tables)
    # 1. What the removal list names leaves first: its photos need not be there.
    gone = newly_removed(list(images.values()), rows_of(tables["rejects"], RejectRow), removed, published.recipe)
    if gone:
        tables = drop_photos(tables, gone, allow_partial=partial)
    with ProcessMapper(workers) as running:
        mapper = CountingMapper(running)
        # 2. Find every photo that a group needs.
        located = locate(used_photos(tables, images), sources, work, mapper, track)
        lost = _reject_lost(located.lost)
        if lost and not drop_missing:
            first = located.lost[0]
            raise LmrError(
                f"{' '.join(source.given for source in sources)}: {len(lost)} photos that the groups need are not "
                f"there (first: {first.row.path}, {first.reason}); name more --source, or leave their groups out with "
                "--drop-missing"
            )
        if lost:
            tables = drop_photos(tables, lost, allow_partial=partial)
        if not tables["groups"].num_rows:
            raise LmrError(f"{out}: no group is left; {len(gone)} photos were removed, {len(lost)} are missing")
        # 3. Cut them as the tables say.
        plans = plans_of(rows_of(tables["groups"], GroupRow), images, located.places)
        written = list(track(build_shards(plans, sources, out / "shards", work, mapper), len(plans), "shards"))
    if any(source.remote for source in sources):
        note(f"sources    {mapper.made_again} calls made again")
    different = unlike(published, tables["groups"], written)
    if different and not other_bytes:
        text = (
            f"{out / 'shards' / different[0]}: {len(different)} of {len(written)} shards are not byte-identical to the "
            f"published ones ({other_versions(published.manifest) or 'though all versions agree'}); install those "
            "versions, or keep the new bytes with --other-bytes"
        )
        return Outcome(lost=len(lost), different=len(different), text=text)
    # 4. The tables are the published ones, unless photos left or bytes differ.
    if gone or lost or different or as_json(removed) != published.more.get("removed", []):
        _finish_changed(published, out, tables, written, removed, len(lost))
    else:
        _finish_same(published, out)
    groups = len(set(tables["groups"]["group_id"].to_pylist()))
    text = (
        f"{out}: {groups} groups, {len(written) - len(different)} of {len(written)} shards as published or as they "
        f"follow from it; {len(gone)} photos removed, {len(lost)} missing"
    )
    return Outcome(lost=len(lost), different=len(different), text=text)


def _reject_lost(lost: Sequence[Lost]) -> dict[str, RejectRow]:
    """The missing photos as rejects, each named on stderr (the first twenty; then how many more)."""
    from lmr_tools.dedup import reject

    for item in lost[:SHOWN]:
        note(f"{item.row.path}: {item.reason} ({item.detail})")
    if len(lost) > SHOWN:
        note(f"and {len(lost) - SHOWN} more photos")
    return {item.row.image_id: reject(item.row, "rebuild", item.reason, item.detail) for item in lost}


def _finish_changed(
    published: Published,
    out: Path,
    tables: Mapping[str, pa.Table],
    written: Sequence[WrittenShard],
    removed: Sequence[Removed],
    lost: int,
) -> None:
    from lmr_tools.assembly import complete, write_shard_tables
    from lmr_tools.dataset import table_path
    from lmr_tools.removal import as_json, record
    from lmr_tools.tables import sha256_file, write_table

    for name, table in tables.items():
        write_table(table_path(out, name), table)
    write_shard_tables(out, written)
    record(out, removed)
    manifest, kept = published.manifest, ("other_files", "annotations")
    origin = {
        "manifest_sha256": sha256_file(published.folder / "dataset.json"),
        "versions": manifest["versions"],
        "groups": sum(manifest["counts"]["groups"].values()),
        "missing_photos": lost,
    }
    complete(
        out,
        recipe=published.recipe,
        sources=manifest["sources"],
        embedder=manifest["embedder"],
        index=manifest["index"],
        counts={name: value for name, value in manifest["counts"].items() if name in kept},
        more=published.more | {"removed": as_json(removed), "rebuilt": origin},
    )


def _finish_same(published: Published, out: Path) -> None:
    """Tables and manifest as published, byte for byte; card and pictures follow from them."""
    from lmr_tools.assembly import draw_previews
    from lmr_tools.card import write_card
    from lmr_tools.dataset import MANIFEST, TABLES, table_path
    from lmr_tools.removal import record, recorded
    from lmr_tools.tables import write_bytes

    for name in TABLES:
        write_bytes(table_path(out, name), table_path(published.folder, name).read_bytes())
    record(out, recorded(published.folder))
    write_card(out, published.manifest)
    draw_previews(out)
    write_bytes(out / MANIFEST, (published.folder / MANIFEST).read_bytes())
