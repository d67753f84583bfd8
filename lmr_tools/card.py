"""README.md and croissant.json of a dataset: what it is, how it was made, how to load it, what it can not promise.

Both follow from the manifest and the tables alone: no times, no paths of the machine that built it, so equal datasets
have equal cards. Imports `croissant`, which describes the files, and `summary`, which counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from lmr_tools.croissant import LICENCE, TABLES, croissant
from lmr_tools.schema import Split
from lmr_tools.summary import slot_table
from lmr_tools.tables import read_table, write_bytes, write_json


def write_card(dataset: Path, manifest: Mapping[str, Any]) -> None:
    """Write README.md and croissant.json into `dataset`, whose tables are written and listed in `manifest`."""
    groups = read_table(dataset / "tables" / "groups.parquet").to_pandas()
    shards = read_table(dataset / "tables" / "shards.parquet").to_pandas()
    write_bytes(dataset / "README.md", card_text(manifest, groups, shards).encode())
    schemas = {name: pq.read_schema(dataset / "tables" / f"{name}.parquet") for name in manifest["tables"]}
    write_json(dataset / "croissant.json", croissant(manifest, schemas))


def plain(value: Any) -> str:
    """Text that can not break out of a line or cell of Markdown; of a path only the last part is shown."""
    text = " ".join(str(value).split())
    if PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute() or text.startswith(("~", ".")):
        text = re.split(r"[/\\]", text.rstrip("/\\"))[-1]
    return re.sub(r"[`|<>\[\]*_\\]", lambda mark: f"&#{ord(mark[0])};", text)


def card_text(manifest: Mapping[str, Any], groups: pd.DataFrame, shards: pd.DataFrame) -> str:
    """The dataset card as Markdown with a Hugging Face front matter."""
    splits = [split for split in Split if (shards["split"] == split).any()]
    parts = (
        _front_matter(int(shards["samples"].sum()), splits),
        _what(manifest, groups, shards, splits),
        _how_made(manifest),
        _tiers(manifest, groups),
        _load(groups, shards, splits),
        _limits(manifest, groups),
    )
    return "\n".join(line for part in parts for line in part) + "\n"


def _front_matter(samples: int, splits: list[Split]) -> Iterator[str]:
    sizes = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
    size = next((name for limit, name in sizes if samples < limit), "n>10M")
    yield "---"
    yield "pretty_name: Multi-reference super-resolution groups"
    yield "license: other"
    yield "license_name: unknown"
    yield "task_categories:\n- image-to-image"
    yield "tags:\n- super-resolution\n- reference-based-super-resolution\n- webdataset"
    yield f"size_categories:\n- {size}"
    yield "configs:\n- config_name: default\n  data_files:"
    for split in splits:
        yield f"  - split: {'validation' if split == Split.VAL else split}\n    path: shards/{split}-*.tar"
    yield "---"


def _what(
    manifest: Mapping[str, Any], groups: pd.DataFrame, shards: pd.DataFrame, splits: list[Split]
) -> Iterator[str]:
    size, photos = manifest["recipe"].get("size"), manifest["counts"].get("photos", {})
    yield "# Multi-reference super-resolution groups"
    yield (
        f"\nEach sample is a target crop of {size}x{size} pixels with reference crops of the same size from other "
        "photos of the same place, graded High, Medium or Low by how much of the target they show and at which size. "
        "Full resolution only: the low-resolution input is made when it is needed. The layout follows the LMR dataset "
        "(ICCV 2023)."
    )
    if splits:
        yield f"\n![Target, then High, Medium and Low references](preview/{splits[0]}.jpg)"
    yield "\n## Contents\n"
    yield "| split | groups | scenes | shards | MB |\n|---|---:|---:|---:|---:|"
    for split in splits:
        tars, rows = shards[shards["split"] == split], groups[groups["split"] == split]
        numbers = (tars["samples"].sum(), rows["scene"].nunique(), len(tars), f"{tars['bytes'].sum() / 1e6:.1f}")
        yield f"| {split} | {' | '.join(str(number) for number in numbers)} |"
    scene = (
        "has the name it was published with"
        if "imported" in manifest
        else "is a set of photos joined by verified pairs"
    )
    yield f"\nSplits share no scene and no photo. A scene {scene}."
    if photos:
        yield (
            f"\nPhotos found: {photos.get('found')}; used: {photos.get('used')}; good but in no group: "
            f"{photos.get('unused')}; rejected: {photos.get('rejected')}."
        )
        rejects = manifest["counts"].get("rejects", {})
        if rejects:
            yield "\n| rejected at: because | photos |\n|---|---:|"
        yield from (f"| {plain(reason)} | {number} |" for reason, number in rejects.items())
    yield "\n| table | rows | what |\n|---|---:|---|"
    for name, entry in manifest["tables"].items():
        yield f"| `tables/{name}.parquet` | {entry['rows']} | {TABLES.get(name, '')} |"


def _how_made(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield "\n## How it was made\n"
    if _as_published(manifest):
        yield from _imported(manifest)
    elif "imported" in manifest:
        yield from _test_set(manifest)
    elif "merged" in manifest:
        yield from _merged(manifest)
    else:
        yield from _built(manifest)
    if "removed" in manifest:
        yield f"\nPhotos that must stay out: {len(manifest['removed'])} (`removed` in `dataset.json`)."
    if "rebuilt" in manifest:
        origin = manifest["rebuilt"]
        yield (
            f"\nRebuilt from the tables of a dataset of {origin['groups']} groups (manifest "
            f"`{origin['manifest_sha256']}`); {origin['missing_photos']} photos could not be found any more."
        )
    yield "\n`dataset.json` holds the whole recipe, the versions and the sha256 of every table."


def _imported(manifest: Mapping[str, Any]) -> Iterator[str]:
    origin, lines = manifest["imported"], manifest["counts"]["annotations"]
    yield (
        f"Imported from `{plain(origin['annotation'])}` (sha256 `{origin['sha256']}`), layout {origin['layout']}: "
        f"{lines['used']} of {lines['lines']} lines, the others are in `rejects`. Slots, tiers and crop centres are as "
        "published; crops that would leave their photo were refused. Overlap and scale ratio were not published: null."
    )


def _test_set(manifest: Mapping[str, Any]) -> Iterator[str]:
    origin, folders = manifest["imported"], manifest["counts"]["annotations"]
    yield (
        f"The groups of the LMR test set in `{plain(origin['folder'])}`: {folders['used']} of {folders['lines']} "
        "folders, the others are in `rejects`. A group has the target of its folder and references from it, one scene "
        "by their label. Overlap, scale ratio, tier and crops were measured here, by local features and a robust "
        f"fundamental matrix; they were not published. Seed {manifest['seed']}."
    )


def _merged(manifest: Mapping[str, Any]) -> Iterator[str]:
    yield "Merged from these datasets; their whole recipes stand in `dataset.json`.\n"
    yield "| dataset | groups taken | of | encoder | manifest |\n|---|---:|---:|---|---|"
    for part in manifest["merged"]["parts"]:
        model = plain(part["embedder"].get("model") or "none")
        name, sha256 = plain(part["name"]), part["manifest_sha256"][:16]
        yield f"| {name} | {part['taken']} | {part['groups']} | {model} | `{sha256}` |"
    for reason, number in manifest["merged"]["left_out"].items():
        yield f"\n- {number} groups left out: {plain(reason)}."


def _built(manifest: Mapping[str, Any]) -> Iterator[str]:
    embedder, index, recipe = manifest["embedder"], manifest["index"], manifest["recipe"]
    recall = index.get("recall")
    measured = f", measured recall {recall:.4f}" if isinstance(recall, int | float) else ""
    yield f"1. Photos were read, copies, near copies and poor photos left out (`lmr-tools` {_version(manifest)})."
    yield (
        f"2. Embedded with {plain(embedder.get('model'))} ({embedder.get('dimension')} numbers); `clip_score` is the "
        "cosine of two such embeddings, whichever encoder it was."
    )
    mined = f"index {plain(index.get('kind'))}{measured}"
    yield f"3. For each photo the {index.get('k')} most similar ones were mined ({mined})."
    if "geometry" in manifest:
        about = manifest["geometry"]
        yield (
            "4. Overlap and scale ratio of each candidate pair come from the shared 3-D points of a COLMAP "
            f"reconstruction ({about['photos']} photos are in it); photos that are not in it have no pairs."
        )
    else:
        yield (
            "4. Each candidate pair was verified by local features and a robust fundamental matrix; overlap and scale "
            "ratio come from the matches that agree in rotation and size."
        )
    yield (
        "5. Target crops with texture were drawn; a matched reference crop is centred where the centre of the target "
        f"lands. Seed {manifest['seed']}; scenes: {plain(recipe.get('scenes'))}."
    )


def _version(manifest: Mapping[str, Any]) -> str:
    return plain(manifest.get("versions", {}).get("lmr-tools", "unknown"))


def _tiers(manifest: Mapping[str, Any], groups: pd.DataFrame) -> Iterator[str]:
    recipe = manifest["recipe"]
    if _as_published(manifest):  # the annotation was made with the paper's thresholds
        recipe = {"high_overlap": 0.3, "high_scale": 0.9, "medium_overlap": 0.1, "medium_scale": 0.66}
    yield "\n## Tiers\n"
    yield "| tier | overlap | scale ratio |\n|---|---|---|"
    yield f"| High | > {recipe.get('high_overlap')} | > {recipe.get('high_scale')} |"
    yield f"| Medium | > {recipe.get('medium_overlap')} | > {recipe.get('medium_scale')} |"
    yield "| Low | any other pair of the scene | |"
    measure = "the shared 3-D points of a reconstruction" if _three_d(manifest) else "2-D matches"
    yield (
        f"\nOverlap is the share of the target's detail that the reference shows, estimated from {measure}; scale "
        "ratio is the smaller apparent size over the larger. `tier` is what a pair is, `slot` the place it fills: a "
        "High pair may fill a Medium or Low slot, never the other way.\n"
    )
    yield "| slot | references | of that tier | tied by matches | median overlap | median scale | median `clip_score` |"
    yield "|---|---:|---:|---:|---:|---:|---:|"
    for row in slot_table(groups).to_dict("records"):
        medians = (row["overlap"], row["scale_ratio"], row["clip_score"])
        shown = " | ".join("-" if pd.isna(value) else f"{value:.3f}" for value in medians)
        yield f"| {plain(row['slot'])} | {row['references']} | {row['own']} | {row['matched']} | {shown} |"
    yield "\n![Overlap and scale ratio of the graded pairs](preview/tiers.png)"


def _three_d(manifest: Mapping[str, Any]) -> bool:
    """Whether tiers come from a 3-D reconstruction: the published annotation, or a build with one."""
    return _as_published(manifest) or "geometry" in manifest


def _as_published(manifest: Mapping[str, Any]) -> bool:
    """Whether slots and tiers are those of the published annotation; those of its test set are measured here."""
    return manifest.get("imported", {}).get("layout") in ("groups", "pairs")


def _load(groups: pd.DataFrame, shards: pd.DataFrame, splits: list[Split]) -> Iterator[str]:
    split = splits[0] if splits else Split.TRAIN
    last = max(int((shards["split"] == split).sum()) - 1, 0)
    name = f"{split}-{{000000..{last:06d}}}.tar" if last else f"{split}-000000.tar"
    yield "\n## Loading\n"
    yield "```python\nimport webdataset\n"
    yield f'samples = webdataset.WebDataset("shards/{name}", shardshuffle=False).decode("pil")'
    yield "for sample in samples:"
    yield '    about = sample["json"]  # ids, paths, boxes, slots, tiers, scores'
    yield '    target = sample["target.png"]'
    yield '    references = [sample[f"ref{n}.png"] for n in range(len(about["references"]))]\n```'
    yield '\n```python\nimport pandas\n\ngroups = pandas.read_parquet("tables/groups.parquet")\n```'
    yield (
        "\nWith `lmr-tools`: `lmr inspect .`, `lmr explain . "
        f"{groups['group_id'].min() if len(groups) else 'GROUP'}`, and `lmr verify .`, which checks every file. A tar "
        "cut short on a block boundary reads without an error: verify a copy before training on it."
    )
    yield (
        "\nOne group: `samples` gives the byte range of its shard that holds it, a small tar of its own, and its "
        "sha256. `lmr train` reads groups this way, from a folder or a URL, and checks each."
    )


def _limits(manifest: Mapping[str, Any], groups: pd.DataFrame) -> Iterator[str]:
    landing = groups["landing"].value_counts()
    chained, free = int(landing.get("chained", 0)), int(landing.get("free", 0))
    yield "\n## Provenance and limits\n"
    yield "- Every crop names its photo, its path in the source and its corner; `images` holds each photo's sha256."
    if not _three_d(manifest):
        yield "- Tiers come from 2-D matches, not a 3-D reconstruction: near a threshold a pair may be one tier off."
    yield (
        f"- {chained + free} of {len(groups)} references are not tied to their target by matches of their own "
        f"({chained} joined through another photo, {free} by label only): they may show none of the target's detail."
    )
    yield "- Repeated structure (the same façade, print or logo in two places) can join photos of different places."
    yield "- People, number plates and private places in the photos were not looked for."
    yield "\n## Licence\n"
    yield LICENCE
