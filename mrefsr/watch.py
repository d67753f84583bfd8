"""What a run tells while it runs: lines of JSON in RUN/log.jsonl, TensorBoard events, and numbers for the screen.

A log that can not be written (a full disk) is said once and never stops a run.
"""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from PIL import Image as PilImage

from lmr_tools.tables import write_bytes
from mrefsr.cost import peak_memory
from mrefsr.data import Batch
from mrefsr.machines import Machine
from mrefsr.training_state import Training

LOG = "log.jsonl"


class Show(Protocol):
    """How a run talks to a person: a step done, and a line that stays."""

    def step(self, done: int, total: int, text: str) -> None: ...

    def line(self, text: str) -> None: ...


class Silent:
    """A `Show` that says nothing: for all processes but the first."""

    def step(self, done: int, total: int, text: str) -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """Nothing."""


def cut_log(path: Path, step: int) -> None:
    """Forget what was logged after the checkpoint of `step`, from which a run goes on: those steps come again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # the half line of a killed run
            continue
    write_bytes(path, "".join(kept).encode())


class Waiting:
    """An iterator of batches that knows how long it was waited for; closing it closes what it reads."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self._batches = batches
        self.seconds = 0.0

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        try:
            return next(self._batches)
        finally:
            self.seconds += time.perf_counter() - start

    def close(self) -> None:
        """End the processes that read."""
        close = getattr(self._batches, "close", None)
        if close is not None:
            close()


class Watch:
    """The log of one run; `None` for `run` keeps none. Use it as a context manager."""

    def __init__(self, run: Path | None, training: Training, machine: Machine, batches: Waiting, show: Show) -> None:
        self._run, self._training, self._machine = run, training, machine
        self._batches, self._show = batches, show
        self._told: set[str] = set()
        self._board: Any = None
        self._restart()
        if run is not None:
            self.spare("the log", lambda: cut_log(run / LOG, training.step))
            self._board = self._open_board(run / "tensorboard")

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._board is not None:
            self.spare("TensorBoard's log", self._board.close)

    def _restart(self) -> None:
        self._sums: defaultdict[str, float] = defaultdict(float)
        self._counts: defaultdict[str, int] = defaultdict(int)
        self._steps, self._since, self._waited = 0, time.perf_counter(), self._batches.seconds

    def _open_board(self, folder: Path) -> Any:
        if importlib.util.find_spec("tensorboard") is None:
            self._show.line("no TensorBoard events: `pip install tensorboard` (or lmr-tools[train]) adds them")
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder, purge_step=self._training.step + 1)  # type: ignore[no-untyped-call]

    def step(self, values: Mapping[str, float]) -> None:
        """Count a step that is done; every `log_every` of them are one line: means over these steps."""
        training, config = self._training, self._training.config
        for name, value in values.items():
            if math.isfinite(value):  # an infinite gradient of a step that fp16's scaler skips has no mean
                self._sums[name] += value
                self._counts[name] += 1
        self._steps += 1
        speed = self._speed()
        loss = self._sums["loss"] / self._steps
        text = f"loss {loss:.5f}  {speed['samples_per_s']:.2f} samples/s  waits {speed['data_wait']:.0%}"
        self._show.step(training.step, config.steps, text)
        if training.step % config.log_every and training.step != config.steps:
            return
        record = {name: value / self._counts[name] for name, value in self._sums.items()} | speed
        record["learning_rate"] = training.optimiser.param_groups[0]["lr"]
        self._write(record)
        memory = f"  {speed['memory_mb']:.0f} MB" if "memory_mb" in speed else ""
        parts = "".join(
            f"  {name} {record[name]:.4g}"
            for name in ("perceptual", "adversarial", "critic", "penalty")
            if name in record
        )
        self._show.line(f"step {training.step:>7} of {config.steps}  {text}{memory}{parts}")
        self._restart()

    def pause(self, seconds: float) -> None:
        """Leave out `seconds` of validation or writing from the speed."""
        self._since += seconds

    def _speed(self) -> dict[str, float]:
        seconds = max(1e-9, time.perf_counter() - self._since)
        speed = {
            "samples_per_s": self._steps * self._training.config.batch / seconds,
            "data_wait": min(1.0, (self._batches.seconds - self._waited) / seconds),
        }
        memory = peak_memory(self._machine.device)
        return speed if memory is None else speed | {"memory_mb": memory / 1e6}

    def validation(self, means: Mapping[str, float], sheet: Path | None) -> None:
        """A line for a validation, and its sheet of pictures for TensorBoard."""
        self._write({f"val_{name}": value for name, value in means.items()})
        self._show.line(
            f"step {self._training.step:>7}: validation PSNR {means['psnr']:.2f} dB "
            f"({means['psnr'] - means['bicubic_psnr']:+.2f} over bicubic), SSIM {means['ssim']:.4f} "
            f"({means['ssim'] - means['bicubic_ssim']:+.4f}), {means['groups']:.0f} groups"
            + (f", pictures in {sheet}" if sheet else "")
        )
        if self._board is not None and sheet is not None:
            with PilImage.open(sheet) as picture:
                pixels = np.array(picture.convert("RGB"))
            board, step = self._board, self._training.step
            self.spare("TensorBoard's log", lambda: board.add_image("samples", pixels, step, dataformats="HWC"))

    def _write(self, record: Mapping[str, float]) -> None:
        run, step = self._run, self._training.step
        if run is None:
            return

        def write() -> None:
            with (run / LOG).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **record}) + "\n")
            if self._board is not None:
                for name, value in record.items():
                    self._board.add_scalar(name.replace("val_", "validation/"), value, step)

        self.spare("the log", write)

    def spare(self, what: str, write: Any) -> bool:
        """Write something that the run can do without; a failure is said, once for each thing. Whether it worked."""
        try:
            write()
        except OSError as error:
            if what not in self._told:
                self._told.add(what)
                self._show.line(f"warning: {what} could not be written ({error.strerror or error}); training goes on")
            return False
        self._told.discard(what)
        return True
