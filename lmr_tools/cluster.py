"""A `Mapper` over a Ray cluster: the stages of the build on many machines, with the same results in the same order.

Items travel in small batches as Ray tasks, a bounded number in flight. A task whose worker or node dies runs again
elsewhere; every stage function gives the same result from the same item and writes its files whole or not at all, so
nothing is lost or doubled. Work files and sources must be on storage that every node sees under the same path. The
driver keeps no state that its work folder does not hold: killed, the same command goes on.
"""

from __future__ import annotations

import itertools
import queue
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from lmr_tools.schema import LmrError

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIES = 20  # times one batch may lose its worker or node
BATCH = 8  # items per task: a task costs about a millisecond, a photo twenty
AHEAD = 4  # batches in flight per core
PATIENCE = 5.0  # seconds without a result before the head is asked whether it lives
AGAIN = "when it is back, run the same command again, it goes on where it was"


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=10):
            return True
    except OSError:
        return False


def _alive(ray: Any) -> bool:
    """Whether the head of the cluster answers."""
    host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
    for _ in range(3):
        if _listens(host, int(port)):
            return True
        time.sleep(1)
    return False


def _wait(ray: Any, reference: Any) -> Any:
    """`ray.get` that notices a dead head: Ray itself would wait a minute and then end the process without a word."""
    while True:
        try:
            return ray.get(reference, timeout=PATIENCE)
        except ray.exceptions.GetTimeoutError:
            if not _alive(ray):
                raise LmrError(f"the Ray cluster went away; {AGAIN}") from None


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise LmrError("--engine ray: Ray is not installed; run `pip install 'lmr-tools[ray]'`") from None
    return ray


class RayMapper:
    """`Mapper` over a Ray cluster; use it as a context manager.

    `address` is that of a running cluster (`auto`: the one this machine belongs to); None starts one on this machine
    with `workers` cores (None: all). LmrError when there is no Ray, no cluster, or the cluster goes away.
    """

    def __init__(self, address: str | None = None, workers: int | None = None, *, batch: int = BATCH) -> None:
        self.address, self.workers, self.batch = address, workers, batch
        self._ours = False

    def __enter__(self) -> RayMapper:
        ray = _ray()
        if not ray.is_initialized():
            # Ray ends the whole process when nobody listens at an address: ask before it does.
            host, mark, port = (self.address or "").removeprefix("ray://").rpartition(":")
            if mark and port.isdigit() and not _listens(host, int(port)):
                raise LmrError(
                    f"--address {self.address}: no Ray cluster answers there; start one with `ray start --head`"
                )
            options: dict[str, Any] = {"address": self.address or "local"}
            if self.address is None:
                options["num_cpus"] = self.workers
            try:  # Ray itself tells the linear algebra of a task to use one thread per core it was given
                ray.init(include_dashboard=False, log_to_driver=False, logging_level=40, **options)
            except (ConnectionError, ValueError, RuntimeError, OSError) as error:
                shown = " ".join(str(error).split())[:120]
                if self.address is None:
                    raise LmrError(f"--engine ray: Ray does not start on this machine ({shown})") from None
                raise LmrError(
                    f"--address {self.address}: no Ray cluster answers ({shown}); start one with `ray start --head`"
                ) from None
            self._ours = True
        return self

    def __exit__(self, *error: object) -> None:
        if self._ours and _alive(_ray()):
            _ray().shutdown()
            self._ours = False

    def __call__(self, function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        ray = _ray()
        remaining = iter(items)
        flying: deque[Any] = deque()
        try:
            stage = ray.put(function)  # once: a stage may carry a long list of sources
            run = ray.remote(num_cpus=1, max_retries=RETRIES)(_run)
            ahead = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))

            sent = itertools.count()

            def send(batches: int) -> None:
                for _ in range(batches):
                    # Single items at first: a few heavy ones, such as shards, must not end up on one worker.
                    batch = list(itertools.islice(remaining, 1 if next(sent) < ahead else self.batch))
                    if not batch:
                        return
                    flying.append(run.remote(stage, batch))

            send(ahead)
            while flying:
                results = _wait(ray, flying.popleft())
                send(1)
                for result, error in results:
                    if error is not None:
                        raise error
                    yield result
        except (ray.exceptions.RayError, ConnectionError) as error:
            raise LmrError(
                f"the Ray cluster went away or could not run a task ({type(error).__name__}); {AGAIN}"
            ) from None
        finally:
            if flying and ray.is_initialized() and _alive(ray):
                for reference in flying:
                    ray.cancel(reference, force=False)


def _run(function: Callable[[Any], Any], batch: list[Any]) -> list[tuple[Any, Exception | None]]:
    """One batch on a worker. An error of an item is a result: Ray would try a failing task again, in vain."""
    import cv2

    cv2.setNumThreads(1)
    results: list[tuple[Any, Exception | None]] = []
    for item in batch:
        try:
            results.append((function(item), None))
        except LmrError as error:
            results.append((None, error))
            break
    return results


class RayEmbedder:
    """`Embedder` whose forward passes run in actors of the cluster: one per GPU, or one per core where there is none.

    `make(device=...)` makes the embedder, once in every actor. Batches have the shape the actors want, so vectors are
    the same bits as from one embedder on the same kind of device. A lost actor starts again elsewhere.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        ray = _ray()
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0))
        self.parallel = gpus or max(1, int(resources.get("CPU", 1)))
        # Without GPUs the actors take no core of their own: the tasks that make views would never get one.
        options = {"num_gpus": 1, "num_cpus": 0} if gpus else {"num_cpus": 0, "scheduling_strategy": "SPREAD"}
        actor = ray.remote(max_restarts=-1, max_task_retries=RETRIES, **options)(_Embedding)
        self._idle: queue.Queue[Any] = queue.Queue()
        for _ in range(self.parallel):
            self._idle.put(actor.remote(make, "cuda" if gpus else "cpu"))
        first = self._idle.get()
        facts = _answer(ray, first.facts.remote())
        self._idle.put(first)
        self.name, self.key, self.dimension, self.size, self.interpolation, self.views, self.batch_photos = facts

    def embed(self, views_BSSC: Any) -> Any:
        """(B, S, S, 3) -> unit vectors (B, dimension), by an idle actor."""
        actor = self._idle.get()
        try:
            return _answer(_ray(), actor.embed.remote(views_BSSC))
        finally:
            self._idle.put(actor)


class _Embedding:
    def __init__(self, make: Callable[..., Any], device: str) -> None:
        self.embedder = make(device=device)

    def facts(self) -> tuple[Any, ...]:
        e = self.embedder
        return e.name, e.key, e.dimension, e.size, e.interpolation, e.views, e.batch_photos

    def embed(self, views_BSSC: Any) -> Any:
        return self.embedder.embed(views_BSSC)


def _answer(ray: Any, reference: Any) -> Any:
    try:
        return _wait(ray, reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, LmrError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise LmrError(f"the Ray cluster lost its embedders ({type(error).__name__}); {AGAIN}") from None
