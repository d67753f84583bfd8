"""`lmr build-dataset`: a folder of photos goes in, H/M/L groups in WebDataset shards come out.

`build` is the flow, one page; every stage takes values and returns values. What is expensive is kept in the work
folder by content, so the same page serves a first run, a run after a kill, and a run on a grown folder. `dataset.json`
is written last: a folder without it is not a whole dataset.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .progress import note, track

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from lmr_tools.cluster import RayMapper
    from lmr_tools.config import BuildConfig
    from lmr_tools.embed import Embedder
    from lmr_tools.pairs import PairStore
    from lmr_tools.schema import ImageRow, RejectRow
    from lmr_tools.workers import Mapper, ProcessMapper


@click.command("build-dataset")
@click.argument("source", nargs=-1, required=True)
@click.option("--out", "place", required=True, help="Folder of the dataset, or an fsspec URL (s3://...).")
@click.option("--work", type=click.Path(path_type=Path), help="Folder to build in when --out is a URL; keep it.")
@click.option("--work-copy", metavar="URL", help="Keep the work files at this fsspec URL, too, to go on elsewhere.")
@click.option("--recipe", type=click.Path(path_type=Path), help="TOML or YAML file with any of the recipe's keys.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set any key of the recipe.")
@click.option("--scenes", type=click.Choice(["none", "folder"]), help="folder: sub-folders are the scenes.  [none]")
@click.option("--size", type=int, help="Side of target and reference crops, pixels.  [300]")
@click.option("--high", type=int, help="High references per group.  [1]")
@click.option("--medium", type=int, help="Medium references per group.  [2]")
@click.option("--low", type=int, help="Low references per group.  [2]")
@click.option("--allow-partial", is_flag=True, default=None, help="Keep groups that miss references.")
@click.option("--strict-tiers", is_flag=True, default=None, help="Never fill a slot with a pair of a higher tier.")
@click.option("--groups-per-photo", type=int, help="Target crops per photo, at most.  [1]")
@click.option("--candidates", type=int, help="Candidate references mined per photo.  [20]")
@click.option("--clip-model", help="open_clip model, or effnet-lite0 (small, needs no hub).  [ViT-B-32]")
@click.option("--clip-pretrained", help="open_clip tag or local weights file.  [laion2b_s34b_b79k]")
@click.option("--clip-config", help="Folder of open_clip model JSONs.")
@click.option("--seed", type=int, help="Seed of crops, splits and shard order.  [0]")
@click.option("--exclude-benchmark", multiple=True, metavar="DIR", help="Keep photos of this test set out (leakage).")
@click.option("--remove", type=click.Path(path_type=Path), metavar="LIST", help="Keep these photos out, for good.")
@click.option(
    "--geometry",
    "models",
    nargs=2,
    multiple=True,
    type=click.Tuple([click.Choice(["colmap"]), click.Path(path_type=Path)]),
    metavar="colmap MODEL",
    help="Overlap and scale from the 3-D points of a COLMAP sparse model, not from matches; may be given again.",
)
@click.option("--workers", type=click.IntRange(1), help="Processes; the result does not depend on it.  [all cores]")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="What runs it.")
@click.option("--address", help="Ray cluster to run on: auto, or HOST:PORT.  [one of its own on this machine]")
@click.option("--device", default="auto", show_default=True, help="Where to embed: auto, cpu, cuda, cuda:1, mps.")
@click.option("--rehash", is_flag=True, help="Read every photo again, also those unchanged in size and time.")
@click.option("--dry-run", is_flag=True, help="Show what would be done, with counts, disk and memory, and stop.")
def build_dataset(
    source: tuple[str, ...],
    place: str,
    work: Path | None,
    work_copy: str | None,
    recipe: Path | None,
    settings: tuple[str, ...],
    exclude_benchmark: tuple[str, ...],
    remove: Path | None,
    models: tuple[tuple[str, Path], ...],
    workers: int | None,
    engine: str,
    address: str | None,
    device: str,
    rehash: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Build a multi-reference super-resolution dataset from the photos in SOURCE...

    A SOURCE is a folder, a glob, a WebDataset or img2dataset tar, one photo, or an fsspec URL (s3://, gs://,
    https://). Run the same command again after a stop, or when photos were added: it does only what is missing.

    --remove takes a file with the id, path or sha256 of one photo a line. The dataset remembers it: these photos and
    their copies stay out of every later build of it.
    """
    from lmr_tools.assembly import refuse_others
    from lmr_tools.colmap_model import model_folders
    from lmr_tools.config import BuildConfig, load_recipe, parse_settings
    from lmr_tools.dataset import claim, work_folder
    from lmr_tools.remote import publish
    from lmr_tools.schema import LmrError
    from lmr_tools.sources import parse_source
    from lmr_tools.stores import Store
    from lmr_tools.workcopy import work_copied
    from lmr_tools.workers import default_workers

    if ("://" in place) != (work is not None):
        raise click.UsageError("--work names the folder to build in when --out is a URL, and only then")
    out = work or Path(place)
    try:
        given = {key: value for key, value in options.items() if value is not None}
        config = load_recipe(BuildConfig, recipe, {**parse_settings(settings), **given})
    except LmrError as error:
        raise click.UsageError(str(error)) from None
    for text in (*source, *exclude_benchmark):
        parse_source(text)  # a mistyped path is told before anything is made
    for _, path in models:
        model_folders(path)
    if dry_run:
        _show_plan(source, out, config)
        return
    if address and engine != "ray":
        raise click.UsageError("--address is for --engine ray")
    store = Store(place) if work else None  # an address that no file system knows is told now
    copy = Store(work_copy) if work_copy else None
    refuse_others(out)
    with claim(out), work_copied(copy, work_folder(out)):
        manifest = build(
            source,
            out,
            config,
            benchmarks=exclude_benchmark,
            remove=remove,
            models=[path for _, path in models],
            workers=workers or default_workers(),
            engine=engine,
            address=address,
            device=device,
            rehash=rehash,
        )
    counts = manifest["counts"]
    groups = ", ".join(f"{number} {split}" for split, number in counts["groups"].items())
    click.echo(f"{out}: {sum(counts['groups'].values())} groups ({groups}) from {counts['photos']['found']} photos")
    if store:
        sent = publish(out, store)
        click.echo(f"{store.shown}: {sent.uploaded} files put, {sent.kept} there, {sent.retried} calls made again")
    for sheet in sorted((out / "preview").glob("*.jpg")):
        click.echo(f"contact sheet: {sheet}")


def build(
    given: tuple[str, ...],
    out: Path,
    config: BuildConfig,
    *,
    benchmarks: tuple[str, ...] = (),
    remove: Path | None = None,
    models: Sequence[Path] = (),
    workers: int = 1,
    engine: str = "local",
    address: str | None = None,
    device: str = "auto",
    rehash: bool = False,
) -> dict[str, Any]:
    """The flow from photos to shards; returns the manifest. LmrError when no photo or no group comes out."""
    import numpy as np

    from lmr_tools import dataset, dedup, leakage, pairs, reconstruction, removal
    from lmr_tools.cluster import RayEmbedder
    from lmr_tools.config import part_of
    from lmr_tools.crops import CropRule, plan_all
    from lmr_tools.embed import OpenClipEmbedder
    from lmr_tools.finish import Built, write_dataset
    from lmr_tools.grading import Corpus, scenes_of, tasks, unmatched_chains
    from lmr_tools.groups import Counts
    from lmr_tools.index import mine_candidates, near_pairs
    from lmr_tools.scan import scan
    from lmr_tools.schema import LmrError
    from lmr_tools.sharding import build_shards, plan_shards
    from lmr_tools.sources import parse_source
    from lmr_tools.stores import CountingMapper
    from lmr_tools.tiers import TierRule
    from lmr_tools.vectors import embed_all, keep_rows

    sources = [parse_source(text) for text in given]
    names = [source.given for source in sources]
    if engine == "ray":
        # Workers start in folders of their own.
        out = out.absolute()
        sources = [s if s.remote else dataclasses.replace(s, root=str(Path(s.root).absolute())) for s in sources]
    work = dataset.work_folder(out)
    make_embedder = functools.partial(
        OpenClipEmbedder,
        model_name=config.clip_model,
        pretrained=config.clip_pretrained or None,
        config_dir=Path(config.clip_config).absolute() if config.clip_config else None,
        views=config.views,
    )
    store = pairs.PairStore(work=work, max_side=config.max_side, max_features=config.max_features)
    labelled = config.scenes == "folder"
    read = reconstruction.read_models(models)
    with _engine(engine, workers, address) as running:
        mapper = CountingMapper(running)
        embedder = RayEmbedder(make_embedder) if engine == "ray" else make_embedder(device=device)
        note(f"embedder   {embedder.name}, {embedder.views} views a photo")
        # 1. Scan: every file becomes a photo or a reject.
        found = scan(sources, work, mapper, track, labelled=labelled, rehash=rehash)
        photos, rejects = list(found.photos), list(found.rejects)
        # 2. Photos that must stay out, copies and poor photos leave.
        removed = removal.renew(out, remove, [*found.photos, *found.refused], [source.root for source in sources])
        gone = removal.removed_photos(photos, removed, max_bits=config.near_hash_bits)
        gone += dedup.exact_duplicates(dedup.staying(photos, gone))
        gone += dedup.poor_photos(
            dedup.staying(photos, gone),
            min_side=config.size,
            min_sharpness=config.min_sharpness,
            min_texture=config.min_texture,
        )
        photos, rejects = dedup.staying(photos, gone), rejects + gone
        # 3. Embed; near duplicates agree in embedding and hash; pictures of a benchmark would leak.
        vectors, gone = embed_all(photos, sources, embedder, work, mapper=mapper, track=track)
        similar = near_pairs(vectors[:, 0], threshold=config.near_score)
        gone += dedup.near_duplicates(photos, similar, max_bits=config.near_hash_bits)
        if benchmarks or not read:
            gone += pairs.extract_all(dedup.staying(photos, gone), sources, store, mapper, track)
        photos, vectors, rejects = dedup.staying(photos, gone), keep_rows(vectors, _rest(photos, gone)), rejects + gone
        for folder in benchmarks:
            pictures, shown = _look_at_benchmark(folder, embedder, store, mapper)
            leaking = functools.partial(leakage.benchmark_photos, store=store, max_bits=config.near_hash_bits)
            # The nearest copies hide others behind them: look again until there is none.
            while photos and (gone := leaking(photos, vectors, pictures, shown)):
                photos, vectors, rejects = (
                    dedup.staying(photos, gone),
                    keep_rows(vectors, _rest(photos, gone)),
                    rejects + gone,
                )
        if not photos:
            raise LmrError(f"{' '.join(names)}: no usable photo; {len(rejects)} were rejected, {_reasons(rejects)}")
        # 4. Mine candidate references.
        mined = mine_candidates(
            vectors,
            config.candidates,
            labels=[row.scene for row in photos] if labelled else None,
            keep=work / f"index-{embedder.key}",
            model=embedder.key,
        )
        # 5. Verify them by geometry, then also what two verified steps join and mining missed.
        rule = part_of(config, TierRule)
        matched, about = mined.numbers, None
        if read:
            seen = reconstruction.observe_all(read, photos, sources, store, mapper, track, k=config.candidates)
            store, matched, about = seen.store, seen.candidates(mined.numbers), seen.about
            note(f"model      {about['photos']} of {len(photos)} photos are among its {about['images']} images")
        measured = list(track(pairs.verify_all(photos, matched, store, mapper), len(photos), "verify"))
        chained = unmatched_chains(len(photos), np.concatenate(measured), rule)
        measured += track(pairs.verify_all(photos, chained, store, mapper), len(photos), "chains")
        corpus = Corpus(
            rows=photos,
            vectors=vectors,
            candidates=mined.numbers,
            scores=mined.scores,
            numbers=np.concatenate(measured),
            rule=rule,
            labelled=labelled,
        )
        # 6. Choose target crops and the references of each.
        planned = plan_all(
            lambda: tasks(corpus), part_of(config, Counts), part_of(config, CropRule), sources, store, mapper
        )
        plans = list(track(planned, len(photos), "groups"))
        shards = plan_shards(
            [group for plan in plans for group in plan.groups],
            {row.image_id: row for row in photos},
            dict(zip([row.image_id for row in photos], scenes_of(corpus), strict=True)),
            size=config.size,
            val_share=config.val_share,
            test_share=config.test_share,
            seed=config.seed,
            shard_samples=config.shard_samples,
        )
        # 7. Write shards, tables, card and pictures; the manifest comes last and makes the dataset whole.
        dataset.open_for_change(out)
        written = list(track(build_shards(shards, sources, out / "shards", work, mapper), len(shards), "shards"))
    if any(source.remote for source in sources):
        note(f"sources    {mapper.made_again} calls made again")
    return write_dataset(
        out,
        Built(
            recipe=config.model_dump(),
            sources=names,
            embedder=embedder,
            found=found,
            rejects=rejects,
            removed=removed,
            mined=mined,
            corpus=corpus,
            plans=plans,
            shards=shards,
            written=written,
            reconstruction=about,
        ),
    )


def _engine(engine: str, workers: int, address: str | None) -> ProcessMapper | RayMapper:
    from lmr_tools.cluster import RayMapper
    from lmr_tools.workers import ProcessMapper

    return RayMapper(address, workers) if engine == "ray" else ProcessMapper(workers)


def _reasons(rejects: Sequence[RejectRow]) -> str:
    reason, count = Counter(reject.reason for reject in rejects).most_common(1)[0]
    return f"{count} for: {reason}; the first is {next(r.path for r in rejects if r.reason == reason)}"


def _rest(photos: Sequence[ImageRow], gone: Sequence[RejectRow]) -> list[int]:
    names = {reject.image_id for reject in gone}
    return [number for number, photo in enumerate(photos) if photo.image_id not in names]


def _look_at_benchmark(
    folder: str, embedder: Embedder, store: PairStore, mapper: Mapper
) -> tuple[list[ImageRow], npt.NDArray[np.float16]]:
    """Pictures of a test set with their vectors; their features go into the store. An unreadable one is an error."""
    from lmr_tools import pairs
    from lmr_tools.scan import scan
    from lmr_tools.schema import LmrError
    from lmr_tools.sources import parse_source
    from lmr_tools.vectors import embed_all

    sources = [parse_source(folder)]
    found = scan(sources, store.work, mapper, track, labelled=False)
    vectors, gone = embed_all(found.photos, sources, embedder, store.work, mapper=mapper, track=track)
    gone += pairs.extract_all(found.photos, sources, store, mapper, track)
    if failed := [*found.rejects, *gone]:
        raise LmrError(f"--exclude-benchmark {folder}: {failed[0].path}: {failed[0].reason}; leakage can not be judged")
    return list(found.photos), vectors


def _show_plan(given: tuple[str, ...], out: Path, config: BuildConfig) -> None:
    """What a build would read, keep and write; estimates say so."""
    from lmr_tools.dataset import free_bytes
    from lmr_tools.sources import list_photos, parse_source

    listing = list_photos([parse_source(text) for text in given])
    count = len(listing.found)
    references = config.high + config.medium + config.low
    # Sizes seen on photos: a feature file of 2,000 features has 290 kB, a pair 1.5, a crop 1.7 to 2 bytes a pixel.
    features = count * (config.max_features * 145 + config.candidates * 1500)
    shards = count * config.groups_per_photo * (1 + references) * config.size**2 * 2
    vectors = count * config.views * 2 * 1280
    click.echo(f"photos     {count} ({sum(file.bytes for file in listing.found) / 1e9:.2f} GB)")
    click.echo(f"refused    {len(listing.refused)} by name or container; {listing.other_files} other files")
    click.echo(f"pairs      at most {count * config.candidates} to verify")
    click.echo(f"groups     at most {count * config.groups_per_photo}, 1 target + {references} references each")
    click.echo(f"work disk  about {(features + vectors) / 1e9:.2f} GB (estimate)")
    click.echo(f"shards     at most about {shards / 1e9:.2f} GB (estimate)")
    memory = vectors + count * config.candidates * 200
    click.echo(f"memory     about {memory / 1e9:.2f} GB for vectors and pair numbers (estimate)")
    click.echo(f"free disk  {free_bytes(out.absolute()) / 1e9:.1f} GB at {out}")
