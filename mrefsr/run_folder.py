"""The folder of a training run: who may write it, what it began with, and where its files lie."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmr_tools.dataset import lock
from lmr_tools.schema import LmrError
from lmr_tools.stream import SampleStore
from lmr_tools.tables import read_json, write_json
from mrefsr.recipes import TrainConfig, refuse_changes
from mrefsr.training_state import checkpoints

MARKER = ".lmr-run"
FORMAT, VERSION = "lmr-run", 1


@contextmanager
def claim_run(run: Path) -> Iterator[None]:
    """Take a folder for a run, against other runs; LmrError when it holds something else or is in use."""
    if run.exists() and not run.is_dir():
        raise LmrError(f"{run}: is a file; name a folder for the run")
    marker = run / MARKER
    if run.is_dir() and not marker.exists() and any(run.iterdir()):
        raise LmrError(f"{run}: holds something that is not a training run; name a new or empty folder")
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(marker, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        lock(
            descriptor,
            f"{run}: another lmr train is at work in this folder; wait for it, stop it, or use another --out",
        )
        for left in run.rglob(".*.tmp"):  # what a killed run was writing
            left.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)


def states_folder(run: Path) -> Path:
    """Where the checkpoints lie."""
    return run / "checkpoints"


def begin_or_go_on(run: Path, resume: str, preset: str, config: TrainConfig, dataset: Mapping[str, Any]) -> Path | None:
    """The checkpoint to go on from, None to begin; writes RUN/recipe.json at the beginning.

    `resume`: "auto" goes on from the latest checkpoint where there is one; "never" refuses a folder that has one;
    otherwise the path of a checkpoint.
    Raises LmrError when the run began with another recipe or dataset, naming what differs.
    """
    path = run / "recipe.json"
    found = checkpoints(states_folder(run))
    if resume == "never" and found:
        raise LmrError(f"{run}: holds a run of {found[-1].stem}; go on with --resume auto, or use another --out")
    start = Path(resume) if resume not in ("auto", "never") else (found[-1] if found else None)
    if start is not None and not start.is_file():
        raise LmrError(f"--resume {start}: no such checkpoint; give auto, never or a file of {states_folder(run)}")
    if path.exists() and (found or start is not None):
        began = read_json(path)
        parts = [began.get(name) for name in ("recipe", "dataset")] if isinstance(began, dict) else [None]
        whole = all(isinstance(part, dict) for part in parts)
        if not whole or began.get("format") != FORMAT or began.get("version") != VERSION:
            raise LmrError(f"{path}: not the recipe of a run of this version; use another --out")
        refuse_changes(run, began["recipe"], config)
        if began["dataset"]["fingerprint"] != dataset["fingerprint"]:
            raise LmrError(
                f"{run}: the run began with another dataset ({began['dataset']['path']}, fingerprint "
                f"{began['dataset']['fingerprint']}, now {dataset['fingerprint']}); use the same, or another --out"
            )
    facts = {"format": FORMAT, "version": VERSION, "preset": preset, "recipe": config.model_dump(mode="json")}
    write_json(path, facts | {"dataset": dict(dataset)})
    return start


def dataset_facts(store: SampleStore) -> dict[str, Any]:
    """What a run records of its training groups; the fingerprint is over their ids and the sha256 of their bytes."""
    digest = hashlib.sha256(store.group_ids.tobytes() + store.sha256.tobytes()).hexdigest()
    return {"path": store.root, "fingerprint": digest[:16], "groups": len(store), "size": store.size}
