"""How much memory is free, on a CPU within the limit of a container too."""

from __future__ import annotations

import os
from pathlib import Path

import torch

UNKNOWN = 4e9  # where a system tells nothing
CGROUP = Path("/sys/fs/cgroup")
OWN_GROUPS = Path("/proc/self/cgroup")
CONTROL_FILES = (  # controller; limit, use, and the file cache's name in memory.stat: version 2, then version 1
    ("", "memory.max", "memory.current", "inactive_file"),
    ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
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
    """The least that is left within the limits of this process's control group (a container, a job of a scheduler) and
    the groups around it, their file cache counted as free; infinite without a limit."""
    free = float("inf")
    for controller, limit, used, cache in CONTROL_FILES:
        top = CGROUP / controller
        own = top / _own_group(controller)
        for folder in (own, *own.parents)[: len(own.parts) - len(top.parts) + 1]:
            try:
                most = float((folder / limit).read_text(encoding="ascii"))  # "max" where there is none
                taken = float((folder / used).read_text(encoding="ascii"))
                lines = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
                free = min(free, max(0.0, most - taken + float(lines[cache])))
            except (OSError, ValueError, KeyError):
                continue
    return free


def _own_group(controller: str) -> str:
    """The path of this process's group below that controller's folder; a container often shows its own as the top."""
    try:
        for line in OWN_GROUPS.read_text(encoding="utf-8").splitlines():
            _, names, path = line.split(":", 2)
            if controller in names.split(",") and ".." not in path:
                return path.strip("/")
    except (OSError, ValueError):
        pass
    return ""
