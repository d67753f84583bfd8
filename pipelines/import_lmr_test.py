"""The LMR test set as a dataset, for `lmr import-lmr`: its own groups, with tiers and landings measured here.

The set names a target and its references and nothing else, so overlap, scale and crops come from the stages of a build;
no photo is mined or embedded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .progress import track

# The keys of a build's recipe that decide something here.
USED = {
    *("size", "high", "medium", "low", "allow_partial", "strict_tiers", "groups_per_photo", "min_crop_texture", "seed"),
    *("max_side", "max_features", "min_consistent", "min_consistency", "high_overlap", "high_scale", "medium_overlap"),
    *("medium_scale", "duplicate_psnr", "val_share", "test_share", "shard_samples"),
}


def run(folder: Path, out: Path, settings: dict[str, Any], *, workers: int = 1) -> dict[str, Any]:
    """The flow; returns the manifest. LmrError when the folder has another layout or no group comes out."""
    import numpy as np

    from lmr_tools import dataset, dedup, pairs
    from lmr_tools.assembly import NO_EMBEDDER, NO_INDEX, complete, no_embeddings, write_shard_tables
    from lmr_tools.config import BuildConfig, load_recipe, part_of
    from lmr_tools.crops import CropRule, plan_all
    from lmr_tools.grading import Corpus
    from lmr_tools.groups import Counts
    from lmr_tools.importing import with_status
    from lmr_tools.scan import scan
    from lmr_tools.schema import CandidateRow, GroupRow, ImageRow, LmrError, PairRow, RejectRow
    from lmr_tools.sharding import build_shards, group_rows, plan_shards
    from lmr_tools.sources import parse_source
    from lmr_tools.tables import write_rows
    from lmr_tools.testset_groups import listed_groups, own_pairs, own_tasks, without_group
    from lmr_tools.testsets import plan_testset
    from lmr_tools.tiers import TierRule
    from lmr_tools.workers import ProcessMapper

    work = dataset.work_folder(out)
    entries = plan_testset("lmr", folder).entries
    sources = [parse_source(str(folder))]
    given = {key: settings[key] for key in ("size", "seed", "shard_samples")}
    groups_per_photo = settings["crops_per_pair"]
    recipe = load_recipe(
        BuildConfig,
        None,
        {**given, "groups_per_photo": groups_per_photo, "allow_partial": True, "val_share": 0.0, "test_share": 1.0},
    )
    rule, counts, crops = part_of(recipe, TierRule), part_of(recipe, Counts), part_of(recipe, CropRule)
    store = pairs.PairStore(work=work, max_side=recipe.max_side, max_features=recipe.max_features)
    with ProcessMapper(workers) as mapper:
        # 1. Look at every photo; a copy in another folder is the same photo.
        found = scan(sources, work, mapper, track, labelled=False)
        gone = dedup.exact_duplicates(found.photos)
        gone += pairs.extract_all(dedup.staying(found.photos, gone), sources, store, mapper, track)
        listed = listed_groups(entries, folder, found.photos, dedup.staying(found.photos, gone))
        photos = listed.photos
        # 2. Measure each target against the photos of its folder; one scene even where no match proves it.
        measured = list(track(pairs.verify_all(photos, listed.candidates(), store, mapper), len(photos), "verify"))
        corpus = Corpus(
            rows=photos,
            vectors=None,
            candidates=listed.candidates(),
            scores=np.zeros_like(listed.candidates(), np.float32),
            numbers=np.concatenate(measured),
            rule=rule,
            labelled=True,
        )
        # 3. Target crops and reference crops, then shards, as in any build.
        planned = plan_all(lambda: own_tasks(corpus, listed), counts, crops, sources, store, mapper)
        plans = list(track(planned, len(listed.references), "groups"))
        refused = [*listed.rejects, *without_group(listed, plans)]
        groups = [group for plan in plans for group in plan.groups]
        if not groups:
            first = refused[0]
            raise LmrError(f"{folder}: none of {len(entries)} folders makes a group; {first.path}: {first.detail}")
        shards = plan_shards(
            groups,
            {row.image_id: row for row in photos},
            {row.image_id: row.scene or "" for row in photos},
            size=recipe.size,
            val_share=recipe.val_share,
            test_share=recipe.test_share,
            seed=recipe.seed,
            shard_samples=recipe.shard_samples,
        )
        written = list(track(build_shards(shards, sources, out / "shards", work, mapper), len(shards), "shards"))
    named = [group for shard in shards for group in shard.groups]
    rejects = [*found.rejects, *gone, *refused]
    lost = {row.image_id for row in gone}
    images = [*photos, *(row for row in found.photos if row.image_id in lost), *found.refused]
    repeated = {plan.target_image: plan.duplicates for plan in plans if plan.duplicates}
    write_rows(
        dataset.table_path(out, "images"), with_status(images, named, [row.image_id for row in rejects]), ImageRow
    )
    write_rows(dataset.table_path(out, "rejects"), rejects, RejectRow)
    write_rows(dataset.table_path(out, "candidates"), [], CandidateRow)
    write_rows(dataset.table_path(out, "pairs"), own_pairs(corpus, listed, repeated), PairRow)
    write_rows(dataset.table_path(out, "groups"), group_rows(shards), GroupRow)
    no_embeddings(out)
    write_shard_tables(out, written)
    return complete(
        out,
        recipe=recipe.model_dump(include=USED),
        sources=[sources[0].given],
        embedder=NO_EMBEDDER,
        index=NO_INDEX,
        counts={
            "other_files": found.other_files,
            "annotations": {"lines": len(entries), "used": len(entries) - len(refused), "rejected": len(refused)},
        },
        more={"imported": {"from": "LMR test set", "layout": "test set", "folder": folder.absolute().name}},
    )
