"""`lmr train-matcher`: the two VGG16 copies that MRefSR finds correspondences with (C2-Matching's stages 1 and 2)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmr_tools.schema import LmrError

if TYPE_CHECKING:
    from lmr_tools.stream import SampleStore

    from .train import Screen

# Those of mrefsr.matcher_run, which is too heavy to import here; steps are C2-Matching's.
STEPS = {"teacher": 5_000, "student": 75_000}
FILE = click.Path(path_type=Path)
INTERRUPTED = 130


@click.command("train-matcher")
@click.option("--stage", required=True, type=click.Choice(tuple(STEPS)), help="What to train.")
@click.option("--dataset", required=True, help="Folder or URL of a built dataset; only target crops are used.")
@click.option("--out", type=FILE, metavar="RUN", required=True, help="Folder of the run: checkpoints, log, matcher.")
@click.option("--teacher", type=FILE, help="matcher.safetensors of --stage teacher (--stage student).")
@click.option("--start-from", "start", type=FILE, help="Begin with this matcher.  [ImageNet's VGG16]")
@click.option("--steps", type=int, help="Steps of the optimiser.  [5000 for the teacher, 75000 for the student]")
@click.option("--batch", type=int, default=8, show_default=True, help="Pairs a step.")
@click.option("--crop", type=int, default=160, show_default=True, help="Side of the pairs, pixels.")
@click.option("--shift", type=float, help="How far a corner moves at most, pixels.  [crop / 16]")
@click.option("--photometric", type=float, default=0.1, show_default=True, help="Change of contrast and brightness.")
@click.option("--lr", type=float, default=1e-3, show_default=True, help="Learning rate of Adam.")
@click.option("--seed", type=int, default=0, show_default=True, help="Order of the groups and all homographies.")
@click.option("--workers", type=int, default=0, show_default=True, help="Processes that read data.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@click.option("--checkpoint-every", type=int, default=500, show_default=True, help="Steps between checkpoints.")
@click.option("--validate-every", type=int, default=500, show_default=True, help="Steps between held-out measurements.")
@click.option("--log-every", type=int, default=20, show_default=True, help="Steps between lines of the log.")
@click.option(
    "--resume",
    type=click.Choice(("auto", "never")),
    default="auto",
    show_default=True,
    help="auto: go on where RUN is; never: refuse a RUN that has begun.",
)
def train_matcher(
    stage: str,
    dataset: str,
    out: Path,
    teacher: Path | None,
    start: Path | None,
    steps: int | None,
    shift: float | None,
    device: str,
    resume: str,
    **options: Any,
) -> None:
    """Train the features that MRefSR finds correspondences with.

    Pairs are a window of a target crop and the same seen through a random homography. Two stages:

    \b
      teacher  both pictures are sharp
      student  the first one is brought down and up x4, as MRefSR sees its input, and the
               teacher's correlations are learned too

    RUN/matcher.safetensors is the result: lmr train --matcher. The same command goes on after a stop.

    Exit code: 0 at the end, 130 when it was stopped.
    """
    from lmr_tools.stream import open_samples
    from mrefsr.cost import versions
    from mrefsr.infer import choose_device
    from mrefsr.matcher_run import MatcherConfig, go_on, new_run
    from mrefsr.run_folder import claim_run, dataset_facts
    from mrefsr.train_matcher import RESULT, pair_batches
    from mrefsr.train_matcher import train_matcher as run_training
    from mrefsr.training_state import weights_digest

    from .train import Screen

    try:
        config = MatcherConfig(
            stage=stage,  # type: ignore[arg-type]
            steps=STEPS[stage] if steps is None else steps,
            shift=options["crop"] / 16 if shift is None else shift,
            **options,
        )
        if (stage == "student") != (teacher is not None):
            needs = "needs --teacher FILE, the result of --stage teacher" if teacher is None else "takes no --teacher"
            raise LmrError(f"--stage {stage}: {needs}")
    except LmrError as error:
        raise click.UsageError(str(error)) from None
    place = choose_device(device)
    store = open_samples(dataset, "train")
    pair_batches(store, config, 0).close()  # says what is wrong before weights are loaded
    with claim_run(out), Screen(True) as screen:
        run = new_run(config, place, start=start, teacher=teacher)
        about = {key: value for key, value in dataset_facts(store).items() if key != "path"}
        facts = {
            "dataset": about["fingerprint"],
            "start": weights_digest(run.extractor),
            "teacher": weights_digest(run.teacher) if run.teacher else "",
        }
        go_on(out, run, facts, resume)
        if run.step:
            screen.line(f"going on after step {run.step}")
        provenance = {"by": "lmr train-matcher", "stage": stage, "recipe": vars(config), "dataset": about}
        ended = run_training(
            run,
            store,
            _held_out(dataset, screen),
            out,
            facts=facts,
            provenance=provenance | {"teacher": facts["teacher"], "versions": versions()},
            show=screen,
        )
        if ended:
            use = "lmr train-matcher --stage student --teacher" if stage == "teacher" else "lmr train --matcher"
            screen.line(f"{out / RESULT}: use it by {use}")
        else:
            screen.line(f"stopped after step {run.step}; the same command goes on from there")
    if not ended:
        click.get_current_context().exit(INTERRUPTED)


def _held_out(dataset: str, screen: Screen) -> SampleStore | None:
    from lmr_tools.stream import open_samples

    try:
        return open_samples(dataset, "val")
    except LmrError as error:
        screen.line(f"no held-out pairs: {error}")
        return None
