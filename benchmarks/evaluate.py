"""What evaluation costs beside the model: `lmr evaluate`'s loop against the bare forward passes, in one run.

The bare pass reads every picture and calls the method on it, once in each round; the evaluation does the same, saves
the SR as PNG, scores it and writes its row. Rounds alternate. Scores are computed beside the model: wall time needs a
core for them; the ratio of CPU time says what they take in all.

    python -m benchmarks.evaluate --data FOLDER [--method esrgan --weights FILE] [--metrics psnr_y,ssim_y] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import hardware
from lmr_tools.protocol import Item
from lmr_tools.testsets import read_items
from mrefsr.evaluation import METRICS, evaluate, load_metrics
from mrefsr.evaluation_plan import make_settings, plan_jobs, plan_run
from mrefsr.systems import load_method


def quietly(items: Iterable[Any], total: int, label: str) -> Iterator[Any]:
    """No progress."""
    yield from items


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--benchmark", default="folder")
    parser.add_argument("--method", default="esrgan")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--metrics", default=",".join(METRICS))
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the model")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    settings = make_settings(
        benchmark=options.benchmark, data=options.data, split="test", protocol="native", method=options.method,
        weights=options.weights, label=None, count=None, tiers=(), policy=None,
    )  # fmt: skip
    jobs = plan_jobs(settings, plan_run(settings), options.limit)
    restore = load_method(options.method, options.weights, device)
    compare = load_metrics(options.metrics.split(","), device)

    def bare() -> None:
        items = read_items([job.entry for job in jobs], benchmark=settings.benchmark, protocol=settings.protocol)
        for _, item in items:
            assert isinstance(item, Item), item
            restore(item.lr, item.references)

    def whole() -> None:
        with tempfile.TemporaryDirectory() as folder:
            done = evaluate(Path(folder), settings, jobs, restore, compare, device, quietly)
            assert done.made == len(jobs) and not done.failed

    whole()  # warm
    walls: dict[str, list[float]] = {"bare": [], "whole": []}
    cpus: dict[str, list[float]] = {"bare": [], "whole": []}
    for _ in range(options.rounds):
        for name, call in (("bare", bare), ("whole", whole)):
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(time.process_time() - cpu)
    ratios = [whole / bare for whole, bare in zip(walls["whole"], walls["bare"], strict=True)]
    result = {
        "benchmark": "evaluate",
        "method": options.method,
        "metrics": options.metrics,
        "pictures": len(jobs),
        "threads": options.threads,
        "bare_s": round(statistics.median(walls["bare"]), 3),
        "wall_ratio": round(statistics.median(ratios), 3),
        "wall_ratios": [round(ratio, 3) for ratio in ratios],
        "cpu_ratio": round(statistics.median(cpus["whole"]) / statistics.median(cpus["bare"]), 3),
        **hardware(),
    }
    if not options.json:
        print(
            f"{options.method}, {len(jobs)} pictures: evaluation takes {result['wall_ratio']} of the bare passes' time"
        )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
