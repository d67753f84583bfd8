"""What Ray costs, and what a second node gives: one build by the local engine and by Ray clusters on this machine.

    python -m benchmarks.ray_engine --data PHOTOS [--limit 60] [--json] [-- build-dataset options]

Builds the same photos with `--engine local --workers 2`, with Ray on one node of two cores, on one node of one core
and on two nodes of one core, each from nothing, and compares the tars and tables byte for byte. Seconds are those of
the whole command; `stages` those of its stages, without the start of Python, networks and Ray. Ray's workers get the
niceness of this process, not the 15 that Ray gives them: whatever else ran would slow down Ray alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.build import STAGE
from benchmarks.machine import hardware
from lmr_tools.dataset import read_manifest

# name: cores of each Ray node; none is the local engine
ENGINES: dict[str, list[int]] = {"local, 2 workers": [], "ray, 1 x 2": [2], "ray, 1 x 1": [1], "ray, 2 x 1": [1, 1]}


def main() -> None:
    """Build with every engine; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of photos, also in sub-folders")
    parser.add_argument("--limit", type=int, default=60, help="photos taken, in order of their paths")
    parser.add_argument("--engines", nargs="+", choices=[*ENGINES], default=[*ENGINES], help="what to run")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("options", nargs="*", help="options of lmr build-dataset, after --")
    arguments = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch) / "photos"
        photos.mkdir()
        paths = sorted(p for p in arguments.data.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"})
        for number, path in enumerate(paths[: arguments.limit]):
            (photos / f"{number:05d}{path.suffix}").symlink_to(path.resolve())
        first: dict[str, Any] | None = None
        for name in arguments.engines:
            nodes, out = ENGINES[name], Path(scratch) / f"out{len(found)}"
            found[name] = _build(photos, out, nodes, arguments.options)
            tables = read_manifest(out)["tables"]  # sha256 of every table; that of shards holds the tars'
            first = first or tables
            found[name]["same_bytes"] = tables == first
            if not arguments.json:
                print(f"{name:<18} {found[name]}", flush=True)
    stages = {name: cost["stages_total"] for name, cost in found.items()}
    ratios = {
        name: round(stages[a] / stages[b], 3)
        for name, a, b in (
            ("overhead_of_ray", "ray, 1 x 2", "local, 2 workers"),
            ("two_nodes_against_one", "ray, 1 x 1", "ray, 2 x 1"),
        )
        if {a, b} <= stages.keys()
    }
    print(json.dumps({"benchmark": "ray_engine", "photos": arguments.limit, **hardware(), **ratios, "engines": found}))


def _build(photos: Path, out: Path, nodes: list[int], options: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-c", "from lmr_pipelines.cli import main; main()", "build-dataset", str(photos)]
    command += ["--out", str(out), *options]
    cluster: Any = None
    if nodes:
        from ray.cluster_utils import Cluster

        os.environ.setdefault("RAY_worker_niceness", "0")  # added to ours
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": nodes[0]})
        for cores in nodes[1:]:
            cluster.add_node(num_cpus=cores)
        command += ["--engine", "ray", "--address", cluster.address]
    else:
        command += ["--workers", "2"]
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    seconds = time.perf_counter() - start
    if cluster is not None:
        cluster.shutdown()
    if done.returncode:
        sys.exit(f"benchmarks.ray_engine: the build failed: {done.stdout[-600:]}")
    stages = {name: float(spent) for name, _, spent in STAGE.findall(done.stdout)}
    return {"seconds": round(seconds, 1), "stages_total": round(sum(stages.values()), 1), "stages": stages}


if __name__ == "__main__":
    main()
