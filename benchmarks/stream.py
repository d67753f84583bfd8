"""Samples per second of the training stream against bare decoding and resizing of the same samples, in the same run.

    python -m benchmarks.stream [--dataset DATASET] [--crop 160] [--samples 96] [--rounds 3] [--workers 0 1 2] [--json]

Bare: one process, the PNG data already in memory, Pillow decodes just the pictures that are used, cuts, makes the LR
and its enlargement. The stream does the same with everything around it: ranges read from the shards, sha256, JSON
checked, drawn, turned, stacked, float32; in this process (0) or with --workers of its own. Rounds alternate, ratios
are medians of rounds. What workers had made ahead is taken before the clock starts. `cpu_ratio` compares processor
time, that of the workers included, and hardly feels other programs. Without --dataset a generated one is read (blurred
noise, PNGs of about the size of photos').
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from PIL import Image as PilImage
from PIL import ImageFilter

from benchmarks.machine import hardware
from lmr_tools.images import downscale, upscale
from lmr_tools.schema import Group, Reference, SampleRow, ShardRow, Split, Tier
from lmr_tools.shards import write_shard
from lmr_tools.stream import open_samples
from lmr_tools.tables import sha256_file, write_json, write_rows
from mrefsr.data import train_batches
from mrefsr.sampling import SampleRule, SceneMap, choose_references, plan_sample

BATCH = 4
SEED = 1
PREFETCH = 2


def bare(dataset: Path, rule: SampleRule, count: int) -> Callable[[], int]:
    """A function that decodes and resizes `count` samples of the run whose PNG data it holds; returns how many."""
    store = open_samples(dataset, "train")
    scenes = SceneMap(store.scenes)
    jobs: list[tuple[Any, list[bytes]]] = []
    for position in range(count):
        plan = plan_sample(position, rule=rule, seed=SEED, size=store.size, scenes=scenes, count=len(store))
        sample = store.read([plan.number])[0]
        right, _, _ = choose_references(plan, sample.references, 0)
        names = ["target.png", *(f"ref{number}.png" for number in right)]
        jobs.append((plan, [sample.members[name] for name in names]))

    def run() -> int:
        for plan, pictures in jobs:
            window = (slice(plan.y, plan.y + rule.crop), slice(plan.x, plan.x + rule.crop))
            shown = [np.array(PilImage.open(io.BytesIO(data)))[window] for data in pictures]
            upscale(downscale(shown[0]))
        return len(jobs)

    return run


def stream(dataset: Path, rule: SampleRule, count: int, workers: int) -> tuple[float, float]:
    """Wall and processor seconds (workers included) for `count` samples, in the steady state."""
    batches = train_batches(dataset, rule=rule, batch_size=BATCH, seed=SEED, workers=workers, prefetch=PREFETCH)
    for _ in range(1 + workers * PREFETCH):
        next(batches)
    started = psutil.Process().children()
    wall, cpu = time.perf_counter(), processor_seconds(started)
    for _ in range(count // BATCH):
        next(batches)
    spent = time.perf_counter() - wall, processor_seconds(started) - cpu
    batches.close()
    return spent


def processor_seconds(children: list[psutil.Process]) -> float:
    """Processor time so far of this process and of running ones."""
    return time.process_time() + sum(sum(child.cpu_times()[:2]) for child in children)


def measure(dataset: Path, rule: SampleRule, count: int, rounds: int, several: Sequence[int]) -> dict[str, Any]:
    plain = bare(dataset, rule, count)
    plain()
    walls: dict[str, list[float]] = {"bare": [], **{f"workers_{n}": [] for n in several}}
    processor: dict[str, list[float]] = {f"workers_{n}": [] for n in several}
    for _ in range(rounds):
        wall, cpu = time.perf_counter(), time.process_time()
        plain()
        walls["bare"].append(time.perf_counter() - wall)
        cpu = time.process_time() - cpu
        for workers in several:
            spent = stream(dataset, rule, count, workers)
            walls[f"workers_{workers}"].append(spent[0])
            processor[f"workers_{workers}"].append(cpu / spent[1])
    ratios = {
        name: [b / v for b, v in zip(walls["bare"], values, strict=True)]
        for name, values in walls.items()
        if name != "bare"
    }
    return {
        "samples_per_s": {name: round(count / statistics.median(values), 1) for name, values in walls.items()},
        "ratio": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "ratio_rounds": {name: [round(value, 2) for value in values] for name, values in ratios.items()},
        "cpu_ratio": {name: round(statistics.median(values), 3) for name, values in processor.items()},
    }


def generated(folder: Path, groups: int = 24, size: int = 300) -> Path:
    """A dataset of blurred noise; the two tables and the manifest that a stream reads, and one tar."""
    random = np.random.default_rng(0)

    def picture() -> Any:
        noise = PilImage.fromarray(random.integers(0, 256, (size, size, 3), dtype=np.uint8))
        return np.array(noise.filter(ImageFilter.GaussianBlur(1.5)))

    def group(number: int) -> Group:
        references = tuple(
            Reference(
                pixels=picture(),
                image_id=f"r{slot}",
                path="",
                slot=f"L{slot}",
                tier=Tier.LOW,
                overlap=0.5,
                scale_ratio=0.5,
                clip_score=None,
                x=0,
                y=0,
            )
            for slot in range(5)
        )
        return Group(
            group_id=f"g{number}",
            scene=str(number),
            split=Split.TRAIN,
            target=picture(),
            target_image="t",
            target_path="",
            target_x=0,
            target_y=0,
            references=references,
        )

    written = write_shard(folder / "shards" / "train-000000.tar", map(group, range(groups)))
    write_rows(folder / "tables" / "shards.parquet", [written.row], ShardRow)
    write_rows(folder / "tables" / "samples.parquet", written.samples, SampleRow)
    tables = {path.stem: {"sha256": sha256_file(path)} for path in (folder / "tables").iterdir()}
    manifest = {"format": "lmr-dataset", "version": 1, "recipe": {"size": size}, "tables": tables}
    write_json(folder / "dataset.json", manifest)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--crop", type=int, default=160)
    parser.add_argument("--samples", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="numbers of processes that read")
    parser.add_argument("--json", action="store_true", help="only the last line, JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the workers have the other cores
    with tempfile.TemporaryDirectory() as folder:
        dataset = options.dataset or generated(Path(folder))
        rule = SampleRule(crop=options.crop)
        result = measure(dataset, rule, options.samples // BATCH * BATCH, options.rounds, options.workers)
    result |= {"dataset": "given" if options.dataset else "generated", "crop": options.crop}
    result |= {"samples": options.samples, "batch": BATCH, "load": round(os.getloadavg()[0], 1)} | hardware()
    if not options.json:
        for key, value in result.items():
            print(f"{key:<16} {value}")
    print(json.dumps({"benchmark": "stream", **result}))


if __name__ == "__main__":
    main()
