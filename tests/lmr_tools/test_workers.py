"""The mapper keeps order and memory, and says what to do when a worker dies."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lmr_tools.schema import LmrError
from lmr_tools.workers import ProcessMapper


def double(number: int) -> int:
    return 2 * number


def die(number: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return number


def fail(number: int) -> int:
    raise LmrError(f"{number}.jpg: gone")


def test_order_is_kept_and_only_a_few_items_are_taken_ahead() -> None:
    taken = itertools.count()
    with ProcessMapper(2) as mapper:
        results = mapper(double, (next(taken) for _ in range(1000)))
        assert [next(results) for _ in range(5)] == [0, 2, 4, 6, 8]
        assert next(taken) <= 5 + 4 * 2 + 1
        assert list(mapper(double, range(9))) == [2 * n for n in range(9)]


def test_a_dead_worker_is_one_line_with_the_way_out() -> None:
    with ProcessMapper(2) as mapper, pytest.raises(LmrError, match="run the same command again"):
        list(mapper(die, range(3)))


def threads_of(_: int) -> str | None:
    return os.environ.get("OMP_NUM_THREADS")


def test_only_workers_are_told_to_use_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    with ProcessMapper(2) as mapper:
        assert set(mapper(threads_of, range(4))) == {"1"}
    assert "OMP_NUM_THREADS" not in os.environ


def blocked(_: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="POSIX only")
def test_an_interrupt_of_the_whole_group_is_the_parents_alone() -> None:
    with ProcessMapper(2) as mapper:
        assert set(mapper(blocked, range(6))) == {True}
        assert not blocked(0)


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_worker_arrives_as_it_was(workers: int) -> None:
    with ProcessMapper(workers) as mapper, pytest.raises(LmrError, match=r"^0\.jpg: gone$"):
        list(mapper(fail, range(3)))


def test_no_workers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ProcessMapper(0)


PROGRAM = """
import time
from lmr_tools.workers import ProcessMapper
from tests.lmr_tools.test_workers import pid_of

if __name__ == "__main__":
    with ProcessMapper(2) as mapper:
        print(*set(mapper(pid_of, range(40))), flush=True)
        time.sleep(600)
"""


def pid_of(_: int) -> int:
    time.sleep(0.05)
    return os.getpid()


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_workers_do_not_outlive_a_killed_build(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py")],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert process.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert workers
    process.kill()
    process.communicate()
    _, left = psutil.wait_procs(workers, timeout=900)
    assert not [worker for worker in left if worker.status() != psutil.STATUS_ZOMBIE]
