"""The run of a matcher between two steps: its recipe, its networks, its checkpoints, and the folder they lie in."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lmr_tools.schema import LmrError
from lmr_tools.tables import read_json, write_json
from mrefsr.checkpoints import load_checkpoint, load_matcher
from mrefsr.correspondence import PairRule
from mrefsr.features import MatchingExtractor, load_imagenet_extractor
from mrefsr.run_folder import states_folder
from mrefsr.training_state import checkpoints, insist_on_steps_left

FORMAT, VERSION = "lmr-matcher-run", 1
STAGES = ("teacher", "student")
# Keys that may change when a run goes on: they do not change what a step does.
FREE = ("steps", "workers", "checkpoint_every", "validate_every", "log_every", "keep")


@dataclass(frozen=True, kw_only=True)
class MatcherConfig:
    """Recipe of one stage. `crop`, `shift` and `photometric` as in `PairRule`; the loss as in `match_loss`."""

    stage: Literal["teacher", "student"]
    steps: int
    batch: int = 8
    crop: int = 160
    shift: float = 10.0
    photometric: float = 0.1
    lr: float = 1e-3
    margin: float = 1.0
    safe_radius: float = 4.0
    distillation: float = 15.0  # weight of the teacher in stage "student"
    temperature: float = 0.15
    seed: int = 0
    workers: int = 0
    checkpoint_every: int = 500
    validate_every: int = 500
    validate_pairs: int = 32
    log_every: int = 20
    keep: int = 2

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise LmrError(f"stage {self.stage!r}: must be {' or '.join(STAGES)}")
        least = {"steps": 1, "batch": 1, "checkpoint_every": 1, "validate_every": 1, "log_every": 1, "keep": 1}
        for name, limit in (least | {"workers": 0, "validate_pairs": 0, "seed": 0}).items():
            if getattr(self, name) < limit:
                raise LmrError(f"{name} {getattr(self, name)}: must be at least {limit}")
        for name in ("lr", "margin", "temperature", "distillation", "safe_radius"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0) or (name in ("lr", "temperature") and not value):
                raise LmrError(f"{name} {value}: must be a positive number")
        self.rule()

    def rule(self) -> PairRule:
        """How pairs are made."""
        return PairRule(crop=self.crop, shift=self.shift, photometric=self.photometric)


@dataclass(kw_only=True)
class MatcherRun:
    """A run between two steps; `teacher` is there in stage "student"."""

    config: MatcherConfig
    extractor: MatchingExtractor
    teacher: MatchingExtractor | None
    optimiser: torch.optim.Adam
    step: int = 0  # steps done


def new_run(config: MatcherConfig, device: torch.device, *, start: Path | None, teacher: Path | None) -> MatcherRun:
    """A run before its first step. `start`: a matcher to begin with, else ImageNet's VGG16; `teacher`: a matcher.

    Raises LmrError when a file is missing or of another kind, and when stage and teacher do not fit together.
    """
    if (config.stage == "student") != (teacher is not None):
        needs = "needs --teacher, the result of --stage teacher" if teacher is None else "takes no --teacher"
        raise LmrError(f"--stage {config.stage} {needs}")
    if teacher is not None and load_checkpoint(teacher).provenance.get("stage") == "student":
        raise LmrError(f"--teacher {teacher}: is a student itself; give the result of --stage teacher")
    if start is None:
        extractor = MatchingExtractor()
        load_imagenet_extractor(extractor)
    else:
        extractor = load_matcher(start)
    extractor = extractor.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    frozen = None
    if teacher is not None:
        frozen = load_matcher(teacher).to(device, memory_format=torch.channels_last).requires_grad_(False)  # type: ignore[call-overload]
    return MatcherRun(
        config=config,
        extractor=extractor,
        teacher=frozen,
        optimiser=torch.optim.Adam(extractor.parameters(), lr=config.lr),
    )


def to_dict(run: MatcherRun, facts: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint: nothing random is in it, as pairs follow from seed and position."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "step": run.step,
        "recipe": dataclasses.asdict(run.config),
        "facts": facts,
        "extractor": run.extractor.state_dict(),
        "optimiser": run.optimiser.state_dict(),
    }


def go_on(folder: Path, run: MatcherRun, facts: dict[str, Any], resume: str) -> None:
    """Fill `run` from the folder's latest checkpoint, if there is one, and write the folder's recipe.json.

    Raises LmrError when `resume` is "never" and the folder holds a run, when the run began with another recipe,
    dataset, teacher or start, naming what differs, and for a damaged checkpoint.
    """
    found = checkpoints(states_folder(folder))
    if found and resume == "never":
        raise LmrError(f"{folder}: holds a run of {found[-1].stem}; go on with --resume auto, or use another --out")
    path, recipe = folder / "recipe.json", dataclasses.asdict(run.config)
    if found:
        began = read_json(path)
        parts = [began.get(name) for name in ("recipe", "facts")] if isinstance(began, dict) else [None]
        whole = all(isinstance(part, dict) for part in parts)
        if not whole or began.get("format") != FORMAT or began.get("version") != VERSION:
            raise LmrError(f"{folder}: holds another run than one of lmr train-matcher; use another --out")
        then, now = {**began["recipe"], **began["facts"]}, {**recipe, **facts}
        changed = [key for key in now if key not in FREE and then.get(key) != now[key]]
        if changed:
            told = ", ".join(f"{key} was {then.get(key)!r} and is {now[key]!r}" for key in changed)
            raise LmrError(f"{folder}: the run began otherwise ({told}); use the same, or another --out")
        _load(found[-1], run)
    write_json(path, {"format": FORMAT, "version": VERSION, "recipe": recipe, "facts": facts})


def _load(path: Path, run: MatcherRun) -> None:
    device = next(run.extractor.parameters()).device
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        run.extractor.load_state_dict(state["extractor"])
        run.optimiser.load_state_dict(state["optimiser"])
        run.step = int(state["step"])
    except Exception as error:  # torch.load raises RuntimeError, UnpicklingError, EOFError, ... on a damaged file
        raise LmrError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); delete it to go on from an earlier one"
        ) from None
    insist_on_steps_left(path, run.step, run.config.steps)
