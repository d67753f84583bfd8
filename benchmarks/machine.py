"""What a measurement ran on, for every result line."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lmr_tools.workers import default_workers


def hardware() -> dict[str, Any]:
    """Processor, cores this process may use, Python, and the date (UTC)."""
    return {
        "cpu": processor(),
        "cores": default_workers(),
        "python": platform.python_version(),
        "date": datetime.now(tz=UTC).date().isoformat(),
    }


def processor() -> str:
    """Name of the processor as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
