"""Everything a training run is at one moment, and its checkpoints: one explicit dict in a file that is whole or absent.

Nothing random needs saving: samples follow from (seed, position) and the penalty's mixing numbers from (seed, step), in
every process and for any number of them; the learning rates follow from the step.
"""

from __future__ import annotations

import copy
import hashlib
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lmr_tools.schema import LmrError
from lmr_tools.tables import atomic_path
from mrefsr.checkpoints import load_model
from mrefsr.config import MODEL_PRESETS, ModelConfig
from mrefsr.discriminator import Discriminator
from mrefsr.losses import PerceptualLoss
from mrefsr.model import MRefSR, new_model
from mrefsr.network import ResidualBlock
from mrefsr.parameters import parameter_groups
from mrefsr.recipes import TrainConfig, refuse_changes

FORMAT, VERSION = "lmr-training-state", 1
NAME = "step-{:09d}.pt"
PUBLISHED_ORDER = ("small", "medium", "large")  # of `TrainConfig.offset_lr`


@dataclass(kw_only=True)
class Training:
    """A run between two steps. `averaged` shares the frozen parts of `model`, and is `model` itself where ema is 0."""

    config: TrainConfig
    model: MRefSR
    averaged: MRefSR
    optimiser: torch.optim.Adam
    scaler: torch.amp.GradScaler
    critic: Discriminator | None = None
    critic_optimiser: torch.optim.Adam | None = None
    perceptual: PerceptualLoss | None = None
    step: int = 0  # steps done
    best: float | None = None  # highest validation PSNR so far, dB

    @property
    def position(self) -> int:
        """Samples that all processes together have consumed."""
        return self.step * self.config.batch


def model_config(config: TrainConfig) -> ModelConfig:
    """The network that a recipe trains."""
    preset = MODEL_PRESETS[config.model]
    return preset if config.backbone == "preset" else replace(preset, backbone=config.backbone)


def new_training(
    config: TrainConfig, device: torch.device, *, matcher: Path | None = None, start: Path | None = None
) -> Training:
    """A run before its first step. First weights follow from `config.seed`; missing pretrained ones are an LmrError.

    `matcher`: a checkpoint of `lmr train-matcher`, whose extractor takes the place of ImageNet's VGG16 in matching.
    `start`: a whole model to begin with instead, trained here or converted, of the recipe's shape.
    """
    generator = torch.Generator().manual_seed(config.seed)
    if start is None:
        model = new_model(model_config(config), generator=generator, matcher=matcher)
    else:
        model = _trained_model(start, model_config(config))
    critic = Discriminator(clean=config.critic == "clean", generator=generator) if config.adversarial else None
    perceptual = PerceptualLoss(norm=config.perceptual_norm) if config.perceptual else None
    model = model.to(device).train()
    averaged = _averaged(model) if config.ema else model
    if config.compile:
        for module in model.network.modules():
            if isinstance(module, ResidualBlock):
                module.compile()
    rates = {scale: config.lr * share for scale, share in zip(PUBLISHED_ORDER, config.offset_lr, strict=True)}
    groups = parameter_groups(model.network, lr=config.lr, offset_lr=rates)
    for group in groups:
        group["base_lr"] = group["lr"]
    critic = critic.to(device) if critic else None
    return Training(
        config=config,
        model=model,
        averaged=averaged,
        optimiser=torch.optim.Adam(groups, betas=config.betas),
        scaler=torch.amp.GradScaler(device.type, enabled=config.precision == "fp16"),
        critic=critic,
        critic_optimiser=torch.optim.Adam(critic.parameters(), config.critic_lr, config.betas) if critic else None,
        perceptual=perceptual.to(device) if perceptual else None,
    )


def _trained_model(start: Path, config: ModelConfig) -> MRefSR:
    """The model of a checkpoint; LmrError when it is another network than the recipe's, with what differs."""
    model = load_model(start)
    found, wanted = asdict(model.config), asdict(replace(config, initialisation=model.config.initialisation))
    other = [f"{key} is {found[key]}, not {wanted[key]}" for key in found if found[key] != wanted[key]]
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise LmrError(
            f"--start-from {start}: another network than the recipe's ({'; '.join(other[:3])}{more}); give its preset "
            "and backbone"
        )
    return model


def _averaged(model: MRefSR) -> MRefSR:
    shared = {id(part): part for part in (model.extractor, model.transfer)}
    return copy.deepcopy(model, shared).requires_grad_(False)  # type: ignore[arg-type]


def rate_factor(config: TrainConfig, step: int) -> float:
    """What the learning rates of step 1, 2, ... are multiplied by: warm-up, then constant or half a cosine."""
    if step <= config.warmup:
        return step / config.warmup
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * min(1.0, done))) / 2


@torch.no_grad()
def average_weights(training: Training) -> None:
    """Move the averaged weights towards those after `training.step` steps. The first steps count for more, so that the
    average does not remember the start."""
    if training.averaged is training.model:
        return
    decay = min(training.config.ema, (1 + training.step) / (10 + training.step))
    own: list[Tensor] = list(training.averaged.network.parameters())
    torch._foreach_lerp_(own, list(training.model.network.parameters()), 1 - decay)  # type: ignore[arg-type]


def frozen_digest(model: MRefSR) -> str:
    """Of the frozen weights: a run that goes on must have those it began with."""
    return weights_digest(model.extractor, model.transfer)


def weights_digest(*parts: nn.Module) -> str:
    """Twelve hex digits of the weights of some networks."""
    digest = hashlib.sha256()
    for part in parts:
        for tensor in part.state_dict().values():
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def to_dict(training: Training, facts: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint. `facts`, JSON, say what else the run depends on (dataset, frozen weights)."""
    critic, critic_optimiser = training.critic, training.critic_optimiser
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": training.step,
        "position": training.position,
        "best": training.best,
        "recipe": training.config.model_dump(mode="json"),
        "facts": facts,
        "network": training.model.network.state_dict(),
        "averaged": training.averaged.network.state_dict() if training.averaged is not training.model else None,
        "optimiser": training.optimiser.state_dict(),
        "scaler": training.scaler.state_dict(),
        "critic": critic.state_dict() if critic else None,
        "critic_optimiser": critic_optimiser.state_dict() if critic_optimiser else None,
    }


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically. OSError, the disk being full say, leaves what was there as it was."""
    try:
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
    except RuntimeError as error:  # torch's writer hides the reason, such as a full disk, behind its own error
        cause = error.__context__
        raise cause if isinstance(cause, OSError) else OSError(f"writing failed: {str(error)[:100]}") from None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, the earliest first."""
    return sorted(folder.glob("step-*.pt"))


def drop_old(folder: Path, keep: int) -> None:
    """Delete all but the latest `keep` checkpoints."""
    for path in checkpoints(folder)[:-keep]:
        path.unlink(missing_ok=True)


def drop_later(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps than `step`, from which a run goes on: these steps come again."""
    for path in checkpoints(folder):
        if path.name > NAME.format(step):
            path.unlink(missing_ok=True)


def load_state(path: Path, training: Training, facts: dict[str, Any]) -> None:
    """Fill `training`, made of the same recipe, from a checkpoint.

    Raises LmrError when the file is damaged, or when it began with another recipe, dataset or frozen weights.
    """
    device = next(training.model.parameters()).device
    try:
        state = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        raise LmrError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, ... on a damaged file
        raise LmrError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to go on from an earlier one"
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT or state.get("version") != VERSION:
        raise LmrError(f"{path}: not a checkpoint of lmr train, or of another version")
    refuse_changes(path, state["recipe"], training.config)
    for key, value in state["facts"].items():
        if facts.get(key) != value:
            now = facts.get(key)
            raise LmrError(
                f"{path}: the run began with another {key} ({value}, now {now}); use the same, or another --out"
            )
    try:
        training.model.network.load_state_dict(state["network"])
        if training.averaged is not training.model:
            training.averaged.network.load_state_dict(state["averaged"])
        training.optimiser.load_state_dict(state["optimiser"])
        training.scaler.load_state_dict(state["scaler"])
        if training.critic is not None and training.critic_optimiser is not None:
            training.critic.load_state_dict(state["critic"])
            training.critic_optimiser.load_state_dict(state["critic_optimiser"])
        training.step, training.best = int(state["step"]), state["best"]
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        raise LmrError(f"{path}: does not fit this version of the network ({str(error)[:200]})") from None
    insist_on_steps_left(path, training.step, training.config.steps)


def insist_on_steps_left(path: Path, done: int, asked: int) -> None:
    """LmrError when a checkpoint is beyond the end of the recipe with which its run is to go on."""
    if done > asked:
        raise LmrError(f"{path}: has {done} steps behind it, more than the {asked} asked for; use another --out")
