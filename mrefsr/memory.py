"""How much memory is free, on a CPU within the limit of a container too."""

from __future__ import annotations

import os
from pathlib import Path

import torch

UNKNOWN = 4e9  # where a system tells nothing
CGROUP = Path("/sys/fs/cgroup")
CONTROL_FILES = (  # limit, use, details, and among these the file cache: version 2, then version 1
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)
MEMINFO = Path("/proc/meminfo")


def free_memory(device: torch.device) -> float:
    """Bytes that can still be taken on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return float(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory())
    return min(_free_of_machine(), _free_of_container())


def _free_of_machine() -> float:
    """What Linux counts as available (free, or cache that it gives up); elsewhere half of the memory."""
    try:
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
        return float(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        pass
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    except (AttributeError, ValueError, OSError):
        return UNKNOWN


def _free_of_container() -> float:
    """The rest of this control group's limit, its file cache counted as free; infinite without a limit."""
    for limit, used, stat, cache in CONTROL_FILES:
        try:
            most = float((CGROUP / limit).read_text(encoding="ascii"))  # "max" where there is none
            taken = float((CGROUP / used).read_text(encoding="ascii"))
            lines = dict(line.split() for line in (CGROUP / stat).read_text(encoding="ascii").splitlines())
            return max(0.0, most - taken + float(lines[cache]))
        except (OSError, ValueError, KeyError):
            continue
    return float("inf")
