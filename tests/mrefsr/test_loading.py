"""Processes that work ahead: they outlive signals to the group, end with their batches, and die in one line."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmr_tools.schema import LmrError
from mrefsr.data import SampleRule, train_batches
from tests.lmr_tools.painted_dataset import paint_dataset

MIXED = SampleRule(crop=24, wrong_share=0.4, no_reference_share=0.2)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return paint_dataset(tmp_path_factory.mktemp("data") / "dataset", train=11)


def test_a_worker_that_dies_is_one_line(dataset: Path) -> None:
    batches = train_batches(dataset, rule=MIXED, batch_size=3, seed=5, workers=1)
    next(batches)
    (worker,) = (p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline()))
    worker.kill()
    with pytest.raises(LmrError, match=r"a process that reads data died .* Try fewer workers"):
        list(itertools.islice(batches, 200))
    assert gone(worker)


PROGRAM = """
import itertools, os, psutil, signal, sys, time
from mrefsr.data import SampleRule, train_batches

if __name__ == "__main__":
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    batches = train_batches(sys.argv[1], rule=SampleRule(crop=24), batch_size=3, seed=5, workers=2)
    first = next(batches)
    children = [child for child in psutil.Process().children() if "spawn_main" in " ".join(child.cmdline())]
    print(*(child.pid for child in children), flush=True)
    while not stopped:
        time.sleep(0.05)
    rest = list(itertools.islice(batches, 20))  # far more than was made ahead: the workers are still at work
    if sys.argv[2] == "close":
        batches.close()
    print(len(rest), flush=True)
"""


@pytest.fixture
def program(dataset: Path, tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "program.py").write_text(PROGRAM)
    started: list[subprocess.Popen[str]] = []

    def start(end: str) -> tuple[subprocess.Popen[str], list[psutil.Process]]:
        process = subprocess.Popen(
            [sys.executable, str(tmp_path / "program.py"), str(dataset), end],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )
        started.append(process)
        assert process.stdout is not None
        return process, [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.skipif(os.name != "posix", reason="process groups")
@pytest.mark.parametrize("end", ["close", "leave"])
def test_workers_outlive_a_signal_to_the_group_but_not_the_run(program: Any, end: str) -> None:
    process, workers = program(end)
    assert len(workers) == 2
    os.killpg(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    out, err = process.communicate(timeout=900)
    assert (process.returncode, out.strip(), err) == (0, "20", "")
    assert all(gone(worker) for worker in workers)


def test_no_thread_outlives_its_batches(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = Queue.__dict__["_feed"].__func__

    def slowly(*given: Any) -> None:
        feed(*given)
        time.sleep(0.5)

    monkeypatch.setattr(Queue, "_feed", staticmethod(slowly))
    before = set(threading.enumerate())
    batches = train_batches(dataset, rule=MIXED, batch_size=3, seed=5, workers=1)
    next(batches)
    assert set(threading.enumerate()) > before
    batches.close()
    assert set(threading.enumerate()) <= before


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_workers_do_not_outlive_a_killed_run(program: Any) -> None:
    process, workers = program("close")
    assert len(workers) == 2 and not any(gone(worker) for worker in workers)
    process.kill()
    process.wait()
    # Each looks after its parent every few seconds.
    end = time.monotonic() + 900
    while not all(gone(worker) for worker in workers) and time.monotonic() < end:
        time.sleep(0.1)
    assert all(gone(worker) for worker in workers)


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
