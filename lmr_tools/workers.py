"""Ordered parallel map over processes: the one way in which stages of the build use more than one core.

`run` keeps the order of its input and a bounded number of items in flight, so memory stays flat and results do not
depend on the number of workers. A stage takes the mapper as an argument; another engine only has to offer this call.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Protocol, TypeVar

from lmr_tools.schema import LmrError

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Mapper(Protocol):
    """Applies a picklable function to items and yields the results in the order of the items."""

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]: ...


class Tracker(Protocol):
    """Passes items through and shows a person how far they are."""

    def __call__(self, items: Iterable[Item], total: int, label: str) -> Iterator[Item]: ...


def default_workers() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def end_with_parent() -> None:
    """In a worker process: end it when the process that started it is gone, whatever it is doing then.

    A killed parent can not tell its workers; one that waits for a lock or a pipe of a dead process would stay for ever.
    """

    def watch(parent: int) -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    parent = multiprocessing.parent_process()
    if parent is not None and parent.pid is not None and os.name == "posix":
        threading.Thread(target=watch, args=(parent.pid,), daemon=True).start()


def _start_process() -> None:
    end_with_parent()
    _start_worker()


def _start_worker() -> None:
    import cv2

    # One core per worker: OpenCV's own threads would fight the other workers.
    cv2.setNumThreads(1)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started here never see SIGINT: Ctrl-C goes to all of them, and the one that started them ends them.

    Else each would end in a traceback of its own, also from the middle of its imports.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class ProcessMapper:
    """`Mapper` over `workers` spawned processes (1: in this process); use it as a context manager.

    Processes are spawned, not forked: a fork after a FAISS search hangs.
    """

    def __init__(self, workers: int) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, not {workers}")
        self.workers = workers
        self._pool: ProcessPoolExecutor | None = None
        self._set_here: list[str] = []  # environment variables to take away again

    def __enter__(self) -> ProcessMapper:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=kind is None, cancel_futures=True)
            self._pool = None
        for name in self._set_here:
            os.environ.pop(name, None)
        self._set_here = []

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        if self.workers == 1:
            _start_worker()
            yield from map(function, items)
            return
        if self._pool is None:
            # A worker's linear algebra must not start a thread per core; spawned processes read this at import.
            self._set_here += [name for name in THREADS if name not in os.environ]
            os.environ.update(dict.fromkeys(self._set_here, "1"))
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_start_process)
        pool, remaining = self._pool, iter(items)
        flying: deque[Future[Result]] = deque()
        try:
            with _interrupts_held():
                for item in itertools.islice(remaining, 4 * self.workers):
                    flying.append(pool.submit(function, item))
            while flying:
                result = flying.popleft().result()
                for item in itertools.islice(remaining, 1):
                    flying.append(pool.submit(function, item))
                yield result
        except BrokenProcessPool:
            self._pool = None
            raise LmrError(
                "a worker process died (killed, or out of memory?); run the same command again, it goes on where it "
                "was, with fewer --workers if memory is short"
            ) from None
        finally:
            for future in flying:
                future.cancel()
