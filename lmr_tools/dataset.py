"""The folder of a dataset: who may write it, what lies where, and the manifest that makes it whole.

DATASET/dataset.json is written last and removed first: a folder without it is a build that has not finished. Imports
`sources`, which has to know a dataset when it meets one among photos.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmr_tools.schema import LmrError
from lmr_tools.sources import DATASET_MARKER, is_utf8
from lmr_tools.tables import read_json, sha256_file, write_json

FORMAT = "lmr-dataset"
VERSION = 1
MANIFEST = "dataset.json"
MADE_BY = "made_by.json"  # in the work folder: which command writes, where it is not build-dataset
TABLES = ("images", "rejects", "embeddings", "candidates", "pairs", "groups", "shards", "samples")
# What decides the bytes of a dataset beside the photos and the recipe.
PACKAGES = (
    "faiss-cpu",
    "faiss-gpu",
    "numpy",
    "open_clip_torch",
    "opencv-python-headless",
    "pillow",
    "pyarrow",
    "torch",
)


def work_folder(dataset: Path) -> Path:
    """What can be computed again (looks, embeddings, features, geometry, plans); not part of the dataset."""
    return dataset / "work"


def table_path(dataset: Path, name: str) -> Path:
    """File of one of the TABLES."""
    return dataset / "tables" / f"{name}.parquet"


@contextmanager
def claim(dataset: Path) -> Iterator[None]:
    """Take a folder for writing a dataset, against other writers; LmrError when it holds something else."""
    if not is_utf8(str(dataset)):
        raise LmrError(f"{dataset}: the path is not UTF-8; name another folder for the dataset")
    if dataset.exists() and not dataset.is_dir():
        raise LmrError(f"{dataset}: is a file; name a folder for the dataset")
    marker = dataset / DATASET_MARKER
    if dataset.is_dir() and not marker.exists() and any(dataset.iterdir()):
        raise LmrError(f"{dataset}: holds something that is not a dataset of lmr-tools; name a new or empty folder")
    dataset.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(marker, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock(descriptor, f"{dataset}: another build is writing this dataset; wait for it or stop it")
        for left in dataset.rglob(".*.tmp"):  # what a killed run was writing
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def lock(descriptor: int, busy: str) -> None:
    """Lock an open file until it is closed or the process ends; LmrError(busy) when another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows: no advisory lock, the last writer wins
        return
    try:
        # The kernel drops the lock with the process, so a kill leaves nothing to clean up.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise LmrError(busy) from None


def versions() -> dict[str, str]:
    """Versions of this toolkit and of the packages that decide a dataset's bytes, as far as installed."""
    found = {"lmr-tools": _version("lmr-tools")}
    found.update({name: _version(name) for name in PACKAGES})
    return {name: version for name, version in found.items() if version}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def open_for_change(dataset: Path) -> None:
    """Take the manifest away before the first table or shard changes: from here on the dataset is not whole."""
    (dataset / MANIFEST).unlink(missing_ok=True)


def manifest_of(
    dataset: Path,
    *,
    recipe: Mapping[str, Any],
    sources: Sequence[str],
    embedder: Mapping[str, Any],
    index: Mapping[str, Any],
    counts: Mapping[str, Any],
    rows: Mapping[str, int],
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of dataset.json for the tables as they lie in `dataset`: no times, no paths but the given sources.

    `more` holds what only some datasets have: `removed` photos, where an import or a merge came from.
    """
    return {
        "format": FORMAT,
        "version": VERSION,
        "seed": recipe["seed"],
        "recipe": dict(recipe),
        "sources": list(sources),
        "versions": versions(),
        "embedder": dict(embedder),
        "index": dict(index),
        "counts": dict(counts),
        "tables": {
            name: {"rows": rows[name], "sha256": sha256_file(table_path(dataset, name))} for name in sorted(rows)
        },
        **{name: value for name, value in (more or {}).items() if value},
    }


def finish(dataset: Path, manifest: Mapping[str, Any]) -> None:
    """Write dataset.json, which makes the dataset whole."""
    write_json(dataset / MANIFEST, manifest)


def read_manifest(dataset: Path) -> dict[str, Any]:
    """dataset.json, checked for format and version; LmrError says what the folder is instead."""
    if not dataset.is_dir():
        raise LmrError(f"{dataset}: no such folder")
    if not (dataset / MANIFEST).is_file():
        if (dataset / DATASET_MARKER).exists():
            raise LmrError(f"{dataset}: lmr {_command(dataset)} has not finished; run the same command again")
        raise LmrError(f"{dataset}: not a dataset of lmr-tools (no {MANIFEST})")
    return checked(read_json(dataset / MANIFEST), str(dataset / MANIFEST))


def _command(dataset: Path) -> str:
    """Which command was making the dataset in a claimed folder."""
    receipt = work_folder(dataset) / MADE_BY
    made_by = read_json(receipt) if receipt.is_file() else None
    return str(made_by.get("command")) if isinstance(made_by, dict) else "build-dataset"


def checked(manifest: Any, where: str) -> dict[str, Any]:
    """`manifest` if it is a dataset.json that this program can read; else an LmrError that names `where`."""
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise LmrError(f"{where}: not the manifest of an lmr-tools dataset")
    if manifest.get("version") != VERSION:
        raise LmrError(f"{where}: version {manifest.get('version')!r}; this program reads {VERSION}")
    return manifest


def free_bytes(folder: Path) -> int:
    """Free room on the disk that holds, or will hold, `folder`."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
