"""One training step of the full network against the published way, in one run: `python -m benchmarks.train_step`.

The `mrefsr` preset with RANDOM weights; batch 1, a target crop of --crop pixels, --references references of that size;
L1 loss, backward, Adam. The published way is `benchmarks.published_mrefsr` under autograd (references one by one, a
convolution with every patch for the matching, torchvision's deformable convolution, every inner value kept). Ours is
`MRefSR.forward` as `lmr train` calls it, with and without `recompute`. Each runs in a process of its own, --pairs times
in turn; ratios are taken inside a pair. Memory is the peak of the process and what the step adds to it; a small step
has gone before, which compiles and makes the optimiser's tensors. Losses and gradients of all ways are compared. The
last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import published_mrefsr
from benchmarks.inference import pictures, random_model
from benchmarks.machine import hardware
from lmr_tools.images import downscale, upscale

WAYS = ("published", "ours", "recompute")
PRESET_LR = 1e-4


def untimed(part: str) -> AbstractContextManager[None]:
    """The published way wants a clock."""
    return nullcontext()


def sample(crop: int, references: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """lr 1,3,h,w; enlarged and target 1,3,4h,4w; references 1,N,3,4h,4w: one texture, seeded."""
    _, views = pictures(crop // 4, references + 1)
    target, refs = views[0], views[1:]
    lr = downscale(target)

    def tensor(picture: Any) -> Tensor:
        return torch.tensor(picture).permute(2, 0, 1)[None].float().div_(255).contiguous()

    return tensor(lr), tensor(upscale(lr)), tensor(target), torch.stack([tensor(ref) for ref in refs], 1)


def run_way(way: str, crop: int, references: int, out: Path | None) -> dict[str, Any]:
    """One step in this process."""
    model = random_model(0).train()
    config = model.config
    if way == "published":
        state = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
        trained = {name: value.requires_grad_() for name, value in state.items() if name.startswith("network.")}
        del model
    else:
        trained = {f"network.{name}": value for name, value in model.network.named_parameters()}
    optimiser = torch.optim.Adam(trained.values(), lr=PRESET_LR)

    def step(given: tuple[Tensor, Tensor, Tensor, Tensor]) -> float:
        lr, enlarged, target, refs = given
        optimiser.zero_grad(set_to_none=True)
        if way == "published":
            sr = published_mrefsr.super_resolve(state, config, lr, enlarged, refs.unbind(1), untimed, matches=[])
        else:
            sr = model(lr, enlarged, refs, recompute=way == "recompute")
        loss = (sr - target).abs().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        return float(loss.detach())

    before_weights = {name: value.detach().clone() for name, value in trained.items()}
    step(sample(48, references))
    with torch.no_grad():  # the measured step starts from the same weights in every way
        for name, value in trained.items():
            value.copy_(before_weights[name])
    del before_weights
    given = sample(crop, references)
    optimiser.zero_grad(set_to_none=True)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before = _resident_mb("VmRSS")
    wall, cpu = time.perf_counter(), time.process_time()
    loss = step(given)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = _resident_mb("VmHWM")
    if out:
        torch.save({name: value.grad for name, value in trained.items()}, out)
    return {"wall": wall, "cpu": cpu, "peak_mb": peak, "step_mb": peak - before, "loss": loss}


def _resident_mb(field: str) -> float:
    """`VmRSS` or `VmHWM` (its peak) of this process in MB; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) / 1024


def in_child(way: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.train_step", "--way", way, "--out", str(out)]
    for name in ("crop", "references", "threads"):
        command += [f"--{name}", str(getattr(args, name))]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def difference(ours: Path, published: Path) -> float:
    """Norm of the difference of all gradients, as a share of the published way's norm."""
    a, b = (torch.load(path, weights_only=True) for path in (ours, published))
    apart = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    return float((apart / sum(float(value.double().square().sum()) for value in b.values())) ** 0.5)


def report(args: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        files = {way: Path(folder) / f"{way}.pt" for way in WAYS}
        for _ in range(args.pairs):
            for way in WAYS:
                runs[way].append(in_child(way, args, files[way]))
        apart = {way: difference(files[way], files["published"]) for way in WAYS[1:]}
    found: dict[str, Any] = {"benchmark": "train_step", "weights": "random", "preset": "mrefsr"} | hardware()
    found |= {"torch": torch.__version__, "crop": args.crop, "references": args.references}
    found |= {"threads": args.threads, "pairs": args.pairs}
    keys = ("wall", "cpu", "peak_mb", "step_mb")
    found["ways"] = {
        way: {key: round(statistics.median(run[key] for run in of_way), 2) for key in keys}
        | {"loss": of_way[0]["loss"]}
        for way, of_way in runs.items()
    }
    for way in WAYS[1:]:
        pairs = list(zip(runs["published"], runs[way], strict=True))
        ratios = {key: round(statistics.median(a[key] / b[key] for a, b in pairs), 2) for key in keys}
        found[f"published_over_{way}"] = ratios | {"gradients_apart": apart[way]}
    return found


def print_table(found: dict[str, Any]) -> None:
    print(
        f"{found['cpu']}, {found['threads']} thread(s), torch {found['torch']}, {found['date']}: a step of the full "
        f"network, crop {found['crop']}, {found['references']} references, random weights"
    )
    print(f"{'':12}{'wall s':>10}{'CPU s':>10}{'peak MB':>10}{'of it, step':>12}{'loss':>12}")
    for way, row in found["ways"].items():
        numbers = f"{row['wall']:10.1f}{row['cpu']:10.1f}{row['peak_mb']:10.0f}{row['step_mb']:12.0f}"
        print(f"{way:12}{numbers}{row['loss']:12.6f}")
    for way in WAYS[1:]:
        ratios = found[f"published_over_{way}"]
        print(
            f"published / {way}: wall {ratios['wall']:.2f}, CPU {ratios['cpu']:.2f}, peak {ratios['peak_mb']:.2f}, the "
            f"step's own memory {ratios['step_mb']:.2f}; gradients {ratios['gradients_apart']:.1e} apart"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", type=int, default=160, help="side of the target crop and the references, pixels")
    parser.add_argument("--references", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=1, help="how often all ways run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.way:
        print(json.dumps(run_way(args.way, args.crop, args.references, args.out)))
        return
    found = report(args)
    if not args.json:
        print_table(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
