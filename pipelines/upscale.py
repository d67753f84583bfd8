"""`lmr upscale`: a person's own pictures, with their references, through MRefSR at x4.

What is to be made is decided first, as a list of jobs (`upscale_jobs`); then they run one by one. A result is written
whole or not at all, so the same command after a kill does only what is missing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lmr_tools.schema import LmrError

from .progress import PLAIN_SECONDS, note
from .upscale_jobs import Job, check_writable, left_over, plan_folder, plan_one

if TYPE_CHECKING:
    from lmr_tools.schema import Image
    from mrefsr.infer import SuperResolved

FILE = click.Path(path_type=Path)
SOME_FAILED = 3
LONG_MATCHING = 5e12  # multiply-adds: minutes on a CPU core
CORE_SPEED = 3e10  # multiply-adds a second that a CPU core matches with
Report = Callable[[float, str], None]  # pictures done, what is done now


def _tile(ctx: click.Context, option: click.Parameter, value: str) -> int | str | None:
    if value in ("auto", "none"):
        return None if value == "none" else value
    if value.isdecimal() and int(value):
        return int(value)
    raise click.BadParameter(f"{value!r} is not auto, none or a side in LR pixels, such as 128")


@click.command("upscale")
@click.argument("target", metavar="LR.png|FOLDER", type=FILE)
@click.option(
    "--ref", "given", multiple=True, type=FILE, metavar="FILE|FOLDER", help="A reference, or a folder of them."
)
@click.option("--refs", type=FILE, metavar="FOLDER", help="For a FOLDER of targets: where each one's references are.")
@click.option("--weights", type=FILE, metavar="W.safetensors", help="Checkpoint of kind mrefsr.")
@click.option("-o", "--out", required=True, type=FILE, metavar="OUT.png|FOLDER", help="The result, a PNG.")
@click.option("--matches", type=FILE, metavar="M.png|FOLDER", help="Draw which reference each region draws on.")
@click.option("--tile", default="auto", show_default=True, callback=_tile, help="auto, none or a side in LR pixels.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True, help="Half: for GPUs."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1 or mps.")
@click.option(
    "--max-reference-side",
    type=click.IntRange(12),
    metavar="N",
    help="Bring larger references down to N pixels a side.",
)
@click.option("--force", is_flag=True, help="Make results again that exist.")
def upscale(
    target: Path,
    given: tuple[Path, ...],
    refs: Path | None,
    weights: Path | None,
    out: Path,
    matches: Path | None,
    tile: int | str | None,
    dtype: str,
    device: str,
    max_reference_side: int | None,
    force: bool,
) -> None:
    """Enlarge a picture x4 with the detail of reference pictures of the same scene.

    One picture: lmr upscale LR.png --ref A.jpg --ref B.jpg --weights W.safetensors -o OUT.png

    A folder: lmr upscale TARGETS --refs REFS --weights W.safetensors -o RESULTS. The references of TARGETS/cat.png are
    all pictures in REFS/cat/ and those named REFS/cat_*; the result is RESULTS/cat.png. --ref adds to every target's.
    Results that exist are kept, so the same command goes on after a stop. Exit code 3: some pictures failed.
    """
    check_writable(out, matches)
    if target.is_dir():
        jobs = plan_folder(target, given, refs, out, matches)
        for folder in (target, refs):
            if folder is not None and (names := left_over(folder, jobs)):
                more = ", ..." if len(names) > 5 else ""
                note(f"{folder}: {len(names)} entries are no target's and not read: {', '.join(names[:5])}{more}")
    else:
        jobs = [plan_one(target, given, refs, out, matches, force)]
    todo = [job for job in jobs if force or not job.done()]
    if weights is None:
        raise LmrError(
            "--weights is missing: give a checkpoint of kind mrefsr; `lmr weights` tells where the published weights "
            "are, `lmr convert-checkpoint --kind mrefsr NET.pth --extractor F.pth OUT.safetensors` makes one of them"
        )
    options = {"tile": tile, "max_reference_side": max_reference_side}
    failed = _run(todo, weights, device, dtype, options) if todo else []
    if target.is_dir():
        made = len(todo) - len(failed)
        click.echo(f"{out}: {made} made, {len(jobs) - len(todo)} there already, {len(failed)} failed")
        for line in failed:
            click.echo(f"failed: {line}", err=True)
        if failed:
            click.get_current_context().exit(SOME_FAILED)
    elif failed:
        raise LmrError(failed[0])


def _run(jobs: Sequence[Job], weights: Path, device: str, dtype: str, options: dict[str, Any]) -> list[str]:
    """Do the jobs; one line for each that failed."""
    from mrefsr.checkpoints import load_model
    from mrefsr.infer import DTYPES, choose_device

    place = choose_device(device)
    model = load_model(weights, place)
    options = options | {"dtype": DTYPES[dtype]}
    failed = []
    with _watch(len(jobs)) as report:
        for number, job in enumerate(jobs):

            def tell(done: int, total: int, what: str, number: int = number, name: str = job.target.name) -> None:
                report(number + done / max(total, 1), f"{name}: {what}")

            try:
                line = _make(job, model, options, tell, warn=place.type == "cpu")
            except LmrError as error:
                failed.append(f"{job.target}: {error}")
            else:
                note(line)
    return failed


def _make(job: Job, model: Any, options: dict[str, Any], tell: Callable[[int, int, str], None], *, warn: bool) -> str:
    """Do one job; returns a line about it."""
    from mrefsr.infer import match_operations, super_resolve_with_shares

    if job.problem:
        raise LmrError(job.problem)
    start = time.monotonic()
    lr, profile = _read(job.target, "")
    references = [_read(path, f"reference {path}: ")[0] for path in job.references]
    work = match_operations(lr.shape, [reference.shape for reference in references])
    if warn and work > LONG_MATCHING and options["max_reference_side"] is None:
        minutes = work / CORE_SPEED / 60
        note(f"{job.target}: matching needs about {minutes:.0f} CPU minutes; --max-reference-side shortens it")
    result = super_resolve_with_shares(model, lr, references, progress=tell, **options)
    _write(job, result, profile, references)
    height, width = result.image.shape[:2]
    names = f"{len(references)} reference{'' if len(references) == 1 else 's'}"
    return f"{job.out}: {width}x{height} with {names} in {time.monotonic() - start:.1f} s"


def _read(path: Path, role: str) -> tuple[Image, bytes | None]:
    """A picture and, where it is an RGB one, its colour profile. `role` begins the message of an LmrError."""
    import io
    import warnings

    from PIL import Image as PilImage

    from lmr_tools.images import BadImage, decode

    try:
        data = path.read_bytes()
        pixels = decode(data)
    except OSError as error:
        raise LmrError(f"{role}can not be read ({error.strerror})") from None
    except BadImage as error:
        raise LmrError(f"{role}{error}; give another file") from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of many pixels, which `decode` has judged
        with PilImage.open(io.BytesIO(data)) as picture:
            profile = picture.info.get("icc_profile")
    # A grey or CMYK picture has become RGB, which its profile does not describe.
    return pixels, profile if isinstance(profile, bytes) and profile[16:20] == b"RGB " else None


def _write(job: Job, result: SuperResolved, profile: bytes | None, references: Sequence[Image]) -> None:
    """The picture of matches first: a job counts as done when its result is there."""
    from PIL import Image as PilImage

    from lmr_tools import drawing
    from lmr_tools.tables import atomic_path
    from mrefsr.match_picture import draw_matches

    if job.matches is not None:
        names = [path.name for path in job.references]
        drawing.save(draw_matches(result.image, references, names, result.shares), job.matches)
    with atomic_path(job.out) as temporary:
        PilImage.fromarray(result.image).save(temporary, format="PNG", compress_level=6, icc_profile=profile)


@contextmanager
def _watch(total: int) -> Iterator[Report]:
    """A bar on a terminal, now and then a line elsewhere."""
    if not sys.stderr.isatty():
        shown = time.monotonic()

        def line(done: float, what: str) -> None:
            nonlocal shown
            if time.monotonic() - shown > PLAIN_SECONDS:
                shown = time.monotonic()
                note(f"{done / total:4.0%}  {what}")

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    columns = (BarColumn(24), TaskProgressColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda done, what: bar.update(task, completed=done, description=what)
