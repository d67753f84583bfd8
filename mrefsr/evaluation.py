"""Measure one method on one test set: picture -> SR -> 8-bit PNG -> scored from those 8 bits -> row.

What has to be done is planned as a list of jobs; what lies in the folder already is not done again, so resuming,
sharing the work and measuring one more metric are all a set difference. The next item is read, and the last one scored,
beside the method.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from lmr_tools import metrics
from lmr_tools.images import decode, encode_png
from lmr_tools.protocol import Item, cut_back, pixels_sha256
from lmr_tools.results import picture_path, read_row, row_path, settings_path, write_row
from lmr_tools.schema import LmrError, ResultRow
from lmr_tools.tables import write_bytes, write_json
from lmr_tools.testset_layouts import Entry
from lmr_tools.testsets import read_items
from mrefsr.cost import device_name, peak_memory, start_peak, versions
from mrefsr.evaluation_plan import Job, Settings
from mrefsr.systems import Restore

if TYPE_CHECKING:
    from lmr_tools.schema import Image

METRICS = ("psnr_rgb", "psnr_y", "ssim_y", "lpips_alex", "lpips_vgg")
Watch = Callable[[Iterable[Any], int, str], Iterator[Any]]  # shows a person how far the items are
Value = TypeVar("Value")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How many rows a run has, how many of them were made now, and which failed."""

    rows: int
    made: int
    failed: tuple[ResultRow, ...]


def load_metrics(names: Sequence[str], device: torch.device) -> dict[str, metrics.Compare]:
    """The functions behind metric names. LmrError when LPIPS has no weights here, with what to do."""
    border_metrics: dict[str, metrics.Compare] = {
        "psnr_rgb": metrics.psnr_rgb,
        "psnr_y": metrics.psnr_y,
        "ssim_y": metrics.ssim_y,
    }
    found = {}
    for name in names:
        try:
            found[name] = border_metrics.get(name) or metrics.lpips(name.removeprefix("lpips_"), str(device))
        except LmrError as error:
            others = ",".join(other for other in METRICS if not other.startswith("lpips"))
            raise LmrError(f"{name}: {error}; or leave LPIPS out: --metrics {others}") from None
    return found


def evaluate(
    run: Path,
    settings: Settings,
    jobs: Sequence[Job],
    restore: Restore,
    compare: Mapping[str, metrics.Compare],
    device: torch.device,
    watch: Watch,
) -> Outcome:
    """Make the rows of `jobs` that RUN does not hold yet; failed ones, and those of another target or of other
    references, are made again.

    Rows that lack one of the metrics of `compare` are scored again from their PNG. A picture that fails becomes a row
    with its reason.
    """
    write_json(settings_path(run, settings.run_id), dataclasses.asdict(settings))
    rows = {job.name: read_row(row_path(run, settings.run_id, job.name)) for job in jobs}
    kept = [job for job in jobs if _kept(run, settings, job, rows[job.name])]
    names = {job.name for job in jobs} - {job.name for job in kept} | _replaced(run, settings, kept, watch)
    new = [job for job in jobs if job.name in names]
    unscored = [job for job in jobs if job.name not in names and _lacks(rows[job.name], compare)]
    if new:
        _make(run, settings, new, restore, compare, device, watch)
    if unscored:
        rescore(run, settings, unscored, compare, watch)
    final = [row for job in jobs if (row := read_row(row_path(run, settings.run_id, job.name)))]
    return Outcome(rows=len(final), made=len(new), failed=tuple(row for row in final if row.failure is not None))


def _kept(run: Path, settings: Settings, job: Job, row: ResultRow | None) -> bool:
    if row is None or row.failure is not None or not picture_path(run, settings.run_id, job.name).is_file():
        return False
    # "best" names the one that it chose of those there were.
    return settings.policy == "best" or row.reference_ids == _of_entry(job.entry)["reference_ids"]


def _replaced(run: Path, settings: Settings, jobs: Sequence[Job], watch: Watch) -> set[str]:
    """Names of those of `jobs` whose target is another picture than their row's.

    Only targets that came or changed after their row are read: the pixels decide, so a file that was merely copied or
    unpacked again costs nothing but this.
    """
    later: dict[str, list[Job]] = {}
    for job in jobs:
        if _changed(job.entry.target) >= _changed(row_path(run, settings.run_id, job.name)):
            later.setdefault(job.entry.image_id, []).append(job)
    if not later:
        return set()
    targets = [dataclasses.replace(members[0].entry, references=()) for members in later.values()]
    found = read_items(targets, benchmark=settings.benchmark, protocol="native")
    names = set()
    for entry, item in watch(found, len(targets), "checking"):
        now = None if isinstance(item, LmrError) else pixels_sha256(item.target)
        for job in later[entry.image_id]:
            row = read_row(row_path(run, settings.run_id, job.name))
            if row is None or row.target_sha256 != now:
                names.add(job.name)
    return names


def _changed(path: Path) -> float:
    """When a file was written, renamed or put in its place; 0 where there is none."""
    try:
        status = path.stat()
    except OSError:
        return 0.0
    return max(status.st_mtime, status.st_ctime)


def _lacks(row: ResultRow | None, compare: Mapping[str, metrics.Compare]) -> bool:
    return row is not None and any(getattr(row, name) is None for name in compare)


def _make(
    run: Path,
    settings: Settings,
    jobs: Sequence[Job],
    restore: Restore,
    compare: Mapping[str, metrics.Compare],
    device: torch.device,
    watch: Watch,
) -> None:
    entries = [job.entry for job in jobs]
    found = read_items(entries, benchmark=settings.benchmark, protocol=settings.protocol)
    by_entry = {_key(job.entry): job for job in jobs}
    scoring: Future[None] | None = None
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as scorer:
        for entry, item in watch(_ahead(found, reader), len(jobs), "evaluating"):
            name = by_entry[_key(entry)].name
            row = _blank(settings, entry, device)
            if isinstance(item, LmrError):
                write_row(run, name, dataclasses.replace(row, failure=_reason(item)))
                continue
            row = dataclasses.replace(row, target_sha256=pixels_sha256(item.target))
            try:
                row, sr = _restored(row, settings, item, restore, device)
            except (LmrError, MemoryError, RuntimeError) as error:
                if isinstance(error, RuntimeError) and not _memory_ran_out(error):
                    raise
                write_row(run, name, dataclasses.replace(row, failure=_reason(error)))
                continue
            if scoring is not None:
                scoring.result()
            scoring = scorer.submit(_keep, run, name, row, sr, item.target, compare)
        if scoring is not None:
            scoring.result()


def _memory_ran_out(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _reason(error: Exception) -> str:
    """One line, whatever is in file names and messages."""
    if isinstance(error, LmrError):
        return " ".join(str(error).split())
    return "memory ran out; give a smaller picture or fewer references"


def _key(entry: Entry) -> tuple[str, tuple[str, ...]]:
    return entry.image_id, tuple(reference.name + reference.slot for reference in entry.references)


def _ahead(items: Iterator[Value], reader: ThreadPoolExecutor) -> Iterator[Value]:
    """The items, each read while the one before is worked on."""
    end = object()
    coming: Future[Any] = reader.submit(next, items, end)
    while (item := coming.result()) is not end:
        coming = reader.submit(next, items, end)
        yield item


def _restored(
    row: ResultRow, settings: Settings, item: Item, restore: Restore, device: torch.device
) -> tuple[ResultRow, Image]:
    """The row with cost and references, and the SR picture cut back to the target."""
    if settings.policy in ("first", "best", "each") and not item.references:
        raise LmrError(f"{item.image_id}: no reference left for {settings.method}")
    if settings.policy != "best":
        sr, cost = _timed(restore, item, item.references, device)
        return dataclasses.replace(row, **cost), sr
    best: tuple[float, ResultRow, Image] | None = None
    for number, reference in enumerate(item.references):
        sr, cost = _timed(restore, item, (reference,), device)
        score = metrics.psnr_y(sr, item.target)
        if best is None or score > best[0]:
            ids, tiers = item.reference_ids[number : number + 1], item.tiers[number : number + 1]
            best = score, dataclasses.replace(row, **cost, **_references(ids, tiers)), sr
    assert best is not None
    return best[1], best[2]


def _timed(
    restore: Restore, item: Item, references: Sequence[Image], device: torch.device
) -> tuple[Image, dict[str, Any]]:
    start_peak(device)
    start = time.perf_counter()
    sr = restore(item.lr, references)
    seconds = time.perf_counter() - start
    peak = peak_memory(device)
    return cut_back(sr, item), {"seconds": seconds, "peak_memory_mb": None if peak is None else peak / 1e6}


def _blank(settings: Settings, entry: Entry, device: torch.device) -> ResultRow:
    nothing: dict[str, Any] = dict.fromkeys(("target_sha256", *METRICS, "seconds", "peak_memory_mb", "sr", "failure"))
    return ResultRow(
        run_id=settings.run_id,
        label=settings.label,
        benchmark=settings.benchmark,
        protocol=settings.protocol,
        method=settings.method,
        weights_sha256=settings.weights_sha256,
        image_id=entry.image_id,
        reference_policy=settings.policy,
        device=device_name(device),
        versions=json.dumps(versions(), sort_keys=True),
        **_of_entry(entry),
        **nothing,
    )


def _of_entry(entry: Entry) -> dict[str, Any]:
    references = entry.references
    return _references([reference.name for reference in references], [reference.tier for reference in references])


def _references(ids: Sequence[str], tiers: Sequence[str]) -> dict[str, Any]:
    listed = ",".join(tiers) if any(tiers) else ""
    return {"n_references": len(ids), "reference_ids": json.dumps(list(ids), ensure_ascii=False), "tiers": listed}


def _keep(
    run: Path, name: str, row: ResultRow, sr: Image, target: Image, compare: Mapping[str, metrics.Compare]
) -> None:
    """Write the picture, then the row with its scores; a row is never there without its picture."""
    path = picture_path(run, row.run_id, name)
    data = encode_png(sr)
    write_bytes(path, data)
    write_row(run, name, _scored(dataclasses.replace(row, sr=path.relative_to(run).as_posix()), data, target, compare))


def _scored(row: ResultRow, png: bytes, target: Image, compare: Mapping[str, metrics.Compare]) -> ResultRow:
    try:
        sr = decode(png)
        scores: dict[str, Any] = {name: function(sr, target) for name, function in compare.items()}
    except LmrError as error:
        return dataclasses.replace(row, failure=_reason(error))
    wrong = [name for name, value in scores.items() if math.isnan(value)]
    return dataclasses.replace(row, **scores, failure=f"{wrong[0]} is not a number" if wrong else None)


def rescore(
    run: Path,
    settings: Settings,
    jobs: Sequence[Job],
    compare: Mapping[str, metrics.Compare],
    watch: Watch,
) -> int:
    """Compute the metrics of existing rows again from their PNGs and the targets; returns how many rows that were.

    A row whose target can not be read any more, or is another picture now, becomes a failed one.
    """
    by_id: dict[str, list[Job]] = {}
    for job in jobs:
        row = read_row(row_path(run, settings.run_id, job.name))
        # Failed ones too, if they have a picture: perhaps only their target was gone.
        if row is not None and row.sr and picture_path(run, settings.run_id, job.name).is_file():
            by_id.setdefault(job.entry.image_id, []).append(job)
    # Only the target is needed, and it does not depend on the references.
    targets = [dataclasses.replace(members[0].entry, references=()) for members in by_id.values()]
    found = read_items(targets, benchmark=settings.benchmark, protocol="native")
    count = 0
    for entry, item in watch(found, len(targets), "scoring"):
        for job in by_id[entry.image_id]:
            row = read_row(row_path(run, settings.run_id, job.name))
            assert row is not None
            if isinstance(item, LmrError):
                write_row(run, job.name, dataclasses.replace(row, failure=_reason(item)))
                continue
            data = picture_path(run, settings.run_id, job.name).read_bytes()
            scored = _scored(row, data, item.target, compare)
            if scored.failure is None and row.target_sha256 != pixels_sha256(item.target):
                scored = dataclasses.replace(scored, failure="the target is another picture than at the evaluation")
            write_row(run, job.name, scored)
            count += 1
    return count


def fail_lost(run: Path, settings: Settings, jobs: Sequence[Job]) -> None:
    """Make failed ones of a run's rows that none of `jobs`, all of it, asks for any more."""
    names = {job.name for job in jobs}
    for path in sorted(row_path(run, settings.run_id, "-").parent.glob("*.json")):
        row = read_row(path)
        if path.stem not in names and row is not None:
            write_row(run, path.stem, dataclasses.replace(row, failure="the test set does not hold it any more"))
