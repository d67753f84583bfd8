"""`lmr import-lmr`: the published annotation of LMR and its photos become a dataset like any other."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import click

from .import_lmr_test import run as run_test_set
from .progress import note, track

FAILED_ITEMS = 3


@click.command("import-lmr")
@click.argument("annotation", type=click.Path(exists=True, path_type=Path))
@click.argument("root", required=False)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the dataset.")
@click.option("--size", type=click.IntRange(32, 4096), default=300, show_default=True, help="Side of the crops.")
@click.option("--test-scene", "test_scenes", multiple=True, metavar="SCENE", help="Test scenes.  [the paper's 19]")
@click.option("--val-share", type=click.FloatRange(0, 0.5), default=0.0, show_default=True, help="Groups for val.")
@click.option(
    "--crops-per-pair", type=click.IntRange(1), default=1, show_default=True, help="Groups of a line or folder."
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of val scenes and order.")
@click.option(
    "--shard-samples", type=click.IntRange(1), default=500, show_default=True, help="Groups per tar, at most."
)
@click.option("--workers", type=click.IntRange(1), help="Processes; the result does not depend on it.  [all cores]")
@click.pass_context
def import_lmr(
    ctx: click.Context,
    /,
    annotation: Path,
    root: str | None,
    out: Path,
    test_scenes: tuple[str, ...],
    workers: int | None,
    **options: Any,
) -> None:
    """Turn the published ANNOTATION (CSV) and the photos in ROOT/<scene>/<name>, or the test set, into a dataset.

    The CSV has 13 columns (target,H,M1,M2,L1,L2,p0..p5,scene) or, for single references, 6 (target,reference,scene,
    sim,pA,pB). Slots and tiers are kept as published; overlap and scale are unknown and stay empty. Every line becomes
    a group or a row of rejects that says why not. --crops-per-pair does not count for 13 columns.

    Without ROOT, ANNOTATION is the folder of the test set, <scene>_<target file>/ with a target and its references:
    its groups keep their photos, all in split test; overlap, scale, tiers and crops are measured.

    Exit code: 0 when every line (or folder) was used, 3 when some were rejected.
    """
    from lmr_tools.annotations import TEST_SCENES
    from lmr_tools.assembly import claim_new
    from lmr_tools.sources import parse_source
    from lmr_tools.tables import sha256_file
    from lmr_tools.workers import default_workers

    workers = workers or default_workers()
    if annotation.is_dir():
        if root or test_scenes or options["val_share"]:
            raise click.UsageError(f"{annotation} is a folder, so the test set: no ROOT, --test-scene, --val-share")
        test_set = {"command": "import-lmr", "test_set": str(annotation.absolute()), **options}
        with claim_new(out, test_set):
            manifest = run_test_set(annotation, out, options, workers=workers)
    elif root is None:
        raise click.UsageError(f"{annotation} is a file, so an annotation: name ROOT, the folder of its photos")
    else:
        settings = {**options, "test_scenes": list(test_scenes or TEST_SCENES)}
        shown = parse_source(root).given
        made_by = {"command": "import-lmr", "annotation": sha256_file(annotation), "root": shown, **settings}
        with claim_new(out, made_by):
            manifest = run(annotation, root, out, settings, workers=workers)
    counts = manifest["counts"]
    lines, groups = counts["annotations"], counts["groups"]
    unit = "folders" if annotation.is_dir() else "lines"
    click.echo(
        f"{out}: {sum(groups.values())} groups ({', '.join(f'{n} {split}' for split, n in groups.items())}) from "
        f"{lines['used']} of {lines['lines']} {unit}"
    )
    if lines["rejected"]:
        reasons = {name: n for name, n in counts["rejects"].items() if name.startswith("annotation: ")}
        note(f"{lines['rejected']} {unit} rejected: {', '.join(f'{n} {name[12:]}' for name, n in reasons.items())}")
        ctx.exit(FAILED_ITEMS)


def run(annotation: Path, root: str, out: Path, settings: dict[str, Any], *, workers: int = 1) -> dict[str, Any]:
    """The flow; returns the manifest. LmrError when no line makes a group."""
    from functools import partial

    from lmr_tools import dataset, dedup
    from lmr_tools.annotations import read_annotation
    from lmr_tools.assembly import NO_EMBEDDER, NO_INDEX, complete, no_embeddings, write_shard_tables
    from lmr_tools.importing import Photo, find_files, place_groups, wanted_files, with_status
    from lmr_tools.scan import scan_listing
    from lmr_tools.schema import CandidateRow, GroupRow, ImageRow, LmrError, PairRow, RejectRow, Split
    from lmr_tools.sharding import build_shards, fill_shards, group_rows
    from lmr_tools.sources import list_photos, parse_source
    from lmr_tools.splits import assign_splits
    from lmr_tools.tables import sha256_file, write_rows
    from lmr_tools.turning import orientation
    from lmr_tools.workers import ProcessMapper

    work, size = dataset.work_folder(out), int(settings["size"])
    layout, lines = read_annotation(annotation)
    if not lines:
        raise LmrError(f"{annotation}: holds a header and no lines")
    sources = [parse_source(root)]
    listing, place = find_files(wanted_files(lines), list_photos(sources))
    with ProcessMapper(workers) as mapper:
        # 1. Look at every photo that a line names; a copy counts as the photo it repeats.
        found = scan_listing(listing, sources, work, mapper, track, labelled=True)
        copies = dedup.exact_duplicates(found.photos)
        good = dedup.staying(found.photos, copies)
        turns = track(mapper(partial(orientation, sources=tuple(sources)), good), len(good), "headers")
        by_hash = {row.sha256: Photo(row=row, orientation=o) for row, o in zip(good, turns, strict=True)}
        hashes = {row.path: row.sha256 for row in found.photos}
        photos = {name: by_hash[hashes[path]] for name, path in place.items() if path in hashes}
        # 2. Every line becomes groups or a reject.
        imported = place_groups(
            lines,
            photos,
            name=annotation.name,
            size=size,
            per_line=settings["crops_per_pair"] if layout == "pairs" else 1,
            test_scenes=settings["test_scenes"],
        )
        rejects = [*found.rejects, *copies, *imported.rejects]
        if not imported.groups:
            reason, number = Counter(row.reason for row in rejects).most_common(1)[0]
            first = next(row for row in rejects if row.reason == reason)
            raise LmrError(
                f"{annotation}: none of {len(lines)} lines makes a group; {number} for: {reason}; the first is "
                f"{first.path}: {first.detail}"
            )
        # 3. Whole scenes go to val, if asked for; then shards as in any build.
        training = Counter(g.scene for g in imported.groups if imported.split_of[g.scene] == Split.TRAIN)
        share, seed = settings["val_share"], settings["seed"]
        drawn = assign_splits(training, val_share=share, test_share=0.0, seed=seed)
        rows = {row.image_id: row for row in good}
        shards = fill_shards(
            imported.groups,
            rows,
            {**imported.split_of, **drawn},
            size=size,
            seed=seed,
            shard_samples=settings["shard_samples"],
        )
        written = list(track(build_shards(shards, sources, out / "shards", work, mapper), len(shards), "shards"))
    images = with_status([*found.photos, *found.refused], imported.groups, [row.image_id for row in rejects])
    write_rows(dataset.table_path(out, "images"), images, ImageRow)
    write_rows(dataset.table_path(out, "rejects"), rejects, RejectRow)
    write_rows(dataset.table_path(out, "candidates"), [], CandidateRow)
    write_rows(dataset.table_path(out, "pairs"), imported.pairs, PairRow)
    write_rows(dataset.table_path(out, "groups"), group_rows(shards), GroupRow)
    no_embeddings(out)
    write_shard_tables(out, written)
    references = {"high": 1, "medium": 2, "low": 2} if layout == "groups" else {}
    rejected = len(imported.rejects)
    return complete(
        out,
        recipe={
            "size": size,
            "seed": seed,
            **references,
            "allow_partial": layout == "pairs",
            "val_share": share,
            "shard_samples": settings["shard_samples"],
        },
        sources=[sources[0].given],
        embedder=NO_EMBEDDER,
        index=NO_INDEX,
        counts={
            "other_files": found.other_files,
            "annotations": {"lines": len(lines), "used": len(lines) - rejected, "rejected": rejected},
        },
        more={
            "imported": {
                "from": "LMR annotation",
                "layout": layout,
                "annotation": annotation.name,
                "sha256": sha256_file(annotation),
                "test_scenes": settings["test_scenes"],
                "crops_per_pair": settings["crops_per_pair"],
            }
        },
    )
