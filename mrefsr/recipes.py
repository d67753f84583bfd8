"""What decides a training run: `TrainConfig`, the named presets, and what may change when a run goes on.

The defaults are the published L1 recipe (Zhang et al., ICCV 2023); a preset says where it differs from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lmr_tools.config import load_recipe
from lmr_tools.schema import LmrError
from mrefsr.config import MODEL_PRESETS


class TrainConfig(BaseModel):
    """A training recipe. Lengths are pixels of the target, counts of samples are over all processes together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: Literal["mrefsr", "mrefsr-tiny"] = Field("mrefsr", description="network, of `MODEL_PRESETS`")
    backbone: Literal["preset", "vgg16", "vgg19"] = Field(
        "preset", description="VGG whose features are transferred; preset: that of the network's preset"
    )
    seed: int = Field(0, ge=0, description="seed of first weights, order, crops and references")

    steps: int = Field(255_000, ge=1, description="steps of the optimiser")
    batch: int = Field(48, ge=1, description="samples a step, over all processes")
    accumulate: int = Field(1, ge=1, description="passes into which a process cuts its samples of a step")
    crop: int = Field(160, ge=12, multiple_of=4, description="side of the target crop")
    augment: bool = Field(True, description="flips and transposition, the same for target and references")
    reference_crop: Literal["same", "whole"] = Field(
        "same", description="same: the target's window of every reference crop; whole: all of it"
    )
    min_references: int = Field(1, ge=0, description="references a sample has, at least")
    max_references: int = Field(5, ge=0, description="and at most (or all its group has)")
    no_reference_share: float = Field(0.0, ge=0, le=1, description="share of samples that get no reference")
    wrong_share: float = Field(0.0, ge=0, le=1, description="share of samples that get references of a wrong scene")

    lr: float = Field(1e-4, gt=0, description="learning rate (Adam)")
    offset_lr: tuple[float, float, float] = Field(
        (0.01, 0.1, 1.0), description="of it, for the layers that make offsets and masks at x1, x2, x4"
    )
    betas: tuple[float, float] = Field((0.9, 0.999), description="Adam's betas")
    warmup: int = Field(0, ge=0, description="steps in which the learning rates rise linearly")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rates after that")
    final_lr: float = Field(0.01, ge=0, le=1, description="share of the learning rates at the end of the cosine")
    clip: float = Field(0.0, ge=0, description="largest norm of the gradient; 0: not clipped")
    ema: float = Field(0.999, ge=0, lt=1, description="decay of the averaged weights that are kept; 0: not averaged")

    l1: float = Field(1.0, ge=0, description="weight of the L1 loss")
    perceptual: float = Field(0.0, ge=0, description="weight of the VGG19 relu5_1 loss")
    adversarial: float = Field(0.0, ge=0, description="weight of the critic's judgement")
    l1_steps: int = Field(10_000, ge=0, description="first steps with the L1 loss only, where there are others")
    perceptual_norm: Literal["sample", "official"] = Field(
        "sample", description="sample: norm of each sample, averaged; official: one norm of the whole batch"
    )
    critic: Literal["published", "clean"] = Field("published", description="clean: no BatchNorm, no sigmoid")
    critic_lr: float = Field(1e-4, gt=0, description="learning rate of the critic (Adam, same betas)")
    gradient_penalty: float = Field(10.0, ge=0, description="weight of WGAN-GP's penalty")

    precision: Literal["fp32", "bf16", "fp16"] = Field("fp32", description="autocast; matching and critic stay fp32")
    compile: bool = Field(False, description="torch.compile of the residual blocks")
    recompute: bool = Field(False, description="half the memory, a fifth more time, the same gradients")

    workers: int = Field(2, ge=0, description="processes that read and decode, for each training process")
    log_every: int = Field(50, ge=1, description="steps between two lines of the log")
    checkpoint_every: int = Field(1000, ge=1, description="steps between two checkpoints")
    keep: int = Field(3, ge=1, description="checkpoints that are kept, the latest")
    validate_every: int = Field(5000, ge=1, description="steps between two validations")
    validate_groups: int = Field(64, ge=0, description="groups of the val split that are used; 0: no validation")
    pictures: int = Field(4, ge=0, description="of these, how many are shown as sample pictures")

    @model_validator(mode="after")
    def _consistent(self) -> TrainConfig:
        if self.min_references > self.max_references:
            raise ValueError("min_references must not be above max_references")
        if self.batch % self.accumulate:
            raise ValueError(f"batch {self.batch} does not split into {self.accumulate} equal passes (accumulate)")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup {self.warmup} must be below steps {self.steps}")
        if not self.l1 + self.perceptual + self.adversarial:
            raise ValueError("l1, perceptual and adversarial are all 0: nothing would be learnt")
        if not (all(0 <= rate <= 10 for rate in self.offset_lr) and all(0 <= beta < 1 for beta in self.betas)):
            raise ValueError("offset_lr are shares between 0 and 10, betas between 0 and 1")
        return self

    @property
    def adversarial_from(self) -> int:
        """First step with the perceptual and adversarial losses; beyond `steps` where their weights are 0."""
        return self.l1_steps + 1 if self.perceptual or self.adversarial else self.steps + 1


# What a preset sets beside the defaults above.
PRESETS: dict[str, dict[str, Any]] = {
    "mrefsr-rec": {},
    "mrefsr-gan": {"perceptual": 1e-4, "adversarial": 1e-6},
    # One CPU core, minutes.
    "tiny": {
        "model": "mrefsr-tiny",
        "steps": 1000,
        "batch": 4,
        "crop": 96,
        "min_references": 1,
        "max_references": 2,
        "no_reference_share": 0.1,
        "wrong_share": 0.3,
        "lr": 1e-3,
        "offset_lr": (0.3, 0.3, 0.3),
        "warmup": 50,
        "schedule": "cosine",
        "clip": 1.0,
        "ema": 0.99,
        "workers": 0,
        "log_every": 10,
        "checkpoint_every": 100,
        "validate_every": 200,
        "validate_groups": 16,
    },
}
# Keys that change how a run is watched and where it runs, not what it learns.
FREE = frozenset(
    {"workers", "log_every", "checkpoint_every", "keep", "validate_every", "validate_groups", "pictures", "recompute"}
)


def train_config(preset: str, recipe: Path | None, overrides: Mapping[str, Any]) -> TrainConfig:
    """The preset's keys, the recipe file's over them, then the overrides that are not None; all validated.

    Raises LmrError that names an unknown key, a wrong value or an unreadable file.
    """
    config = load_recipe(TrainConfig, recipe, overrides, PRESETS[preset])
    if config.backbone == MODEL_PRESETS[config.model].backbone:
        config = config.model_copy(update={"backbone": "preset"})  # one name for one thing
    return config


def changed_keys(old: Mapping[str, Any], new: TrainConfig) -> list[str]:
    """Keys in which a run that goes on would differ from its beginning and that decide what it learns.

    `old` is the JSON form of the earlier recipe. More steps are no change where the learning rate does not depend on
    their number.
    """
    now = new.model_dump(mode="json")
    free = FREE | ({"steps"} if new.schedule == "constant" and old.get("schedule") == "constant" else frozenset())
    return [key for key in sorted(now.keys() | old.keys()) if key not in free and now.get(key) != old.get(key)]


def refuse_changes(where: Path, old: Mapping[str, Any], new: TrainConfig) -> None:
    """LmrError that names what is not as in the run's beginning, with both values."""
    changed = changed_keys(old, new)
    if changed:
        now = new.model_dump(mode="json")
        told = ", ".join(f"{key} was {old.get(key)!r} and is {now.get(key)!r}" for key in changed)
        raise LmrError(f"{where}: the run began with another recipe ({told}); use the same, or another --out")
