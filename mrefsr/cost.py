"""What a call costs: its peak memory, and where and with what it ran."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch

PACKAGES = ("lmr-tools", "torch", "numpy", "pillow", "opencv-python-headless", "lpips")
STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # what Linux takes as: forget the peak of resident memory


def start_peak(device: torch.device) -> None:
    """Begin to watch the peak of memory; see `peak_memory`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        CLEAR_REFS.write_text(RESET_PEAK, encoding="ascii")


def peak_memory(device: torch.device) -> float | None:
    """Bytes: on a GPU the most that tensors took there since `start_peak`; elsewhere the process's peak of resident
    memory, on Linux since `start_peak`, on macOS since it began; None where it can not be known."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    if STATUS.exists():
        lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
        return float(lines["VmHWM"].split()[0]) * 1024 if "VmHWM" in lines else None
    if sys.platform == "darwin":
        import resource

        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return None


def device_name(device: torch.device) -> str:
    """The device for the table, such as `cpu (4 threads)` or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu ({torch.get_num_threads()} threads)" if device.type == "cpu" else str(device)


def versions() -> dict[str, str]:
    """Versions of this toolkit and of the packages that decide a result, as far as installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
