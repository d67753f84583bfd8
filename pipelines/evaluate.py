"""`lmr evaluate`: one method on one test set, a row and a picture for every target."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from lmr_tools.schema import LmrError, Split

from .progress import note, track

if TYPE_CHECKING:
    import torch

# Those of lmr_tools.testsets, mrefsr.systems, mrefsr.evaluation, which are too heavy to import here.
BENCHMARKS = ("cufed5", "lmr", "wr-sr", "sun80", "urban100", "manga109", "folder", "dataset")
PUBLISHED = BENCHMARKS[:6]
METHODS = ("bicubic", "esrgan", "masa", "c2-matching", "mrefsr")
METRICS = ("psnr_rgb", "psnr_y", "ssim_y", "lpips_alex", "lpips_vgg")
FAILED_ITEMS = 3
FILE = click.Path(path_type=Path)


def _counts(ctx: click.Context, parameter: click.Parameter, value: str | None) -> list[int | None]:
    if value is None:
        return [None]
    first, dots, last = value.partition("..")
    try:
        counts = [int(first)] if not dots else list(range(int(first), int(last) + 1))
    except ValueError:
        counts = []
    if not counts or counts[0] < 0:
        raise click.BadParameter("give a number, such as 5, or a range, such as 1..5")
    return [*counts]


def _names(allowed: tuple[str, ...]) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    def parse(ctx: click.Context, parameter: click.Parameter, value: str) -> list[str]:
        names = [name.strip() for name in value.split(",") if name.strip()]
        if wrong := [name for name in names if name not in allowed]:
            raise click.BadParameter(f"{wrong[0]!r} is none of {', '.join(allowed)}")
        return [name for name in allowed if name in names]

    return parse


def _share(ctx: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, int]:
    """(number from 0, of how many); torchrun says the same in two variables."""
    if value is None:
        return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        number, total = (int(part) for part in value.split("/"))
    except ValueError:
        number, total = 0, 0
    if not 1 <= number <= total:
        raise click.BadParameter("write K/N, such as 1/4 for the first of four processes")
    return number - 1, total


@click.command()
@click.option(
    "--benchmark", type=click.Choice(BENCHMARKS), help="Layout of DATA.  [dataset, where DATA is a built one]"
)
@click.option("--data", type=FILE, help="Folder of the test set, of your own pictures, or of a built dataset.")
@click.option(
    "--split", type=click.Choice([str(split) for split in Split]), default="test", help="Part of a dataset.  [test]"
)
@click.option("--method", type=click.Choice(METHODS), help="What is measured.")
@click.option("--weights", type=FILE, help="Its checkpoint (lmr convert-checkpoint, lmr train).")
@click.option("--label", help="Its name in tables.  [the method]")
@click.option("--out", type=FILE, metavar="RUN", help="Folder of results; more runs may be added to one that is there.")
@click.option(
    "--protocol",
    type=click.Choice(("official", "native")),
    help="official: zero-padded as in the published evaluation.  [official; native for folder and dataset]",
)
@click.option("--references", "counts", callback=_counts, metavar="N|A..B", help="At most N; each of A to B.  [all]")
@click.option("--tiers", callback=_names(("H", "M", "L")), default="", help="Only these, such as H,M.  [all]")
@click.option(
    "--reference-policy",
    "policy",
    type=click.Choice(("first", "best", "each")),
    help="One reference of several: the first, the best by the result's PSNR (an upper bound), each.",
)
@click.option(
    "--metrics", callback=_names(METRICS), default=",".join(METRICS), help="Of psnr_rgb, ... lpips_vgg.  [all]"
)
@click.option("--limit", type=click.IntRange(1), help="The first so many targets only.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@click.option("--share", callback=_share, metavar="K/N", help="Do the Kth of N parts.  [torchrun's, else all]")
@click.option("--rescore", type=FILE, metavar="RUN", help="Compute RUN's metrics again from its PNGs; no --method.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON.")
@click.pass_context
def evaluate(
    ctx: click.Context,
    benchmark: str | None,
    data: Path | None,
    split: str,
    method: str | None,
    weights: Path | None,
    label: str | None,
    out: Path | None,
    protocol: str | None,
    counts: list[int | None],
    tiers: list[str],
    policy: str | None,
    metrics: list[str],
    limit: int | None,
    device: str,
    share: tuple[int, int],
    rescore: Path | None,
    as_json: bool,
) -> None:
    """Measure a method on a test set: an SR picture and a row for every target, in RUN/results.parquet.

    The SR is saved with 8 bits and scored from these. A stopped run goes on where it was; a picture that fails is a row
    with its reason. `lmr results RUN` makes the tables.

    Exit code: 0 when every target has its numbers, 3 when some have not.
    """
    if not metrics:
        raise click.UsageError(f"--metrics names none of {', '.join(METRICS)}")
    if rescore is not None:
        if method or benchmark or out:
            raise click.UsageError("--rescore takes what it needs from RUN: leave out --method, --benchmark and --out")
        if _rescore(rescore, data, metrics, device, as_json):
            ctx.exit(FAILED_ITEMS)
        return
    if benchmark is None and data is not None and (data / "dataset.json").is_file():
        benchmark = "dataset"
    for name, value in (("--benchmark", benchmark), ("--data", data), ("--method", method), ("--out", out)):
        if value is None:
            raise click.UsageError(f"{name} is missing")
    assert benchmark and data and method and out

    from lmr_tools.results import merge, open_run
    from mrefsr.evaluation import evaluate as evaluate_jobs
    from mrefsr.evaluation import load_metrics
    from mrefsr.evaluation_plan import make_settings, plan_jobs, plan_run
    from mrefsr.systems import load_method

    place = _device(device)
    runs = [
        make_settings(
            benchmark=benchmark,
            data=data,
            split=split,
            protocol=protocol or ("official" if benchmark in PUBLISHED else "native"),
            method=method,
            weights=weights,
            label=label,
            count=count,
            tiers=tiers,
            policy=policy,
        )
        for count in counts
    ]
    plan = plan_run(runs[0])
    if plan.ignored:
        more = ", ..." if len(plan.ignored) > 5 else ""
        note(f"{data}: {len(plan.ignored)} files belong to no target: {', '.join(plan.ignored[:5])}{more}")
    if tiers and not any(reference.tier for entry in plan.entries for reference in entry.references):
        raise LmrError(f"--tiers {','.join(tiers)}: the references of {data} have no tiers; leave the option out")
    compare = load_metrics(metrics, place)
    restore = load_method(method, weights, place)
    open_run(out)
    summaries, failures = [], 0
    for settings in runs:
        jobs = plan_jobs(settings, plan, limit)[share[0] :: share[1]]
        done = evaluate_jobs(out, settings, jobs, restore, compare, place, track)
        merge(out)
        summary = {"run_id": settings.run_id, "label": settings.label, "references": settings.count, "rows": done.rows}
        summaries.append(summary | {"made": done.made, "failed": len(done.failed)})
        failures += len(done.failed)
        for row in done.failed:
            note(f"{row.image_id}: failed, {row.failure}")
    if as_json:
        click.echo(json.dumps({"out": str(out), "protocol": runs[0].protocol, "runs": summaries}, indent=2))
    else:
        for summary in summaries:
            click.echo("{run_id}  {label}: {rows} rows, {made} of them new, {failed} failed".format(**summary))
        note(f"{out / 'results.parquet'} is written; `lmr results {out}` shows the means")
    code = FAILED_ITEMS if failures else 0
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and "TORCHELASTIC_RUN_ID" in os.environ:
        _leave_with_the_others(code)
    ctx.exit(code)


def _leave_with_the_others(code: int) -> NoReturn:
    """Wait until every process is done: torchrun would stop the others as soon as one ends with exit code 3."""
    from datetime import timedelta

    from torch import distributed

    from mrefsr.machines import leave

    distributed.init_process_group("gloo", timeout=timedelta(days=7))
    distributed.barrier()
    distributed.destroy_process_group()
    leave(code)


def _device(name: str) -> torch.device:
    """The device; one of several GPUs for each process of torchrun. Computes in full single precision."""
    import torch

    from mrefsr.infer import choose_device

    device = choose_device(name)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    # The published numbers were computed without TF32.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    return device


def _rescore(run: Path, data: Path | None, metrics: list[str], device: str, as_json: bool) -> bool:
    """Whether any row of RUN is a failed one afterwards."""
    import dataclasses

    from lmr_tools.results import check_run, merge, read_settings
    from mrefsr.evaluation import fail_lost, load_metrics, rescore
    from mrefsr.evaluation_plan import load_settings, plan_jobs, plan_run

    check_run(run)
    compare = load_metrics(metrics, _device(device))
    counts = {}
    for run_id in read_settings(run):
        settings = load_settings(run, run_id)
        place = dataclasses.replace(settings, data=str(data)) if data else settings
        jobs = plan_jobs(settings, plan_run(place), None)
        counts[run_id] = rescore(run, settings, jobs, compare, track)
        fail_lost(run, settings, jobs)
    rows = merge(run)
    if as_json:
        click.echo(json.dumps({"run": str(run), "rescored": counts, "rows": len(rows)}, indent=2))
    else:
        click.echo(f"{run}: {sum(counts.values())} of {len(rows)} rows scored again ({', '.join(metrics)})")
    failed = [row for row in rows if row.failure is not None]
    for row in failed:
        note(f"{row.image_id}: failed, {row.failure}")
    return bool(failed)
