"""Patch matching against the published way, in one run: `python -m benchmarks.matching`.

The published way (C2-Matching, MRefSR) cuts every 3x3 patch out of the reference and convolves the input with all of
them, 512 Mi correlations at a time; `match_published` below is a plain implementation of it. Each pair runs every way
once, in turns, and ratios are taken inside a pair. Memory is the growth of the peak resident size during one call, each
in a process of its own, after a small call that compiles. The features are smooth random fields, the reference a
shifted copy with noise: no way's time depends on the content. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from mrefsr.matching import BACKENDS, NORM_FLOOR, match_patches, normalize_channels

Match = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
PUBLISHED_CHUNK = 512 << 20  # correlations computed at once
PEAK_SIZE = 2048


def match_published(feat_in: Tensor, feat_ref: Tensor) -> tuple[Tensor, Tensor]:
    """A convolution of the input with every normalised 3x3 patch of the reference; arguments as `match_patches`."""
    channels, height, width = feat_in.shape

    def patches(features: Tensor) -> Tensor:  # (patches, channels * 9)
        return functional.unfold(features[None], 3)[0].T

    filters = patches(feat_ref)
    filters = filters / (filters.norm(dim=1, keepdim=True) + NORM_FLOOR)
    chunk = PUBLISHED_CHUNK // (height * width)
    value, index = None, torch.zeros(height - 2, width - 2, dtype=torch.int64, device=feat_in.device)
    for first in range(0, len(filters), chunk):
        kernel = filters[first : first + chunk].reshape(-1, channels, 3, 3)
        top, place = functional.conv2d(feat_in[None], kernel)[0].max(0)
        if value is None:
            value, index = top, place
        else:
            better = top > value
            value, index = torch.where(better, top, value), torch.where(better, place + first, index)
    assert value is not None
    norm = patches(feat_in).norm(dim=1).view(height - 2, width - 2)
    return index, value / (norm + NORM_FLOOR)


def ways(device: str) -> dict[str, Match]:
    """The published way first, then every backend that fits the device."""
    fitting = [name for name in BACKENDS if name == "torch" or (name == "triton") == (device == "cuda")]

    def run(backend: str) -> Match:
        return lambda feat_in, feat_ref: match_patches(feat_in, feat_ref, backend=backend)

    return {"published": match_published} | {name: run(name) for name in fitting}


def smooth_features(size: int, channels: int, device: str) -> tuple[Tensor, Tensor]:
    """Seeded, channel-normalised (channels, size, size) features of an input and of its shifted, noisy reference."""
    generator = torch.Generator().manual_seed(size)
    coarse = torch.randn(1, channels, size // 4 + 2, size // 4 + 2, generator=generator)
    fine = functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)[0]
    noise = torch.randn(2, channels, size, size, generator=generator)
    feat_in, feat_ref = fine + 0.2 * noise[0], fine.roll((5, 3), (1, 2)) + 0.2 * noise[1]
    return normalize_channels(feat_in).to(device), normalize_channels(feat_ref).to(device)


def seconds(function: Callable[[], Any], device: str) -> tuple[float, float]:
    """Wall and CPU seconds of one call; the second tells a way's own cost when other work shares the machine."""
    if device == "cuda":
        torch.cuda.synchronize()
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def product_peak(device: str) -> float:
    """GFLOP/s of one large square matrix product, the best of three."""
    a, b, out = (torch.ones(PEAK_SIZE, PEAK_SIZE, device=device) for _ in range(3))
    best = min(seconds(lambda: torch.mm(a, b, out=out), device)[0] for _ in range(3))
    return 2 * PEAK_SIZE**3 / best / 1e9


def product_floor(feat_in: Tensor, feat_ref: Tensor) -> None:
    """The products that a matching of width C can not avoid, row by row into one scratch, and nothing else."""
    columns = feat_ref.flatten(1)
    rows = feat_in.permute(1, 2, 0).contiguous()
    out = torch.empty(rows.shape[1], columns.shape[1], device=rows.device)
    for row in rows:
        torch.mm(row, columns, out=out)


def _resident_mb(field: str) -> float:
    """`VmRSS` or `VmHWM` (its peak) of this process in MB; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) / 1024


def extra_memory(way: str, size: int, channels: int, device: str) -> float:
    """MB that one call adds to the peak: resident memory on a CPU, allocated memory on a GPU."""
    feat_in, feat_ref = smooth_features(size, channels, device)
    match = ways(device)[way]
    small = slice(0, 8)
    match(feat_in[:, small, small].contiguous(), feat_ref[:, small, small].contiguous())
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        match(feat_in, feat_ref)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:  # freed blocks that the C library keeps would be used again and not be counted
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    before_mb = _resident_mb("VmRSS")
    match(feat_in, feat_ref)
    return _resident_mb("VmHWM") - before_mb


def memory_in_child(way: str, size: int, channels: int, device: str, threads: int) -> float | None:
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, "-m", "benchmarks.matching", "--memory-of", way, "--size", str(size)]
    command += ["--channels", str(channels), "--device", device, "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(size: int, channels: int, pairs: int, device: str, threads: int) -> dict[str, Any]:
    feat_in, feat_ref = smooth_features(size, channels, device)
    candidates = ways(device)
    results = {}
    for name, match in candidates.items():  # also compiles and warms up
        results[name] = match(feat_in, feat_ref) if name != "published" or size <= 80 or device == "cuda" else None
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in candidates}
    floors, peaks = [], []
    for pair in range(pairs):
        names = list(candidates)
        for name in names[pair % len(names) :] + names[: pair % len(names)]:

            def call(name: str = name) -> None:
                results[name] = candidates[name](feat_in, feat_ref)

            times[name].append(seconds(call, device))
        floors.append(seconds(lambda: product_floor(feat_in, feat_ref), device)[0])
        peaks.append(product_peak(device))
    useful = 2 * channels * size**4 / 1e9  # GFLOP of the product of width C
    official = results["published"]
    assert official is not None
    rows = {}
    for name in candidates:
        result = results[name]
        assert result is not None
        ratios, cpu_ratios = (
            [a[n] / b[n] for a, b in zip(times["published"], times[name], strict=True)] for n in (0, 1)
        )
        wall = [pair[0] for pair in times[name]]
        rows[name] = {
            "seconds": statistics.median(wall),
            "ratio": statistics.median(ratios),
            "ratio_range": [min(ratios), max(ratios)],
            "cpu_ratio": statistics.median(cpu_ratios),
            "share_of_peak": statistics.median(useful / t / peak for t, peak in zip(wall, peaks, strict=True)),
            "extra_mb": memory_in_child(name, size, channels, device, threads),
            "same_indices": float((result[0] == official[0]).double().mean()),
            "value_difference": float((result[1] - official[1]).abs().max()),
        }
    floor = statistics.median(floors)
    return {"size": size, "product_floor_seconds": floor, "peak_gflops": statistics.median(peaks), "ways": rows}


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def print_table(report: dict[str, Any]) -> None:
    print(f"{report['hardware']}, {report['device']}, {report['precision']}, {report['threads']} thread(s), ", end="")
    print(f"{report['channels']} channels, {report['pairs']} pair(s), torch {report['torch']}, {report['date']}")
    heads = ("way", "seconds", "ratio", "range", "CPU ratio", "of peak", "extra MB", "same index")
    print(f"{'size':>9} {heads[0]:10}" + "".join(f"{head:>11}" for head in heads[1:]))
    for result in report["results"]:
        for name, row in result["ways"].items():
            cells = [
                f"{row['seconds']:.4f}",
                f"{row['ratio']:.2f}",
                "{:.1f}-{:.1f}".format(*row["ratio_range"]),
                f"{row['cpu_ratio']:.2f}",
                f"{row['share_of_peak']:.2f}",
                "-" if row["extra_mb"] is None else f"{row['extra_mb']:.0f}",
                f"{row['same_indices']:.4f}",
            ]
            print(f"{'{0}x{0}'.format(result['size']):>9} {name:10}" + "".join(f"{cell:>11}" for cell in cells))
        print(
            f"{'':>9} product alone {result['product_floor_seconds']:.4f} s, peak {result['peak_gflops']:.0f} GFLOP/s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[40, 75, 125], help="side of the feature maps, pixels")
    parser.add_argument("--pairs", type=int, default=3, help="how often every way runs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--precision", choices=["fp32", "tf32"], nargs="+", default=["fp32"], help="tf32: GPU only")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--memory-of", choices=["published", *BACKENDS], help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if args.memory_of:
        print(extra_memory(args.memory_of, args.size[0], args.channels, device))
        return
    if device == "cpu" and "tf32" in args.precision:
        parser.error("--precision tf32 needs a GPU")
    reports = []
    for precision in args.precision:
        # The convolution of the published way and the products of ours follow two different switches.
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "tf32"
        report = {
            "benchmark": "matching",
            "hardware": hardware(device),
            "device": device,
            "precision": precision,
            "threads": args.threads,
            "channels": args.channels,
            "pairs": args.pairs,
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "results": [measure(size, args.channels, args.pairs, device, args.threads) for size in args.size],
        }
        reports.append(report)
        if not args.json:
            print_table(report)
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
