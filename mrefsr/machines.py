"""The processes of one training run: which of them this is, what they tell each other, and how several are started."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import nn

from lmr_tools.schema import LmrError
from mrefsr.infer import choose_device

STARTED = "LMR_STARTED"  # set in processes that `start` started: the file in which they find each other
PEER_LOST = 70  # exit code of a process that ends because another one has
GRACE = 5.0  # seconds in which the others may end by themselves after one has


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One of `world_size` processes that train together, and its device."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and talks to the person."""
        return self.rank == 0

    def mean(self, values: Mapping[str, float]) -> dict[str, float]:
        """The mean of each value over all processes, the same in all of them; NaN where it is NaN in any."""
        if self.world_size == 1:
            return dict(values)
        total = torch.tensor([*values.values()], dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return dict(zip(values, (total / self.world_size).tolist(), strict=True))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its mean over all processes. For a network that DDP does not wrap: it can not
        follow the second derivatives of a gradient penalty."""
        if self.world_size == 1:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        parts = torch.split(flat / self.world_size, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    def share(self, batch: int, accumulate: int) -> int:
        """Samples in one pass of this process, of `batch` in all; LmrError when they do not split evenly."""
        passes = self.world_size * accumulate
        if batch % passes:
            raise LmrError(
                f"batch {batch}: does not split evenly over {self.world_size} processes of {accumulate} passes; "
                f"--set batch={max(1, batch // passes) * passes}"
            )
        return batch // passes


def is_rank() -> bool:
    """Whether torchrun or `start` started this process as one of several (or as the only one of them)."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@contextlib.contextmanager
def joined(device: str) -> Iterator[Machine]:
    """This process among those of its run, as the environment says (torchrun's variables); alone without them.

    `device` is auto, cpu, cuda ...; each of several processes on GPUs gets its own. Computation between processes is
    NCCL's on GPUs and gloo's on CPUs. LmrError when the device is not there.
    """
    place = choose_device(device)
    if not is_rank():
        yield Machine(device=place)
        return
    if place.type == "cuda":
        local, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= there:
            raise LmrError(f"--gpus: process {local} has no GPU of its own, there are {there}")
        place = torch.device("cuda", local)
        torch.cuda.set_device(place)
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    meeting = f"file://{os.environ[STARTED]}" if STARTED in os.environ else "env://"
    if STARTED in os.environ:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo", init_method=meeting, rank=rank, world_size=world_size
    )
    try:
        yield Machine(device=place, rank=rank, world_size=world_size)
    except RuntimeError as error:
        if world_size > 1 and _is_lost_peer(error):
            print("another process of this run has ended", file=sys.stderr, flush=True)
            os._exit(PEER_LOST)
        raise
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process, one of several of a finished run, with `code` and without the interpreter's own ending: threads
    that PyTorch leaves behind a process group may still be letting go of Python objects then, which aborts it."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_lost_peer(error: RuntimeError) -> bool:
    words = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _end_with_parent() -> None:
    """Wait for the end of standard input, which `start` holds open as long as it lives, and end with it."""
    with contextlib.suppress(OSError):
        while os.read(0, 1):
            pass
    os._exit(PEER_LOST)


def start(command: Sequence[str], count: int, threads: int) -> int:
    """Run `command` in `count` processes as the ranks of one run and wait for all; returns the exit code of the first
    that failed, else 0.

    Rank 0 writes to this process's own output; what another one that failed by itself wrote is shown at the end. SIGINT
    and SIGTERM are passed on. When one process fails the others are stopped; when this one dies they end by themselves.
    """
    folder = Path(tempfile.mkdtemp(prefix="lmr-train-"))
    processes: list[subprocess.Popen[bytes]] = []
    before: dict[signal.Signals, Any] = {}

    def pass_on(number: int, _: Any) -> None:
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, pass_on)
        for rank in range(count):
            environment = os.environ | {
                STARTED: str(folder / "meeting"),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(count),
            }
            environment.setdefault("OMP_NUM_THREADS", str(threads))
            output = None if rank == 0 else (folder / f"{rank}.txt").open("wb")
            with output or contextlib.nullcontext():
                # A session of its own: the terminal's Ctrl-C comes once, from here.
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            processes.append(process)
        code = _wait(processes)
        if code and processes[0].returncode in (0, PEER_LOST, -signal.SIGKILL):
            for rank in range(1, count):
                if processes[rank].returncode not in (0, PEER_LOST, -signal.SIGKILL):
                    lines = (folder / f"{rank}.txt").read_text(errors="replace").strip().splitlines()
                    print(f"process {rank}: " + (lines or ["it ended without a word"])[-1], file=sys.stderr)
        return code
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin:
                process.stdin.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        shutil.rmtree(folder, ignore_errors=True)


def _wait(processes: Sequence[subprocess.Popen[bytes]]) -> int:
    deadline = None
    ended_here: set[int] = set()
    while any(process.poll() is None for process in processes):
        failed = [process for process in processes if process.poll() not in (None, 0)]
        if failed and deadline is None:
            deadline = time.monotonic() + GRACE
        if deadline is not None and time.monotonic() > deadline:
            for rank, process in enumerate(processes):
                if process.poll() is None:
                    ended_here.add(rank)
                    process.kill()
        time.sleep(0.1)
    for rank, process in enumerate(processes):
        if process.returncode == -signal.SIGKILL and rank not in ended_here:
            print(f"process {rank} was killed; was memory short?", file=sys.stderr)
    codes = [process.returncode for process in processes if process.returncode]
    own = [code for code in codes if code not in (PEER_LOST, -signal.SIGKILL)]
    if not own:
        return 1 if codes else 0
    return own[0] if own[0] >= 0 else 128 - own[0]
