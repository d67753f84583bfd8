"""How time and memory of the middle of a build grow with the corpus: near duplicates, mining, grouping, tables.

    python -m benchmarks.scale [--rows 10000 100000 1000000] [--stages duplicates mining grouping] [--json]

The corpus is generated: photos have one vector each and no pixels, so target crops are not placed (the slots of every
group are filled by the build's own rule, at corner 0, 0). Its statistics are those measured on 261 photos of 22 places
with effnet-lite0: squared length of the mean vector .317, variance between places .474 and within .215, power-law
spectrum with about 25 effective directions, 12 photos a place. Differing places of the real photos have cosines with a
long upper tail (median .28, 95 % .51, 99 % .66), which one Gaussian does not give: the variance between places is drawn
in three levels (40 kinds, kinds of 24 places, places). Pairs of one place are verified with overlaps and scales
drawn from the range of real pairs; others are not. Without the stage `mining`, a photo's candidates are those of its
place and others of its kind, by their true scores.

Every size runs in a process of its own. Peak memory is the resident set, mapped file pages included; the slope is that
of log time over log rows between a size and the one before.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from benchmarks.machine import hardware
from lmr_tools.config import BuildConfig
from lmr_tools.dataset import table_path
from lmr_tools.grading import Corpus, candidate_rows, pair_rows, scenes_of, tasks, unmatched_chains
from lmr_tools.groups import Counts, PlannedGroup, PlannedReference, choose
from lmr_tools.index import Mined, mine_candidates, near_pairs
from lmr_tools.pairs import PAIR_NUMBERS
from lmr_tools.schema import CandidateRow, GroupRow, ImageRow, PairRow
from lmr_tools.sharding import group_rows, plan_shards
from lmr_tools.tables import write_rows
from lmr_tools.tiers import TierRule

PLACE, PLACES, KINDS = 12, 24, 40  # photos of a place, places of a kind of place, kinds at the top
BLOCK = PLACE * PLACES * 200
STAGES = ("duplicates", "mining", "grouping")  # the last one is chains, groups, shards' plans and tables
Result = TypeVar("Result")


def main() -> None:
    """Run every size in a fresh process; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--k", type=int, default=32, help="candidates mined per photo")
    parser.add_argument("--kind", default="auto", help="kind of index: auto, flat, ivf, ivf-sketch")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="what to measure")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_measure(arguments.rows[0], arguments)))
        return
    sizes = []
    for rows in arguments.rows:
        command = [sys.executable, "-m", "benchmarks.scale", "--one", "--rows", str(rows), "--kind", arguments.kind]
        command += ["--dimension", str(arguments.dimension), "--k", str(arguments.k), "--stages", *arguments.stages]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        sizes.append(json.loads(done.stdout.splitlines()[-1]))
        if not arguments.json:
            _show(sizes)
    print(json.dumps({"benchmark": "scale", **hardware(), "sizes": sizes, "slopes": _slopes(sizes)}))


def _show(sizes: list[dict[str, Any]]) -> None:
    last, slopes = sizes[-1], _slopes(sizes)
    about = {name: value for name, value in last.items() if name != "stages"}
    print(*(f"{name} {value}" for name, value in about.items()), sep=", ")
    for stage, cost in last["stages"].items():
        slope = f"slope {slopes[stage][-1]:.2f}" if slopes.get(stage) else ""
        print(f"  {stage:<12} {cost['seconds']:9.1f} s {cost['peak_mb']:8.0f} MB  {slope}", flush=True)


def _slopes(sizes: list[dict[str, Any]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for less, more in itertools.pairwise(sizes):
        for stage in more["stages"]:
            ratio = more["stages"][stage]["seconds"] / max(less["stages"][stage]["seconds"], 1e-3)
            found.setdefault(stage, []).append(round(math.log(ratio) / math.log(more["rows"] / less["rows"]), 3))
    return found


def _measure(rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    stages: dict[str, dict[str, float]] = {}

    def timed(name: str, stage: Callable[[], Result]) -> Result:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        start = time.perf_counter()
        result = stage()
        status = Path("/proc/self/status").read_text()
        peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
        stages[name] = {"seconds": round(time.perf_counter() - start, 2), "peak_mb": round(peak / 1024)}
        print(f"{rows} {name} {stages[name]}", file=sys.stderr, flush=True)
        return result

    config, random = BuildConfig.model_validate({}), np.random.default_rng(1)
    with tempfile.TemporaryDirectory() as scratch:
        vectors = generated(Path(scratch) / "vectors.npy", rows, arguments.dimension)
        found: dict[str, Any] = {"rows": rows, "k": arguments.k, "dimension": arguments.dimension, "stages": stages}
        if "duplicates" in arguments.stages:
            near = timed("duplicates", lambda: near_pairs(vectors[:, 0], threshold=config.near_score))
            found["near_pairs"] = len(near)
            del near
        if "mining" in arguments.stages:
            mined = timed("mining", lambda: mine_candidates(vectors, arguments.k, kind=arguments.kind))
            found |= {"kind": mined.kind, "recall": mined.recall}
        elif "grouping" in arguments.stages:
            mined = _drawn(vectors, arguments.k, random)
        if "grouping" not in arguments.stages:
            return found
        corpus = Corpus(
            rows=[_photo(number) for number in range(rows)],
            vectors=vectors,
            candidates=mined.numbers,
            scores=mined.scores,
            numbers=_numbers(mined.numbers[:, : config.candidates], random),
            rule=TierRule(),
            labelled=False,
        )
        timed("chains", lambda: unmatched_chains(rows, corpus.numbers, corpus.rule))
        shards = timed("grouping", lambda: _shards(corpus, config))
        found["groups"] = sum(len(shard.groups) for shard in shards)
        out = Path(scratch) / "dataset"

        def tables() -> None:
            write_rows(table_path(out, "images"), corpus.rows, ImageRow)
            write_rows(table_path(out, "candidates"), candidate_rows(corpus), CandidateRow)
            write_rows(table_path(out, "pairs"), (row for part in pair_rows(corpus, {}) for row in part), PairRow)
            write_rows(table_path(out, "groups"), group_rows(shards), GroupRow)

        timed("tables", tables)
        found["table_mb"] = round(sum(path.stat().st_size for path in out.rglob("*.parquet")) / 2**20)
    return found


def generated(path: Path, rows: int, dimension: int) -> npt.NDArray[np.float16]:
    """Unit vectors (rows, 1, dimension) in a memory-mapped file, with the statistics this module's text names."""
    spread = (np.arange(dimension) + 2.0) ** -1.25
    spread = np.sqrt(spread / spread.sum()).astype(np.float32)
    random = np.random.default_rng(0)

    def draw(count: int, variance: float) -> npt.NDArray[np.float32]:
        drawn: npt.NDArray[np.float32] = (
            random.standard_normal((count, dimension), dtype=np.float32) * spread * np.float32(variance**0.5)
        )
        return drawn

    middle = draw(1, 1.0)
    middle *= 0.317**0.5 / np.linalg.norm(middle)
    top = middle + draw(KINDS, 0.2)
    out = np.lib.format.open_memmap(path, "w+", np.float16, (rows, 1, dimension))
    for start in range(0, rows, BLOCK):
        count = min(BLOCK, rows - start)
        kinds = top[random.integers(0, KINDS, 200)] + draw(200, 0.12)
        places = np.repeat(kinds, PLACES, 0) + draw(200 * PLACES, 0.154)
        photos = np.repeat(places, PLACE, 0)[:count] + draw(count, 0.215)
        out[start : start + count, 0] = photos / np.linalg.norm(photos, axis=1, keepdims=True)
    out.flush()
    mapped: npt.NDArray[np.float16] = np.load(path, mmap_mode="r")
    return mapped


def _drawn(vectors_NVD: npt.NDArray[np.float16], k: int, random: np.random.Generator) -> Mined:
    """Candidates without an index: the rest of a photo's place, others of the kind around it, best first."""
    count, span = len(vectors_NVD), PLACE * PLACES
    numbers, scores = np.full((count, k), -1, np.int32), np.full((count, k), -np.inf, np.float32)
    for start in range(0, count, span):
        kind = vectors_NVD[start : start + span, 0].astype(np.float32)
        product = kind @ kind.T
        own = np.arange(len(kind))
        rank = product + random.uniform(0, 0.2, product.shape).astype(np.float32)
        rank[own[:, None] // PLACE == own // PLACE] += 4
        rank[own, own] = -np.inf
        chosen = np.argsort(-rank, axis=1)[:, : min(k, len(kind) - 1)]
        chosen = np.take_along_axis(chosen, np.argsort(-np.take_along_axis(product, chosen, 1), axis=1), 1)
        part = slice(start, start + len(kind))
        numbers[part, : chosen.shape[1]] = start + chosen
        scores[part, : chosen.shape[1]] = np.take_along_axis(product, chosen, 1)
    return Mined(numbers=numbers, scores=scores, recall=0.0, kind="drawn")


def _photo(number: int) -> ImageRow:
    digest = hashlib.sha256(str(number).encode()).hexdigest()
    return ImageRow(
        image_id=digest[:16],
        path=f"crawl/{number // 1000:05d}/{digest[:24]}.jpg",
        width=1024,
        height=768,
        sha256=digest,
        scene=None,
        status="unused",
        source=0,
        offset=None,
        bytes=300_000,
        phash=digest,
        sharpness=500.0,
        texture=0.8,
        no_target=None,
    )


def _numbers(candidates: npt.NDArray[np.int32], random: np.random.Generator) -> npt.NDArray[np.void]:
    """PAIR_NUMBERS of all candidate pairs: those of one place verified (9 of 10), the others not."""
    ends = np.sort(np.stack([np.repeat(np.arange(len(candidates)), candidates.shape[1]), candidates.ravel()], 1), 1)
    ends = np.unique(ends[ends[:, 0] >= 0], axis=0)
    numbers = np.zeros(len(ends), PAIR_NUMBERS)
    numbers["a"], numbers["b"] = ends[:, 0], ends[:, 1]
    one = (ends[:, 0] // PLACE == ends[:, 1] // PLACE) & (random.random(len(ends)) < 0.9)
    inliers = np.where(one, random.geometric(1 / 200, len(ends)) + 16, random.integers(4, 14, len(ends)))
    numbers["inliers"] = inliers
    numbers["consistent"] = np.where(one, inliers * random.uniform(0.8, 1, len(ends)), inliers * 0.4)
    numbers["matches"] = inliers * 3 // 2
    share = random.beta(0.9, 2, len(ends))
    numbers["overlap_a"], numbers["overlap_b"] = share, share * random.uniform(0.6, 1, len(ends))
    numbers["scale_log2"] = random.normal(0, 0.3, len(ends))
    numbers["scale_ratio"] = 2.0 ** -np.abs(numbers["scale_log2"])
    return numbers


def _shards(corpus: Corpus, config: BuildConfig) -> list[Any]:
    counts = Counts(high=1, medium=2, low=2, strict_tiers=False, allow_partial=False)
    groups = []
    for task in tasks(corpus):
        chosen = choose(task.options, counts)
        if chosen is not None:
            references = tuple(
                PlannedReference(
                    image_id=option.row.image_id,
                    slot=slot,
                    tier=str(option.tier),
                    overlap=option.overlap,
                    scale_ratio=option.scale_ratio,
                    clip_score=option.clip_score,
                    x=0,
                    y=0,
                    landing="matched",
                )
                for slot, option in chosen
            )
            groups.append(PlannedGroup(target_image=task.target.image_id, x=0, y=0, references=references))
    scene_of = dict(zip([row.image_id for row in corpus.rows], scenes_of(corpus), strict=True))
    return plan_shards(
        groups,
        {row.image_id: row for row in corpus.rows},
        scene_of,
        size=config.size,
        val_share=config.val_share,
        test_share=config.test_share,
        seed=0,
        shard_samples=config.shard_samples,
    )


if __name__ == "__main__":
    main()
