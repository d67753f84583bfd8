"""What a build of one's photos costs and how right its labels are.

    python -m benchmarks.build --data PHOTOS [--copies N] [--json] [-- build-dataset options]

PHOTOS holds one folder per scene; the build does not see them (`--scenes none`): they only judge the result. Reports
seconds and peak memory of each stage (`end`: starting, tables, card, pictures), photos/s end to end, peak memory of all
processes together, the share of references that are of the target's true scene per tier, and the share of photos that
got a full group. `--copies N` multiplies the photos by N generated views of each (crop, zoom, exposure), to see how
costs grow with the corpus.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
from PIL import Image

from benchmarks.machine import hardware

STAGE = re.compile(r"^(\w+)\s+(\d+) in ([\d.]+) s", re.MULTILINE)


def main() -> None:
    """Parse, build, judge, print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of scene folders")
    parser.add_argument("--copies", type=int, default=1, help="views per photo; 1 takes the photos as they are")
    parser.add_argument("--limit", type=int, help="at most so many photos")
    parser.add_argument("--same", action="append", default=[], metavar="A=B", help="two labels that are one place")
    parser.add_argument("--keep", type=Path, help="keep the built dataset here")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("options", nargs="*", help="options of lmr build-dataset, after --")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        photos, labels = _flat(arguments.data, Path(scratch) / "photos", arguments.copies, arguments.limit)
        out = arguments.keep or Path(scratch) / "dataset"
        cost = _build(photos, out, arguments.options)
        same = dict(text.split("=") for text in arguments.same)
        labels = {name: same.get(label, label) for name, label in labels.items()}
        quality = judge(out, labels)
    result = {"benchmark": "build", "photos": len(labels), **hardware(), **cost, **quality}
    if not arguments.json:
        for key, value in result.items():
            print(f"{key:<24} {value}")
    print(json.dumps(result))


def _flat(data: Path, folder: Path, copies: int, limit: int | None) -> tuple[Path, dict[str, str]]:
    """All photos in one folder under numbers, so that nothing of their scene shows; label by file name."""
    folder.mkdir()
    labels: dict[str, str] = {}
    paths = sorted(p for p in data.glob("*/*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
    for number, path in enumerate(paths):
        for copy in range(copies):
            if limit and len(labels) >= limit:
                break
            name = f"{number:05d}_{copy}{path.suffix if copies == 1 else '.jpg'}"
            if copies == 1:
                (folder / name).symlink_to(path.resolve())
            else:
                _view(path, np.random.default_rng([number, copy])).save(folder / name, quality=92)
            labels[name] = path.parent.name
    return folder, labels


def _view(path: Path, random: np.random.Generator) -> Image.Image:
    picture = Image.open(path).convert("RGB")
    width, height = picture.size
    share = random.uniform(0.75, 1.0)
    left, top = random.uniform(0, 1 - share, 2) * (width, height)
    box = (left, top, left + share * width, top + share * height)
    zoom = max(320 / min(width, height), random.uniform(0.7, 1.0))
    view = picture.resize((round(width * zoom), round(height * zoom)), Image.Resampling.BICUBIC, box)
    return view.point(lambda value: value * gain) if (gain := random.uniform(0.85, 1.0)) else view


def _build(photos: Path, out: Path, options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-c", "from lmr_pipelines.cli import main; main()"]
    command += ["build-dataset", str(photos), "--out", str(out), *options]
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        running = subprocess.Popen(command, stderr=log, stdout=log)
        seen: list[tuple[int, int]] = []  # length of the log and memory, over time
        while running.poll() is None:
            looked = time.perf_counter()
            seen.append((os.fstat(log.fileno()).st_size, _memory(running.pid)))
            # A look takes longer the more memory there is: it must not take the build's time.
            time.sleep(max(0.1, 30 * (time.perf_counter() - looked)))
        seconds = time.perf_counter() - start
        log.seek(0)
        text = log.read()
    if running.returncode:
        sys.exit(f"benchmarks.build: the build failed: {text[-600:]}")
    stages: dict[str, dict[str, float]] = {}
    begin = 0
    lines = [(m[1], m.end(), float(m[3])) for m in STAGE.finditer(text)]
    # What runs between two stages (near duplicates, mining) counts to the later one, tables to "end".
    for name, end, spent in [*lines, ("end", len(text) + 1, 0.0)]:
        during = [memory for length, memory in seen if begin <= length < end]
        during = during or [memory for length, memory in seen if length >= begin][:1]  # shorter than a look
        stages[name] = {"seconds": spent, "peak_mb": round(max(during, default=0) / 2**20)}
        begin = end
    stages["end"]["seconds"] = round(seconds - sum(cost["seconds"] for cost in stages.values()), 1)
    return {
        "seconds": round(seconds, 1),
        "photos_per_second": round(len(list(photos.iterdir())) / seconds, 3),
        "stages": stages,
        "peak_memory_mb": round(max((memory for _, memory in seen), default=0) / 2**20),
    }


def _memory(pid: int) -> int:
    """Memory of a process and its children; pages that they share count once (USS)."""
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().uss
    except psutil.Error:
        pass  # a process ended while it was looked at
    return total


def judge(out: Path, labels: dict[str, str]) -> dict[str, Any]:
    """Share of references of the target's true scene, per tier of the pair, and of photos with a full group."""
    tables = {name: pd.read_parquet(out / "tables" / f"{name}.parquet") for name in ("images", "groups", "pairs")}
    label = tables["images"].set_index("image_id")["path"].map(labels)
    groups = tables["groups"]
    right = label[groups["target_image"]].to_numpy() == label[groups["ref_image"]].to_numpy()
    graded = tables["pairs"][tables["pairs"]["tier"].notna()]
    pair_right = label[graded["target_image"]].to_numpy() == label[graded["ref_image"]].to_numpy()
    good = tables["images"]["status"] != "rejected"
    found: dict[str, Any] = {
        "groups": int(groups["group_id"].nunique()),
        "full_group_share": round(groups["target_image"].nunique() / max(int(good.sum()), 1), 4),
        "rejected": int((~good).sum()),
    }
    for tier in "HML":
        of_tier = (groups["tier"] == tier).to_numpy()
        found[f"{tier}_right"] = f"{int(right[of_tier].sum())}/{int(of_tier.sum())}"
        of_pairs = (graded["tier"] == tier).to_numpy()
        found[f"{tier}_pairs_right"] = f"{int(pair_right[of_pairs].sum())}/{int(of_pairs.sum())}"
    high = groups["tier"].isin(["H", "M"]).to_numpy()
    found["HM_precision"] = round(float(right[high].mean()), 5) if high.any() else None
    found["L_precision"] = round(float(right[~high].mean()), 5) if (~high).any() else None
    wrong = groups[~right]
    pairs = zip(wrong["target_image"], wrong["ref_image"], wrong["tier"], strict=True)
    found["wrong"] = sorted({f"{label[target]} <- {label[ref]} ({tier})" for target, ref, tier in pairs})[:12]
    return found


if __name__ == "__main__":
    main()
