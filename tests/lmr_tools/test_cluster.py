"""Ray: same results in the same order as one process, through the death of workers and nodes, and one-line errors."""

import builtins
import itertools
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from lmr_tools.cluster import RayMapper
from lmr_tools.schema import LmrError

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores for tasks and two nodes of one core each: three sets of Ray processes on this machine."""
    from ray.cluster_utils import Cluster

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 80 * 2**20})
        for _ in range(2):
            made.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        with RayMapper(made.address):
            yield made
        made.shutdown()


def double(number: int) -> int:
    return 2 * number


def fail(number: int) -> int:
    if number == 3:
        raise LmrError(f"{number}.jpg: gone")
    return number


def write(number: int, *, folder: Path, die_at: int = -1) -> int:
    """Write a file under the number, whole or not at all; the first time at `die_at` the worker is killed."""
    from lmr_tools.tables import write_bytes

    mark = folder / "died"
    if number == die_at and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    with (folder / f"started-{number}").open("a") as log:
        log.write(f"{os.getpid()}\n")
    time.sleep(0.05)
    write_bytes(folder / f"{number}.out", str(number).encode())
    return number


def test_order_is_kept_and_only_a_few_items_are_taken_ahead(cluster: Any) -> None:
    taken = itertools.count()
    with RayMapper(cluster.address, batch=2) as mapper:
        results = mapper(double, (next(taken) for _ in range(1000)))
        assert [next(results) for _ in range(5)] == [0, 2, 4, 6, 8]
        assert next(taken) <= 5 + 2 * (4 * 2 + 2) + 1
        assert list(mapper(double, range(9))) == [2 * n for n in range(9)]
        assert list(mapper(double, ())) == []


def test_an_error_of_a_stage_arrives_as_it_was_after_the_results_before_it(cluster: Any) -> None:
    with RayMapper(cluster.address) as mapper:
        results = mapper(fail, range(6))
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(LmrError, match=r"^3\.jpg: gone$"):
            next(results)


def test_a_killed_worker_loses_and_doubles_nothing(cluster: Any, tmp_path: Path) -> None:
    with RayMapper(cluster.address, batch=2) as mapper:
        assert list(mapper(partial(write, folder=tmp_path, die_at=7), range(20))) == list(range(20))
    assert (tmp_path / "died").exists()
    assert {path.name for path in tmp_path.glob("*.out")} == {f"{n}.out" for n in range(20)}
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_node_killed_while_it_works_loses_and_doubles_nothing(cluster: Any, tmp_path: Path) -> None:
    doomed = cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    with RayMapper(cluster.address, batch=2) as mapper:
        results = mapper(partial(write, folder=tmp_path), range(60))
        got = [next(results) for _ in range(6)]
        cluster.remove_node(doomed, allow_graceful=False)
        got += results
    assert got == list(range(60))
    assert {path.name for path in tmp_path.glob("*.out")} == {f"{n}.out" for n in range(60)}
    assert all(path.read_bytes() == path.stem.encode() for path in tmp_path.glob("*.out"))


def test_no_cluster_is_one_line() -> None:
    # A process of its own: this one belongs to the cluster of the other tests.
    code = (
        "from lmr_tools.cluster import RayMapper\nfrom lmr_tools.schema import LmrError\n"
        "try:\n    RayMapper('127.0.0.1:1').__enter__()\nexcept LmrError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("--address 127.0.0.1:1: no Ray cluster answers there; start one with"), done.stderr


def test_a_cluster_that_goes_away_is_one_line() -> None:
    code = """
import os, sys, time
from ray.cluster_utils import Cluster
from lmr_tools import cluster
from lmr_tools.schema import LmrError
made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 80 * 2**20})
cluster.PATIENCE = 1.0
try:
    with cluster.RayMapper(made.address, batch=1) as mapper:
        results = mapper(time.sleep, [0.0, 0.0, 600.0])
        next(results)
        made.head_node.kill_gcs_server(check_alive=False)
        list(results)
except LmrError as error:
    print(error, flush=True)
made.head_node.kill_all_processes(check_alive=False, allow_graceful=False)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the Ray cluster went away; when it is back, run the same command again" in done.stdout, done.stderr[-800:]


def test_no_ray_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_ray(name: str, *rest: object, **more: object) -> object:
        if name == "ray":
            raise ImportError("No module named 'ray'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_ray)
    with pytest.raises(LmrError, match=r"--engine ray: Ray is not installed; run `pip install 'lmr-tools\[ray\]'`"):
        RayMapper().__enter__()
