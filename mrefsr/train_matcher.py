"""Training of the matching features: pairs -> loss -> step, with checkpoints, a log and a look at held-out pairs.

Stage "teacher" learns on sharp pairs. Stage "student" sees the first picture brought down and up x4, as MRefSR does,
and is also drawn towards what the frozen teacher sees in the sharp one. Defaults are C2-Matching's.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lmr_tools.schema import LmrError
from lmr_tools.stream import SampleStore
from mrefsr.checkpoints import save_matcher
from mrefsr.correspondence import MatchLoss, PairRule, Pairs, make_pair, match_errors, match_loss, stack_pairs
from mrefsr.features import MatchingExtractor
from mrefsr.loading import in_order
from mrefsr.matcher_run import MatcherConfig, MatcherRun, to_dict
from mrefsr.run_folder import states_folder
from mrefsr.sampling import PAIR, VALIDATION_PAIR, Draws, sample_at
from mrefsr.stopping import StopRequest
from mrefsr.training_state import NAME, drop_old, save_state
from mrefsr.watch import LOG, Show, cut_log

RESULT = "matcher.safetensors"


def pair_batches(
    store: SampleStore, config: MatcherConfig, position: int, limit: int | None = None, *, held_out: bool = False
) -> Generator[Pairs, None, None]:
    """Batches of pairs from sample `position` on, without end; with `limit`, the samples up to it.

    Each follows from the dataset, `config.seed` and its positions alone. `held_out`: the split's first groups in their
    order, under homographies of their own. Raises LmrError at the call when the crops are smaller than the window.
    """
    if config.crop > store.size:
        raise LmrError(f"crop {config.crop}: larger than the stored {store.size}x{store.size} crops of {store.root}")
    end = limit if limit is not None else 2**62
    lists = (range(at, min(at + config.batch, end)) for at in range(position, end, config.batch))
    make = partial(_make_pairs, store=store, rule=config.rule(), seed=config.seed, held_out=held_out)
    return in_order(make, lists, workers=0 if held_out else config.workers)


def _make_pairs(positions: Sequence[int], *, store: SampleStore, rule: PairRule, seed: int, held_out: bool) -> Pairs:
    numbers = [position if held_out else sample_at(position, len(store), seed) for position in positions]
    wanted = list(dict.fromkeys(numbers))
    stored = dict(zip(wanted, store.read(wanted), strict=True))
    targets = [stored[number].group(decode={"target.png"}).target for number in numbers]
    stream = VALIDATION_PAIR if held_out else PAIR
    drawn = [Draws(0 if held_out else seed, stream, position) for position in positions]
    return stack_pairs([make_pair(target, rule, draws) for target, draws in zip(targets, drawn, strict=True)])


def step_loss(run: MatcherRun, pairs: Pairs) -> tuple[torch.Tensor, MatchLoss]:
    """The scalar to lower, and its parts."""
    config = run.config
    sharp, blurred, warped = (
        picture.contiguous(memory_format=torch.channels_last) for picture in (pairs.image, pairs.enlarged, pairs.warped)
    )
    taught = None
    if run.teacher is not None:
        with torch.no_grad():
            taught = run.teacher(sharp, warped)
    parts = match_loss(
        run.extractor(sharp if run.teacher is None else blurred, warped),
        pairs.place,
        teacher=taught,
        margin=config.margin,
        safe_radius=config.safe_radius,
        temperature=config.temperature,
    )
    return parts.triplet + config.distillation * parts.distillation, parts


def shares_within(
    extractor: MatchingExtractor, batches: Generator[Pairs, None, None], device: torch.device, *, sharp: bool
) -> dict[str, float]:
    """Shares of patches matched within 1 and 2 cells of their true place, over all pairs of `batches`.

    sharp: match the picture itself, else the one brought down and up x4, as MRefSR does.
    """
    errors = []
    with torch.no_grad(), closing(batches):
        for pairs in batches:
            pairs = pairs.to(device)
            image = (pairs.image if sharp else pairs.enlarged).contiguous(memory_format=torch.channels_last)
            warped = pairs.warped.contiguous(memory_format=torch.channels_last)
            errors.append(match_errors(extractor(image, warped), pairs.place))
    every = torch.cat(errors)
    return {f"within_{limit}": float((every <= limit).double().mean()) for limit in (1, 2)}


def train_matcher(
    run: MatcherRun,
    train: SampleStore,
    held_out: SampleStore | None,
    folder: Path,
    *,
    facts: dict[str, Any],
    provenance: dict[str, Any],
    show: Show,
) -> bool:
    """Train to the end of the recipe, or to SIGINT or SIGTERM; then a checkpoint is there. Whether the end was reached.

    Raises LmrError when a loss or gradient is not finite. A checkpoint or log that can not be written is said; training
    goes on.
    """
    config, device = run.config, next(run.extractor.parameters()).device
    # A run killed before its first checkpoint begins again, and measures step 0 again.
    _spare(show, LOG, partial(cut_log, folder / LOG, run.step or -1))
    since, steps = time.perf_counter(), 0
    batches = pair_batches(train, config, run.step * config.batch)
    with closing(batches), StopRequest() as stop:
        if run.step == 0:
            look(run, held_out, folder, show)
        stopping = False
        while run.step < config.steps and not stopping:
            loss, parts = step_loss(run, next(batches).to(device))
            run.optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = torch.nn.utils.get_total_norm(p.grad for p in run.extractor.parameters() if p.grad is not None)
            if not bool(torch.isfinite(loss + norm)):
                raise _not_finite(run, train, folder, facts, loss.item(), norm.item())
            run.optimiser.step()
            run.step, steps = run.step + 1, steps + 1
            ending, text = run.step == config.steps, in_words(parts, run.teacher is not None)
            show.step(run.step, config.steps, text)
            if ending or run.step % config.log_every == 0:
                speed = steps * config.batch / (time.perf_counter() - since)
                show.line(f"step {run.step:>6} of {config.steps}  {text}  {speed:.1f} pairs/s")
                record = {name: part.item() for name, part in parts._asdict().items()}
                _log(show, folder, {"step": run.step, "loss": loss.item(), **record})
            if ending or run.step % config.validate_every == 0:
                look(run, held_out, folder, show)
            stopping = stop.asked  # asked once: who stops has saved
            if ending or stopping or run.step % config.checkpoint_every == 0:
                path = states_folder(folder) / NAME.format(run.step)
                if _spare(show, f"checkpoint {path.name}", partial(save_state, path, to_dict(run, facts))):
                    drop_old(states_folder(folder), config.keep)
    if run.step < config.steps:
        return False
    save_matcher(folder / RESULT, run.extractor, provenance | {"steps": run.step})
    return True


def _not_finite(
    run: MatcherRun, train: SampleStore, folder: Path, facts: dict[str, Any], loss: float, norm: float
) -> LmrError:
    """What ends the run, with the state before this step in a checkpoint of its own."""
    config, step = run.config, run.step + 1
    positions = range(run.step * config.batch, step * config.batch)
    ids = ", ".join(train.group_id(sample_at(position, len(train), config.seed)) for position in positions)
    path = states_folder(folder) / f"before-{NAME.format(step)}"
    where = f"the state before it is in {path}"
    try:
        save_state(path, to_dict(run, facts))
    except OSError as error:
        where = f"and the state before it could not be written ({error.strerror or error})"
    told = f"the loss is {loss:g} and its gradient's norm {norm:g}"
    return LmrError(f"step {step}: {told}, groups {ids}; {where}; a lower --lr may help")


def in_words(parts: MatchLoss, taught: bool) -> str:
    """The parts of a loss, for a line on the screen."""
    distillation = f"distillation {parts.distillation.item():.4f}  " if taught else ""
    distances = f"distances {parts.positive.item():.3f} right, {parts.negative.item():.3f} hardest wrong"
    return f"triplet {parts.triplet.item():.4f}  {distillation}{distances}"


def look(run: MatcherRun, held_out: SampleStore | None, folder: Path, show: Show) -> None:
    """Say and log how well pairs of held-out groups are matched."""
    if held_out is None or not run.config.validate_pairs:
        return
    pairs = pair_batches(held_out, run.config, 0, min(len(held_out), run.config.validate_pairs), held_out=True)
    device = next(run.extractor.parameters()).device
    seen = shares_within(run.extractor, pairs, device, sharp=run.teacher is None)
    show.line(
        f"step {run.step:>6}  held out: {seen['within_1']:.1%} of patches matched within 1 cell, "
        f"{seen['within_2']:.1%} within 2"
    )
    _log(show, folder, {"step": run.step, **seen})


def _spare(show: Show, what: str, write: Callable[[], None]) -> bool:
    """Whether `write` did; a full disk, say, does not stop a run."""
    try:
        write()
    except OSError as error:
        show.line(f"{what} could not be written ({error.strerror or error}); training goes on")
        return False
    return True


def _log(show: Show, folder: Path, record: Mapping[str, float]) -> None:
    def append() -> None:
        with (folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    _spare(show, LOG, append)
