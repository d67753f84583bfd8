"""How well MRefSR's matching features find known correspondences, before and after a few CPU minutes of
`lmr train-matcher`: `python -m benchmarks.matcher --dataset DATASET`.

Held-out pairs: one window of each target crop of the splits val and test (other scenes than train), 160 px, seen
through a random homography with a photometric change. The window is brought down and up x4 (`LR`) or not (`sharp`),
the warped one is sharp, or blurred the same way, as the tiny preset does it. Matching is MRefSR's: 3x3 patches, exact.
A patch counts as right when its match is within 1 (2) cells of 4x4 px of the true place; shares are means over pairs,
with standard errors.

ImageNet's VGG16 is the start and the comparison. Teacher and student are trained on the split train with small crops
and batches, so this shows learning, not what the published 5k and 75k steps at crop 160 reach. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import hardware
from lmr_tools.stream import SampleStore, open_samples
from mrefsr.correspondence import Pairs, match_errors
from mrefsr.features import MatchingExtractor, load_imagenet_extractor
from mrefsr.matcher_run import MatcherConfig, new_run
from mrefsr.model import _blur
from mrefsr.train_matcher import RESULT, pair_batches, train_matcher
from mrefsr.watch import Silent

CPU = torch.device("cpu")
LIMITS = (1, 2)
SEEN = ("LR to sharp", "LR to blurred", "sharp to sharp")


def held_out_pairs(stores: list[SampleStore], crop: int) -> Iterator[Pairs]:
    """One pair of each group, one by one."""
    config = MatcherConfig(stage="teacher", steps=1, batch=1, crop=crop, shift=crop / 16)
    for store in stores:
        yield from pair_batches(store, config, 0, len(store), held_out=True)


@torch.no_grad()
def measure(extractor: MatchingExtractor, stores: list[SampleStore], crop: int, seen: str) -> dict[str, float]:
    """Mean share within each limit over pairs, and its standard error."""
    shares = []
    for pairs in held_out_pairs(stores, crop):
        image = pairs.image if seen.startswith("sharp") else pairs.enlarged
        warped: Tensor = _blur(pairs.warped) if seen.endswith("blurred") else pairs.warped
        errors = match_errors(extractor(image, warped), pairs.place)
        shares.append([float((errors <= limit).double().mean()) for limit in LIMITS])
    values = torch.tensor(shares, dtype=torch.float64)
    found = {f"within_{limit}": float(values[:, at].mean()) for at, limit in enumerate(LIMITS)}
    return found | {"error_1": float(values[:, 0].std()) / math.sqrt(len(values)), "pairs": float(len(values))}


def trained(
    stage: str,
    store: SampleStore,
    folder: Path,
    steps: int,
    options: argparse.Namespace,
    seed: int,
    teacher: Path | None,
) -> tuple[MatchingExtractor, float]:
    """A matcher after `steps`, and the CPU seconds that took."""
    config = MatcherConfig(
        stage=stage,  # type: ignore[arg-type]
        steps=steps,
        batch=options.batch,
        crop=options.train_crop,
        shift=options.train_crop / 16,
        lr=options.lr,
        seed=seed,
        checkpoint_every=10**9,
    )
    run = new_run(config, CPU, start=None, teacher=teacher)
    begun = time.process_time()
    train_matcher(run, store, None, folder, facts={}, provenance={"stage": stage}, show=Silent())
    return run.extractor.eval(), time.process_time() - begun


def main() -> None:
    """Print a table and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="a built dataset with the splits train, val and test")
    parser.add_argument("--teacher-steps", type=int, default=60)
    parser.add_argument("--student-steps", type=int, nargs="+", default=[30, 120], help="one student for each")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--train-crop", type=int, default=96)
    parser.add_argument("--crop", type=int, default=160, help="of the held-out pairs")
    parser.add_argument("--json", action="store_true", help="only the line of JSON")
    options = parser.parse_args()
    store = open_samples(options.dataset, "train")
    others = [open_samples(options.dataset, split) for split in ("val", "test")]
    rows: list[dict[str, object]] = []

    def report(name: str, extractor: MatchingExtractor, cpu_seconds: float, kinds: tuple[str, ...]) -> None:
        for seen in kinds:
            found = measure(extractor, others, options.crop, seen)
            rows.append({"matcher": name, "seen": seen, "cpu_s": round(cpu_seconds), **found})
            if not options.json:
                print(
                    f"{name:<28} {seen:<15} within 1 {found['within_1']:.3f} +- {found['error_1']:.3f}  within 2 "
                    f"{found['within_2']:.3f}  {found['pairs']:.0f} pairs  {cpu_seconds:.0f} CPU s",
                    flush=True,
                )

    imagenet = MatchingExtractor().eval()
    load_imagenet_extractor(imagenet)
    report("ImageNet VGG16", imagenet, 0, SEEN)
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "teacher"
            folder.mkdir()
            extractor, spent = trained("teacher", store, folder, options.teacher_steps, options, seed, None)
            report(f"teacher {options.teacher_steps}, seed {seed}", extractor, spent, SEEN[2:])
            for steps in options.student_steps:
                own = Path(scratch) / f"student-{steps}"
                own.mkdir()
                extractor, more = trained("student", store, own, steps, options, seed, folder / RESULT)
                report(f"student {steps}, seed {seed}", extractor, spent + more, SEEN[:2])
    arguments = {key: value for key, value in vars(options).items() if key not in ("dataset", "json")}
    print(
        json.dumps(
            {"benchmark": "matcher", "rows": rows, "arguments": arguments, "train_groups": len(store)} | hardware()
        )
    )


if __name__ == "__main__":
    main()
