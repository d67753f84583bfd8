"""Work done ahead in processes, handed over in order: torch's DataLoader under stricter manners.

Processes are spawned, not forked (a fork after a FAISS search hangs). They outlive signals to the process group, since
the trainer still wants their batches for its last step, and never outlive the trainer.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from typing import Any, TypeVar

from torch.utils.data import DataLoader, Dataset

from lmr_tools.schema import LmrError
from lmr_tools.workers import end_with_parent

LONGEST_END = 30  # seconds a worker may take to end what it does before it is killed

Made = TypeVar("Made")


def in_order(
    make: Callable[[Sequence[int]], Made],
    lists: Iterator[Sequence[int]],
    *,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> Generator[Made, None, None]:
    """`make(numbers)` for each list of numbers, in their order, in this process or in spawned ones.

    `make` must be picklable. Workers keep `prefetch` lists each in hand and end with this iterator, however it ends; an
    LmrError of theirs is raised here as it was. `pin_memory` calls the method of that name of what was made.
    """
    if not workers:
        yield from map(make, lists)
        return
    context = multiprocessing.get_context("spawn")
    # Read by a signal handler, which the next signal may interrupt: an Event takes a lock and would wait for itself.
    stopping = context.RawValue(ctypes.c_bool, False)
    stop = partial(setattr, stopping, "value", True)
    if os.name == "posix":
        resource_tracker.ensure_running()  # its start lets signals through again: not while they are held
    # At the exit of the interpreter multiprocessing asks its processes to terminate and waits for them.
    atexit.register(stop)
    with _signals_held(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create")  # more workers than cores: as asked
        iterator: Any = iter(
            DataLoader(
                _Batches(make),
                batch_sampler=_Lists(lists),
                num_workers=workers,
                collate_fn=_unchanged,
                prefetch_factor=prefetch,
                pin_memory=pin_memory,
                multiprocessing_context=context,
                worker_init_fn=partial(_start_worker, stopping=stopping),
            )
        )
    try:
        for made in iterator:
            if isinstance(made, LmrError):
                raise made
            yield made
    except (RuntimeError, OSError, EOFError) as error:
        # A batch of a dead worker can not be fetched from it any more: then the error is one of connections.
        if "DataLoader worker" not in str(error) and not wait([worker.sentinel for worker in iterator._workers], 1):
            raise
        raise LmrError(
            f"a process that reads data died ({(str(error).splitlines() or [''])[0][:200]}); is memory or /dev/shm "
            "short? Try fewer workers"
        ) from None
    finally:
        stop()
        iterator._shutdown_workers()
        for worker in iterator._workers:
            # One that is still importing torch sees first of all that it is not needed.
            worker.join(LONGEST_END)
            if worker.is_alive():
                worker.kill()
                worker.join()
        for queue in iterator._index_queues:
            # torch leaves these threads behind. One cut off by the interpreter's end while it gives a semaphore back
            # makes multiprocessing report a leak.
            if queue._thread is not None:
                queue._thread.join(LONGEST_END)
        atexit.unregister(stop)


class _Lists:
    """The lists as what a DataLoader takes for a sampler; it is iterated once."""

    def __init__(self, lists: Iterator[Sequence[int]]) -> None:
        self._lists = lists

    def __iter__(self) -> Iterator[list[int]]:
        return (list(numbers) for numbers in self._lists)


class _Batches(Dataset[Any]):
    """A DataLoader's dataset: a list of numbers -> what is made of it, or the LmrError in its place."""

    def __init__(self, make: Callable[[Sequence[int]], Any]) -> None:
        self._make = make

    def __getitem__(self, number: int) -> Any:
        return self.__getitems__([number])

    def __getitems__(self, numbers: list[int]) -> Any:
        try:
            return self._make(numbers)
        except LmrError as error:  # raised here, it would come back as a traceback
            return error


def _unchanged(made: Any) -> Any:
    return made


def _start_worker(number: int, *, stopping: Any) -> None:
    # Whoever stops the run signals the whole process group; the trainer decides when its workers go, and still wants
    # their batches when it finishes its step. They go when they are told, or when their parent is gone.
    def terminate(*_: object) -> None:
        if stopping.value:
            os._exit(0)

    if stopping.value:
        os._exit(0)
    end_with_parent()
    # What has been loaded here has threads that abort a process when it ends the long way.
    atexit.register(os._exit, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, terminate)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})


@contextmanager
def _signals_held() -> Iterator[None]:
    """Processes started here begin with SIGINT and SIGTERM blocked, until `_start_worker` has its handlers."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
