"""The training loop: batch -> loss -> step, and between steps a look at held-out groups and a checkpoint."""

from __future__ import annotations

import math
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmr_tools.schema import LmrError
from lmr_tools.stream import SampleStore
from mrefsr.checkpoints import save_model
from mrefsr.data import SampleRule, train_batches, validation_batches
from mrefsr.learning import Gradients, clip_gradients, parallel, take_gradients, update
from mrefsr.machines import Machine
from mrefsr.recipes import TrainConfig
from mrefsr.run_folder import states_folder
from mrefsr.stopping import StopRequest
from mrefsr.training_state import NAME, Training, drop_old, save_state, to_dict
from mrefsr.validation import draw_sheet, means, validate
from mrefsr.watch import Show, Silent, Waiting, Watch

BEST, FINAL = "best.safetensors", "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class Data:
    """Opened splits of a dataset; `held_out` is None where there is no validation split."""

    train: SampleStore
    held_out: SampleStore | None


def train(
    training: Training, data: Data, run: Path, machine: Machine, *, facts: dict[str, Any], provenance: dict[str, Any],
    show: Show,
) -> bool:  # fmt: skip
    """Train from where `training` is to the end of its recipe, or to SIGINT or SIGTERM; then a checkpoint is there.

    `facts` go into checkpoints and must be the same when the run goes on; `provenance` goes into the models that are
    written. Returns whether the end was reached. Raises LmrError when a loss or gradient is not finite.
    """
    config = training.config
    batches = Waiting(training_batches(data.train, config, machine, training.position))
    net = parallel(training, machine)
    own = run if machine.first else None
    say = show if machine.first else Silent()
    with closing(batches), StopRequest() as stop, Watch(own, training, machine, batches, say) as watch:
        while training.step < config.steps:
            found = take_gradients(training, net, machine, batches)
            values = machine.mean(found.losses | {"stop": float(stop.asked)})
            values["gradient_norm"] = clip_gradients(training)
            _insist_on_finite(training, found, values, run, machine, facts)
            stopping = values.pop("stop") > 0
            update(training)
            watch.step(values)
            start, ending = time.perf_counter(), training.step == config.steps
            if data.held_out and config.validate_groups and (ending or training.step % config.validate_every == 0):
                _look(training, data.held_out, run, machine, provenance, watch)
            if machine.first and (stopping or ending or training.step % config.checkpoint_every == 0):
                _save(training, run, facts, watch)
            watch.pause(time.perf_counter() - start)
            if stopping:
                break
        if machine.first and training.step == config.steps:
            save_model(run / FINAL, training.averaged, provenance | {"steps": training.step})
    return training.step == config.steps


def training_batches(store: SampleStore, config: TrainConfig, machine: Machine, position: int) -> Any:
    """The batches of this process's passes from `position` on; LmrError at the call when they can not be had."""
    return train_batches(
        store,
        rule=sample_rule(config),
        batch_size=machine.share(config.batch, config.accumulate),
        seed=config.seed,
        position=position,
        rank=machine.rank,
        world_size=machine.world_size,
        workers=config.workers,
        device=machine.device,
    )


def sample_rule(config: TrainConfig) -> SampleRule:
    """What the recipe makes of a stored group."""
    return SampleRule(
        crop=config.crop,
        augment=config.augment,
        reference_crop=config.reference_crop,
        min_references=config.min_references,
        max_references=config.max_references,
        no_reference_share=config.no_reference_share,
        wrong_share=config.wrong_share,
    )


def _look(
    training: Training, held_out: SampleStore, run: Path, machine: Machine, provenance: dict[str, Any], watch: Watch
) -> None:
    """Validate, show pictures, keep the best model."""
    config = training.config
    batches = validation_batches(
        held_out, limit=config.validate_groups, rank=machine.rank, world_size=machine.world_size, device=machine.device
    )
    scored = validate(training.averaged, batches, machine, config.pictures)
    if not machine.first:
        return
    mean, sheet = means(scored), run / "pictures" / f"step-{training.step:09d}.png"
    drawn = config.pictures > 0 and watch.spare("sample pictures", lambda: draw_sheet(sheet, scored, training.step))
    watch.validation(mean, sheet if drawn else None)
    if training.best is None or mean["psnr"] > training.best:
        about = provenance | {"steps": training.step, "validation": mean}
        if watch.spare(f"the best model ({BEST})", lambda: save_model(run / BEST, training.averaged, about)):
            training.best = mean["psnr"]  # else the next one that is written is the best there is


def _save(training: Training, run: Path, facts: dict[str, Any], watch: Watch) -> None:
    folder = states_folder(run)
    path = folder / NAME.format(training.step)
    if watch.spare(f"checkpoint {path.name}", lambda: save_state(path, to_dict(training, facts))):
        drop_old(folder, training.config.keep)


def _insist_on_finite(
    training: Training, found: Gradients, values: dict[str, float], run: Path, machine: Machine, facts: dict[str, Any]
) -> None:
    """LmrError when a loss or the gradient is not finite, with the state before this step in a checkpoint of its own.

    In fp16 an infinite gradient is common: the scaler skips such a step and lowers its factor.
    """
    wrong = [name for name, value in values.items() if not math.isfinite(value)]
    if not wrong or (wrong == ["gradient_norm"] and training.scaler.is_enabled()):
        return
    bad = any(not math.isfinite(value) for value in found.losses.values()) or wrong == ["gradient_norm"]
    ids = [group_id for share in machine.gather(found.group_ids if bad else ()) for group_id in share]
    path, step = states_folder(run) / f"before-{NAME.format(training.step + 1)}", training.step + 1
    where = f"the state before it is in {path}"
    if machine.first:
        try:
            save_state(path, to_dict(training, facts))
        except OSError as error:
            where = f"and the state before it could not be written ({error.strerror or error})"
    raise LmrError(
        f"step {step}: {', '.join(wrong)} not finite, groups {', '.join(ids)}; {where}; a lower lr, clip or "
        "precision=fp32 may help, in another --out; --start-from takes a model of this run"
    )
