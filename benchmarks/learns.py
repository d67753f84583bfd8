"""Whether `tiny` learns on one CPU core: `python -m benchmarks.learns --photos SCENES`.

SCENES has one folder of photos per place. They are built into a dataset (`lmr build-dataset --scenes folder`, only
references whose place in the target is verified), of which --held-out of the groups, whole places, are never trained
on. Each pair of --minutes and seed is a run of its own by `mrefsr.train` (what `lmr train tiny` calls), whose number of
steps is chosen, after a few timed ones, to take that many minutes of CPU time in one thread; its cosine ends there.
--steps gives the numbers instead: such a run repeats to the bit. --set and --matcher are those of `lmr train`. Reported
is the CPU time that training really took: reading and decoding shards, VGG features, matching and all, nothing cached
between steps. Loading weights and compiling kernels is outside.

Then the middle --crop pixels of up to --per-scene groups of every held-out place are restored with their own two best
references (right), with two of another held-out place (wrong), with all four (mixed), and without (none). Gains are
means of luma PSNR minus that of Pillow's bicubic, border 4, 8 bits; standard errors are over crops. Pretrained weights
are ImageNet's VGG16; the network starts from random numbers. The last line is JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.machine import hardware
from lmr_tools.metrics import psnr_y
from lmr_tools.stream import SampleStore, open_samples
from mrefsr.checkpoints import save_model
from mrefsr.config import MODEL_PRESETS
from mrefsr.data import Batch, validation_batches
from mrefsr.machines import Machine
from mrefsr.model import MRefSR
from mrefsr.recipes import train_config
from mrefsr.train import Data, train
from mrefsr.training_state import Training, new_training
from mrefsr.watch import Silent

CONTENTS: tuple[Literal["right", "wrong", "none"], ...] = ("right", "wrong", "none")
KINDS = (*CONTENTS, "mixed")
REFERENCES = 2
TIMED = 12  # steps that are timed; the first ones before them are not
FIRST = 4
CPU = Machine(device=torch.device("cpu"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Crop:
    """A held-out crop: its place, and a batch of one for every kind of references."""

    scene: str
    batches: dict[str, Batch]


def build(photos: Path, out: Path, held_out: float, groups_per_photo: int) -> None:
    """The dataset, by the command a person would give. What a folder has already is used again."""
    command = [sys.executable, "-c", "from lmr_pipelines.cli import main; main()", "build-dataset", str(photos)]
    command += ["--out", str(out), "--clip-model", "effnet-lite0", "--scenes", "folder", "--allow-partial"]
    command += ["--high", "1", "--medium", "2", "--low", "0", "--groups-per-photo", str(groups_per_photo)]
    command += ["--set", f"val_share={held_out}", "--set", "test_share=0"]
    subprocess.run(command, check=True, stdout=sys.stderr)


def choose_crops(store: SampleStore, per_scene: int, crop: int) -> list[Crop]:
    """Up to `per_scene` groups of each place that have two references, in the order of the split."""
    chosen: list[Crop] = []
    counts: Counter[int] = Counter()
    sources = {kind: validation_batches(store, crop=crop, references=REFERENCES, content=kind) for kind in CONTENTS}
    for number, right in enumerate(sources["right"]):
        batches = {"right": right, "wrong": next(sources["wrong"]), "none": next(sources["none"])}
        scene = int(store.scenes[number])
        if counts[scene] == per_scene or min(batches[kind].references.shape[1] for kind in CONTENTS[:2]) < REFERENCES:
            continue
        counts[scene] += 1
        batches["mixed"] = _joined(right, batches["wrong"])
        chosen.append(Crop(scene=str(scene), batches=batches))
    return chosen


def _joined(right: Batch, wrong: Batch) -> Batch:
    references = torch.cat([right.references, wrong.references], 1)
    return dataclasses.replace(right, references=references, mask=torch.cat([right.mask, wrong.mask], 1))


def evaluate(model: MRefSR, crops: list[Crop]) -> dict[str, list[float]]:
    """Luma PSNR of every crop, for each kind of references and for bicubic, dB."""
    found: dict[str, list[float]] = {kind: [] for kind in ("bicubic", *KINDS)}
    model.eval()
    for crop in crops:
        target = _picture(crop.batches["right"].target)
        found["bicubic"].append(psnr_y(_picture(crop.batches["right"].enlarged), target))
        for kind, batch in crop.batches.items():
            with torch.inference_mode():
                sr = model(batch.lr, batch.enlarged, batch.references, batch.mask)
            found[kind].append(psnr_y(_picture(sr), target))
    return found


def _picture(image: Tensor) -> Any:
    return (image[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def summary(found: dict[str, list[float]], crops: list[Crop]) -> dict[str, Any]:
    """Means over crops of what `evaluate` found, with standard errors, and the gaps."""
    values = {kind: np.array(numbers) for kind, numbers in found.items()}
    gains = {kind: values[kind] - values["bicubic"] for kind in KINDS}
    pairs = {"right_minus_wrong": ("right", "wrong"), "right_minus_none": ("right", "none"),
             "wrong_minus_none": ("wrong", "none"), "mixed_minus_right": ("mixed", "right")}  # fmt: skip
    differences = gains | {name: values[a] - values[b] for name, (a, b) in pairs.items()}
    gap = differences["right_minus_wrong"]
    scenes = sorted({crop.scene for crop in crops}, key=int)
    return {
        "bicubic_db": round(float(values["bicubic"].mean()), 3),
        **{name: {"mean": round(float(d.mean()), 3), "se": round(_se(d), 3)} for name, d in differences.items()},
        "right_beats_wrong": f"{int((gap > 0).sum())}/{len(gap)}",
        "gap_per_crop": [round(float(value), 2) for value in gap],
        "right_by_scene": {
            s: round(float(np.mean([g for g, c in zip(gains["right"], crops, strict=True) if c.scene == s])), 2)
            for s in scenes
        },
    }


def _se(values: np.ndarray[Any, Any]) -> float:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0


def run(
    store: SampleStore, seed: int, steps: int, settings: dict[str, Any], matcher: Path | None
) -> tuple[Training, float]:
    """A run of `steps`, and the CPU seconds it took."""
    values = {"seed": seed, "steps": steps, "validate_groups": 0, "checkpoint_every": 10**6, "workers": 0}
    config = train_config("tiny", None, settings | values | {"warmup": min(50, steps - 1)})
    training = new_training(config, CPU.device, matcher=matcher)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        data = Data(train=store, held_out=None)
        train(training, data, Path(folder), CPU, facts={}, provenance={"by": "benchmarks.learns"}, show=Silent())
        return training, time.process_time() - start


def seconds_per_step(store: SampleStore, settings: dict[str, Any], matcher: Path | None) -> float:
    """CPU seconds of one step, after the first ones."""
    _, few = run(store, 0, FIRST, settings, matcher)
    _, more = run(store, 0, FIRST + TIMED, settings, matcher)
    return (more - few) / TIMED


def lengths(args: argparse.Namespace, store: SampleStore, settings: dict[str, Any]) -> dict[str, int]:
    """{name of a length: its steps}."""
    if args.steps:
        return {f"{steps}steps": steps for steps in args.steps}
    step = seconds_per_step(store, settings, args.matcher)
    return {f"{minutes:g}min": max(2, round(60 * minutes / step)) for minutes in args.minutes}


def report(args: argparse.Namespace, dataset: Path) -> dict[str, Any]:
    settings = dict(pair.split("=", 1) for pair in args.set)
    train_store, held = open_samples(dataset, "train"), open_samples(dataset, "val")
    crops = choose_crops(held, args.per_scene, args.crop)
    rows = []
    run(train_store, 0, FIRST, settings, args.matcher)  # kernels are compiled
    for length, steps in lengths(args, train_store, settings).items():
        for seed in range(args.first_seed, args.first_seed + args.seeds):
            training, seconds = run(train_store, seed, steps, settings, args.matcher)
            row = {"length": length, "seed": seed, "steps": steps, "cpu_minutes": round(seconds / 60, 2)}
            row |= summary(evaluate(training.averaged, crops), crops)
            rows.append(row)
            print_row(row, sys.stderr if args.json else sys.stdout)
            if args.save:
                args.save.mkdir(parents=True, exist_ok=True)
                about = {key: row[key] for key in ("seed", "steps", "cpu_minutes", "right", "wrong")}
                path = args.save / f"tiny-{length}-seed{seed}.safetensors"
                save_model(path, training.averaged, {"by": "benchmarks.learns"} | about)
    found: dict[str, Any] = {"benchmark": "learns", "preset": "tiny", "settings": settings} | hardware()
    found |= {"matcher": args.matcher.name if args.matcher else "ImageNet VGG16", "sharp": args.sharp}
    found |= {"torch": torch.__version__, "train_groups": len(train_store), "crops": len(crops), "crop": args.crop}
    found |= {"held_out_scenes": len({crop.scene for crop in crops})}
    return found | {"runs": rows, "means": means(rows)}


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and range over the seeds, for each length."""
    found = []
    for length in dict.fromkeys(row["length"] for row in rows):
        same = [row for row in rows if row["length"] == length]
        names = (*KINDS, "right_minus_wrong", "right_minus_none", "wrong_minus_none", "mixed_minus_right")
        values = {name: [row[name]["mean"] for row in same] for name in names}
        spread = {n: [round(statistics.mean(v), 3), min(v), max(v)] for n, v in values.items()}
        found.append({"length": length, "seeds": len(same)} | spread)
    return found


def print_row(row: dict[str, Any], file: Any) -> None:
    told = "  ".join(f"{kind} {row[kind]['mean']:+.2f}" for kind in KINDS)
    gap, none = row["right_minus_wrong"], row["wrong_minus_none"]
    print(
        f"{row['steps']} steps (CPU {row['cpu_minutes']:.2f} min), seed {row['seed']}: bicubic "
        f"{row['bicubic_db']:.2f} dB  {told}  right - wrong {gap['mean']:.2f} +- {gap['se']:.2f}, "
        f"{row['right_beats_wrong']} crops  wrong - none {none['mean']:+.2f}",
        file=file,
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--photos", type=Path, help="folder of folders of photos, each a place")
    source.add_argument("--dataset", type=Path, help="a dataset that --photos built before (see --out)")
    parser.add_argument("--out", type=Path, help="where --photos builds to; a temporary folder otherwise")
    parser.add_argument("--groups-per-photo", type=int, default=6)
    parser.add_argument("--held-out", type=float, default=0.3, help="share of the groups held out")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 5.0], help="of CPU time, a run each")
    parser.add_argument("--steps", type=int, nargs="+", help="a run each, instead of --minutes")
    parser.add_argument("--seeds", type=int, default=2, help="runs for each length")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a key of the recipe")
    parser.add_argument("--matcher", type=Path, help="matching weights by lmr train-matcher, else ImageNet's VGG16")
    parser.add_argument(
        "--sharp", action="store_true", help="match references as they are; the preset blurs them first"
    )
    parser.add_argument("--crop", type=int, default=128, help="side of the held-out crops")
    parser.add_argument("--per-scene", type=int, default=5, help="held-out crops of one place, at most")
    parser.add_argument("--save", type=Path, help="folder for the trained models")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    args = parser.parse_args()
    if args.sharp:
        MODEL_PRESETS["mrefsr-tiny"] = dataclasses.replace(MODEL_PRESETS["mrefsr-tiny"], blur_references=False)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    if args.dataset:
        found = report(args, args.dataset)
    else:
        with tempfile.TemporaryDirectory() as folder:
            out = args.out or Path(folder) / "dataset"
            build(args.photos, out, args.held_out, args.groups_per_photo)
            found = report(args, out)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
