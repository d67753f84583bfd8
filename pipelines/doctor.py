"""`lmr doctor`: versions, devices, the flavour of FAISS, pretrained weights, disk; exit 1 when something is broken."""

from __future__ import annotations

import json
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

PACKAGES = (
    "lmr-tools",
    "torch",
    "torchvision",
    "open_clip_torch",
    "timm",
    "numpy",
    "pillow",
    "opencv-python-headless",
    "numba",
    "pyarrow",
    "pandas",
    "webdataset",
    "safetensors",
    "huggingface-hub",
    "lpips",
    "torchmetrics",
)
# All of these install the one module `faiss`; two of them overwrite each other's files.
FAISS = ("faiss-cpu", "faiss-gpu", "faiss-gpu-cu11", "faiss-gpu-cu12", "faiss")
# Several of these overwrite each other's module `cv2` in the same way.
OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python-headless", "opencv-contrib-python")
OPTIONAL = {"lmr-tools", "lpips", "torchmetrics"}  # lmr-tools itself: absent in a checkout that is not installed
LITTLE_DISK = 5e9  # bytes
WANTED = ("clip-vit-b-32", "effnet-lite0", "alexnet", "vgg16", "vgg19", "lpips-alex")


@click.command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Look at this installation: versions, devices, FAISS, pretrained weights, disk. Exit code 1 if it is broken."""
    found = examine()
    if as_json:
        click.echo(json.dumps(found, indent=2))
    else:
        _print(found)
    if found["problems"]:
        ctx.exit(1)


def examine() -> dict[str, Any]:
    """Everything that `lmr doctor` shows; `problems` are reasons to exit 1, `hints` are not."""
    versions = installed()
    flavour, problems, hints = judge_packages(versions)
    devices: list[str] = []
    if versions["torch"]:
        devices = _devices()
    disk = _disk()
    hints += [f"{place}: only {free / 1e9:.1f} GB free" for place, free in disk.items() if free < LITTLE_DISK]
    weights = _weights()
    embedders = [row["name"] for row in weights[:2] if row["path"]]
    if not embedders:
        hints.append("no embedder's weights are here; get one with `lmr weights fetch clip-vit-b-32` (or effnet-lite0)")
    return {
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "versions": versions,
        "faiss": flavour,
        "devices": devices,
        "weights": weights,
        "disk_free_bytes": disk,
        "problems": problems,
        "hints": hints,
    }


def installed() -> dict[str, str | None]:
    """Version of each package that matters, None where it is not installed; nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {}
    for name in dict.fromkeys((*PACKAGES, *FAISS, *OPENCV)):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def judge_packages(versions: Mapping[str, str | None]) -> tuple[str | None, list[str], list[str]]:
    """(flavour of FAISS, problems, hints) for the installed versions."""
    problems, hints = [], []
    flavours = [name for name in FAISS if versions.get(name)]
    if not flavours:
        problems.append("faiss is not installed: run `pip install 'lmr-tools[cpu]'`, or `[gpu]` on Linux with a GPU")
    if len(flavours) > 1:
        both = " and ".join(flavours)
        problems.append(
            f"{both} overwrite each other: run `pip uninstall -y {' '.join(flavours)}`, then install one "
            f"(`pip install 'lmr-tools[cpu]'` or `[gpu]`)"
        )
    opencv = [name for name in OPENCV if versions.get(name)]
    if len(opencv) > 1:
        hints.append(
            f"{' and '.join(opencv)} overwrite each other; if cv2 misbehaves, keep opencv-python-headless only"
        )
    missing = [name for name in PACKAGES if not versions.get(name) and name not in OPTIONAL]
    problems += [f"{name} is not installed: install lmr-tools again" for name in missing]
    if not (versions.get("lpips") or versions.get("torchmetrics")):
        hints.append("LPIPS can not be computed: run `pip install lpips`")
    return " and ".join(flavours) or None, problems, hints


def _devices() -> list[str]:
    import torch

    devices = [f"cpu, {torch.get_num_threads()} threads"]
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        devices.append(f"cuda:{number}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return devices


def _weights() -> list[dict[str, str | None]]:
    from lmr_tools.weights import find, get

    rows: list[dict[str, str | None]] = []
    for entry in map(get, WANTED):
        path = find(entry)
        way = entry.note if entry.place == "package" else f"lmr weights fetch {entry.name}"
        rows.append({"name": entry.name, "path": str(path) if path else None, "origin": entry.origin, "way": way})
    return rows


def _disk() -> dict[str, int]:
    from lmr_tools.weights import lmr_home

    free = {}
    for place in (lmr_home(), Path.cwd()):
        existing = next(parent for parent in (place, *place.parents) if parent.exists())
        free[str(place)] = shutil.disk_usage(existing).free
    return free


def _print(found: Mapping[str, Any]) -> None:
    click.echo(f"python     {found['python']}, {found['platform']}")
    here = [f"{name} {version}" for name, version in found["versions"].items() if version and name not in FAISS]
    click.echo(f"packages   {', '.join(here)}")
    flavour = found["faiss"]
    number = ", ".join(found["versions"][name] for name in FAISS if found["versions"][name])
    click.echo(f"faiss      {f'{flavour} {number}' if flavour else 'not installed'}")
    click.echo(f"devices    {'; '.join(found['devices']) or 'unknown without torch'}")
    for row in found["weights"]:
        missing = f"missing; `{row['way']}` ({row['origin']})"
        click.echo(f"weights    {row['name']:<14} {row['path'] or missing}")
    for place, free in found["disk_free_bytes"].items():
        click.echo(f"disk       {free / 1e9:8.1f} GB free  {place}")
    for hint in found["hints"]:
        click.echo(f"hint       {hint}")
    for problem in found["problems"]:
        click.secho(f"PROBLEM    {problem}", fg="red")
    if not found["problems"]:
        click.secho("All well.", fg="green")
