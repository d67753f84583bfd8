"""The deformable convolution against torchvision's operator, in one run: `python -m benchmarks.deform`.

The cases are the three scales of MRefSR: one reference of a 500x500 image, one of a 160x160 training crop, and the
`mrefsr-tiny` preset on a batch of 96 px crops. Modes: `forward` (no gradients), `training` (forward and backward with
the gradients of everything), `frozen` (the same, but the features that are sampled need no gradient, as in MRefSR).
Ways: `torchvision`; `mrefsr` on ordinary tensors; `last` on channels-last features; `flow` with the matched
displacements as an argument, where the other ways are handed the sum (made outside of the timed call).

Each pair runs every way once, in turns, and ratios are taken inside a pair; `cpu` is the same ratio in processor time,
which other programs on the machine disturb less. `floor` is the matrix product alone, in one
piece, with columns already made. Memory is the growth of the peak resident size during one call, in a process of its
own, after a small call that compiles; inputs are not counted, outputs and gradients are. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision.ops
from torch import Tensor
from torch.nn import functional

from mrefsr.deform import deform_conv2d

# batch, channels in and out, side in pixels, offset groups
CASES = {
    "x1-125": (1, 256, 125, 8),
    "x2-250": (1, 128, 250, 8),
    "x4-500": (1, 64, 500, 8),
    "x1-40": (1, 256, 40, 8),
    "x2-80": (1, 128, 80, 8),
    "x4-160": (1, 64, 160, 8),
    "tiny-96": (4, 16, 96, 1),
}
MODES = ("forward", "training", "frozen")
WAYS = ("torchvision", "mrefsr", "last", "flow")
SMALL = (1, 8, 9, 1)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Seeded arguments; `offset` is `learned` + `flow`, repeated for the groups."""

    x: Tensor
    offset: Tensor
    learned: Tensor
    flow: Tensor
    mask: Tensor
    weight: Tensor
    bias: Tensor


def make_inputs(batch: int, channels: int, side: int, groups: int) -> Inputs:
    """Smooth integer displacements of some pixels with jumps between regions, small learned offsets upon them."""
    generator = torch.Generator().manual_seed(side)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    coarse = normal(batch, 2, side // 16 + 2, side // 16 + 2) * 6
    flow = functional.interpolate(coarse, (side, side)).round().permute(0, 2, 3, 1)[:, None]
    flow = flow.expand(batch, 9, side, side, 2).int().contiguous()
    learned = normal(batch, groups * 18, side, side) * 0.5
    offset = learned + flow.flip(-1).permute(0, 1, 4, 2, 3).flatten(1, 2).repeat(1, groups, 1, 1)
    return Inputs(
        x=normal(batch, channels, side, side),
        offset=offset,
        learned=learned,
        flow=flow,
        mask=normal(batch, groups * 9, side, side).sigmoid(),
        weight=normal(channels, channels, 3, 3) * (channels * 9) ** -0.5,
        bias=normal(channels),
    )


def make_call(way: str, mode: str, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """The call to be timed: output, then the gradients of the mode."""
    layout = torch.channels_last if way == "last" else torch.contiguous_format
    x = inputs.x.detach().clone(memory_format=layout).requires_grad_(mode == "training")
    trained = [inputs.learned if way == "flow" else inputs.offset, inputs.mask, inputs.weight, inputs.bias]
    offset, mask, weight, bias = (tensor.detach().requires_grad_(mode != "forward") for tensor in trained)
    outwards = torch.ones(()).expand(len(x), len(weight), *x.shape[2:]) * 0.5

    def apply() -> Tensor:
        if way == "torchvision":
            return torchvision.ops.deform_conv2d(x, offset, weight, bias, padding=1, mask=mask)  # type: ignore[no-any-return]
        return deform_conv2d(x, offset, weight, bias, mask=mask, flow=inputs.flow if way == "flow" else None)

    def call() -> tuple[Tensor, ...]:
        if mode == "forward":
            with torch.no_grad():
                return (apply(),)
        out = apply()
        wanted = [tensor for tensor in (x, offset, mask, weight, bias) if tensor.requires_grad]
        return (out.detach(), *torch.autograd.grad(out, wanted, outwards))

    return call


def product_floor(mode: str, batch: int, channels: int, side: int) -> Callable[[], None]:
    """The products that no way can avoid: one forward, two more backward."""
    columns, weight = torch.ones(side * side, channels * 9), torch.ones(channels * 9, channels)
    out, back = torch.empty(side * side, channels), torch.empty(channels * 9, channels)

    def call() -> None:
        for _ in range(batch):
            torch.mm(columns, weight, out=out)
            if mode != "forward":
                torch.mm(columns.T, out, out=back)
                torch.mm(out, weight.T, out=columns)

    return call


def seconds(call: Callable[[], object]) -> tuple[float, float]:
    """Wall time and processor time (of all threads)."""
    start = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def _resident_mb(field: str) -> float:
    """`VmRSS` or `VmHWM` (its peak) of this process in MB; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) / 1024


def extra_memory(case: str, way: str, mode: str) -> float:
    """MB that one call adds to the peak of resident memory."""
    make_call(way, mode, make_inputs(*SMALL))()
    call = make_call(way, mode, make_inputs(*CASES[case]))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before = _resident_mb("VmRSS")
    call()
    return _resident_mb("VmHWM") - before


def memory_in_child(case: str, way: str, mode: str, threads: int) -> float | None:
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "benchmarks.deform", "--memory-of", case, way, mode, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(case: str, mode: str, pairs: int, threads: int) -> dict[str, Any]:
    for way in WAYS:  # compiles and warms up
        make_call(way, mode, make_inputs(*SMALL))()
    batch, channels, side, _ = CASES[case]
    inputs = make_inputs(*CASES[case])
    calls = {way: make_call(way, mode, inputs) for way in WAYS}
    floor = product_floor(mode, batch, channels, side)
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
    floors: list[tuple[float, float]] = []
    for pair in range(pairs):
        for way in WAYS[pair % len(WAYS) :] + WAYS[: pair % len(WAYS)]:
            times[way].append(seconds(calls[way]))
        floors.append(seconds(floor))
    expected = calls["torchvision"]()
    rows = {}
    for way in WAYS:
        ratios = [a[0] / b[0] for a, b in zip(times["torchvision"], times[way], strict=True)]
        cpu_ratios = [a[1] / b[1] for a, b in zip(times["torchvision"], times[way], strict=True)]
        results = calls[way]()
        rows[way] = {
            "seconds": statistics.median(wall for wall, _ in times[way]),
            "cpu_seconds": statistics.median(cpu for _, cpu in times[way]),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "cpu_ratio": statistics.median(cpu_ratios),
            "extra_mb": memory_in_child(case, way, mode, threads),
            # largest departure from torchvision, relative to the largest value; over the output and all gradients
            "difference": max(
                float((a - b).abs().max() / a.abs().max()) for a, b in zip(expected, results, strict=True)
            ),
        }
    floor_wall, floor_cpu = (statistics.median(values) for values in zip(*floors, strict=True))
    return {"case": case, "mode": mode, "floor_seconds": floor_wall, "floor_cpu_seconds": floor_cpu, "ways": rows}


def hardware() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_rows(result: dict[str, Any]) -> None:
    for way, row in result["ways"].items():
        span = "{:.1f}-{:.1f}".format(*row["ratio_range"])
        extra = "-" if row["extra_mb"] is None else f"{row['extra_mb']:.0f}"
        print(
            f"{result['case']:8} {result['mode']:9} {way:12} {row['seconds']:9.4f} {row['cpu_seconds']:9.4f} ", end=""
        )
        print(
            f"{row['ratio']:6.2f} {span:>11} {row['cpu_ratio']:6.2f} {extra:>9} {row['difference']:11.1e}", flush=True
        )
    print(f"{'':18} {'floor':12} {result['floor_seconds']:9.4f} {result['floor_cpu_seconds']:9.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", choices=list(CASES), nargs="+", default=list(CASES))
    parser.add_argument("--modes", choices=MODES, nargs="+", default=["forward", "training"])
    parser.add_argument("--pairs", type=int, default=3, help="how often every way runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(extra_memory(*args.memory_of))
        return
    report = {
        "benchmark": "deform",
        "hardware": hardware(),
        "threads": args.threads,
        "pairs": args.pairs,
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }
    if not args.json:
        print(
            f"{report['hardware']}, {args.threads} thread(s), {args.pairs} pair(s), torch {torch.__version__}, ", end=""
        )
        print(report["date"])
        print(
            f"{'case':8} {'mode':9} {'way':12} {'seconds':>9} {'cpu s':>9} {'ratio':>6} {'range':>11} {'cpu':>6} ",
            end="",
        )
        print(f"{'extra MB':>9} {'difference':>11}")
    results = []
    for mode in args.modes:
        for case in args.cases:
            results.append(measure(case, mode, args.pairs, args.threads))
            if not args.json:
                print_rows(results[-1])
    print(json.dumps(report | {"results": results}))


if __name__ == "__main__":
    main()
