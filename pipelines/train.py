"""`lmr train`: a built dataset and a recipe go in, a model for `lmr upscale` and `lmr evaluate` comes out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click

from lmr_tools.schema import LmrError

from .progress import note

if TYPE_CHECKING:
    from mrefsr.machines import Machine
    from mrefsr.recipes import TrainConfig

PRESETS = ("mrefsr-rec", "mrefsr-gan", "tiny")  # those of mrefsr.recipes, which is too heavy to import here
FILE = click.Path(path_type=Path)
INTERRUPTED = 130


@click.command()
@click.argument("preset", type=click.Choice(PRESETS))
@click.option("--dataset", required=True, help="Folder or URL of a built dataset.")
@click.option("--out", type=FILE, metavar="RUN", required=True, help="Folder of the run: checkpoints, log, model.")
@click.option("--recipe", type=FILE, help="TOML or YAML file with any of the recipe's keys.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set any key of the recipe.")
@click.option("--steps", type=int, help="Steps of the optimiser.  [the preset's]")
@click.option("--batch", type=int, help="Samples a step, over all processes.  [the preset's]")
@click.option("--workers", type=int, help="Processes that read data, for each that trains.  [the preset's]")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@click.option("--gpus", type=click.IntRange(1), help="Train on so many GPUs, a process each.")
@click.option("--processes", type=click.IntRange(1), help="Train in so many processes on the CPU.")
@click.option(
    "--resume",
    default="auto",
    show_default=True,
    metavar="auto|never|FILE",
    help="auto: go on where RUN is; never: refuse a RUN that has begun; FILE: go on from this checkpoint.",
)
@click.option("--matcher", type=FILE, help="Matching weights (lmr train-matcher).  [ImageNet's VGG16]")
@click.option("--start-from", "start", type=FILE, help="Begin with this model.  [weights drawn by the seed]")
@click.option("--dry-run", is_flag=True, help="Show the recipe, the network's size and the memory it takes, and stop.")
def train(
    preset: str,
    dataset: str,
    out: Path,
    recipe: Path | None,
    settings: tuple[str, ...],
    device: str,
    gpus: int | None,
    processes: int | None,
    resume: str,
    matcher: Path | None,
    start: Path | None,
    dry_run: bool,
    **options: Any,
) -> None:
    """Train MRefSR on a built dataset by the recipe PRESET.

    mrefsr-rec: the published network, L1 loss. mrefsr-gan: with perceptual and adversarial losses. tiny: a small
    network that learns on one CPU core in minutes.

    RUN/model.safetensors is the result. The same command goes on after a stop: Ctrl-C (or SIGTERM) finishes the step
    and saves, a kill loses the steps since the last checkpoint. torchrun --no-python runs it on several machines.

    Exit code: 0 at the end, 130 when it was stopped.
    """
    # Read when torch is loaded: its warnings below errors are hints for programmers, one from every process.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from lmr_tools.config import parse_settings
    from mrefsr.machines import STARTED, is_rank, leave
    from mrefsr.machines import start as start_all
    from mrefsr.recipes import train_config
    from mrefsr.run_folder import claim_run

    if start and matcher:
        raise click.UsageError("--start-from and --matcher: a model has its matching weights; give one of them")
    if gpus and processes:
        raise click.UsageError("--gpus and --processes: give one of them")
    started = STARTED in os.environ
    if is_rank() and (gpus or processes) and not started:
        raise click.UsageError("--gpus and --processes start processes themselves: leave them out under torchrun")
    try:
        given = {key: value for key, value in options.items() if value is not None}
        config = train_config(preset, recipe, parse_settings(settings) | given)
    except LmrError as error:
        raise click.UsageError(str(error)) from None
    device = "cuda" if gpus else "cpu" if processes else device
    count = gpus or processes or 1
    if dry_run:
        _show_plan(preset, config, count)
        return
    if started:  # the process that started this one has checked everything and holds the folder
        leave(_run(preset, config, dataset, out, device, resume, matcher, start))
    speaks = int(os.environ.get("RANK", 0)) == 0
    with claim_run(out) if speaks else contextlib.nullcontext():
        if speaks:
            _check(config, dataset, int(os.environ.get("WORLD_SIZE", count)))
            click.echo(_recipe_text(preset, config))
        if count == 1:
            code = _run(preset, config, dataset, out, device, resume, matcher, start)
        else:
            from lmr_tools.workers import default_workers

            command = [sys.executable, "-c", "from lmr_pipelines.cli import main; main()", *sys.argv[1:]]
            code = start_all(command, count, max(1, default_workers() // count))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        leave(code)
    click.get_current_context().exit(code)


def _run(
    preset: str,
    config: TrainConfig,
    dataset: str,
    out: Path,
    device: str,
    resume: str,
    matcher: Path | None,
    start: Path | None,
) -> int:
    """Train as this process of the run; returns its exit code."""
    from lmr_tools.stream import open_samples
    from lmr_tools.tables import fingerprint
    from mrefsr.cost import versions
    from mrefsr.machines import joined
    from mrefsr.run_folder import begin_or_go_on, dataset_facts, states_folder
    from mrefsr.train import FINAL, Data, training_batches
    from mrefsr.train import train as run_training
    from mrefsr.training_state import drop_later, frozen_digest, load_state, new_training, weights_digest

    with joined(device) as machine, Screen(machine.first) as screen:
        store = open_samples(dataset, "train")
        data = Data(train=store, held_out=_held_out(config, dataset, screen))
        training_batches(store, config, machine, 0)  # says what is wrong before weights are loaded
        training = new_training(config, machine.device, matcher=matcher, start=start)
        facts = {
            "dataset": dataset_facts(store)["fingerprint"],
            "matching and transfer weights": frozen_digest(training.model),
            "shape of network": fingerprint(dataclasses.asdict(training.model.config)),  # presets may change
            "--start-from": weights_digest(training.model.network) if start else "none",
        }
        state = begin_or_go_on(out, resume, preset, config, dataset_facts(store)) if machine.first else None
        state = machine.gather(state)[0]
        if state is not None:
            load_state(state, training, facts)
            if machine.first:  # now that nothing refuses the file
                drop_later(states_folder(out), training.step)
            screen.line(f"going on after step {training.step} ({state})")
        elif start is not None:
            screen.line(f"beginning with {start}")
        provenance = {
            "by": "lmr train",
            "preset": preset,
            "recipe": config.model_dump(mode="json"),
            "dataset": {key: value for key, value in dataset_facts(store).items() if key != "path"},
            "matching": _matching(matcher, start),
            "start": _named(start) if start else None,
            "averaged": config.ema > 0,
            "versions": versions(),
        }
        screen.line(_where(machine))
        ended = run_training(training, data, out, machine, facts=facts, provenance=provenance, show=screen)
        step = training.step
        if machine.first and ended:
            screen.line(f"{out / FINAL}: use it by lmr upscale --weights, lmr evaluate --method mrefsr --weights")
        elif machine.first:
            screen.line(f"stopped after step {step}; the same command goes on from there")
    return 0 if ended else INTERRUPTED


def _check(config: TrainConfig, dataset: str, world_size: int) -> None:
    """Say what is wrong with the dataset before anything is started."""
    import torch

    from lmr_tools.stream import open_samples
    from mrefsr.machines import Machine
    from mrefsr.train import training_batches

    machine = Machine(device=torch.device("cpu"), world_size=world_size)
    training_batches(open_samples(dataset, "train"), config, machine, 0)


def _held_out(config: TrainConfig, dataset: str, screen: Screen) -> Any:
    from lmr_tools.stream import open_samples

    if not config.validate_groups:
        return None
    try:
        return open_samples(dataset, "val")
    except LmrError as error:
        screen.line(f"no validation: {error}")
        return None


def _matching(matcher: Path | None, start: Path | None) -> str:
    given = matcher or start
    return "ImageNet VGG16" if given is None else _named(given)


def _named(path: Path) -> str:
    from lmr_tools.tables import sha256_file

    return f"{path.name}, sha256 {sha256_file(path)}"


def _where(machine: Machine) -> str:
    from mrefsr.cost import device_name

    several = f", {machine.world_size} processes" if machine.world_size > 1 else ""
    return f"device     {device_name(machine.device)}{several}"


def _recipe_text(preset: str, config: TrainConfig) -> str:
    lines = [f"{key:<20} {value}" for key, value in config.model_dump(mode="json").items()]
    return "\n".join([f"{'preset':<20} {preset}", *lines])


def _show_plan(preset: str, config: TrainConfig, count: int) -> None:
    from mrefsr.footprint import HALF, footprint
    from mrefsr.training_state import model_config

    size = footprint(
        model_config(config),
        crop=config.crop,
        references=config.max_references,
        averaged=config.ema > 0,
        recompute=config.recompute,
    )
    samples = max(1, config.batch // (count * config.accumulate))
    kept = size.sample * samples * (1.0 if config.precision == "fp32" else HALF)
    click.echo(_recipe_text(preset, config))
    click.echo(
        f"\nparameters           {size.trained:,} trained, {size.frozen:,} frozen (matching, transferred features)"
    )
    click.echo(
        f"memory               about {(size.weights + kept) / 1e9:.1f} GB for each of {count} processes: weights, "
        f"gradients, optimiser {size.weights / 1e9:.2f} GB; {samples} samples at once {kept / 1e9:.2f} GB; critic, "
        "matching and buffers come on top"
    )
    click.echo(f"samples              {config.steps * config.batch:,} in {config.steps:,} steps")


class Screen:
    """What a person sees of a run, on stderr: a bar on a terminal, lines everywhere; nothing where not `speaks`."""

    def __init__(self, speaks: bool) -> None:
        self._speaks = speaks
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Screen:
        if self._speaks and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=120)
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, done: int, total: int, text: str) -> None:
        """Move the bar."""
        if self._bar is None:
            return
        if self._task is None:
            self._task = self._bar.add_task(text, total=total, completed=done - 1)
        self._bar.update(self._task, completed=done, description=text)

    def line(self, text: str) -> None:
        """A line that stays."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._speaks:
            note(text)
