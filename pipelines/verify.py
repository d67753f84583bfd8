"""`lmr verify`: is this dataset whole, unaltered and consistent?"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from .progress import note, track

FAILED = 4
# Below this a process reads the shards sooner than others could be started.
WORTH_WORKERS = 100_000_000


@click.command()
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--decode/--no-decode", default=True, show_default=True, help="Decode every picture of every shard.")
@click.option("--workers", type=click.IntRange(1), help="Processes that read shards.  [all cores; 1 below 100 MB]")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.pass_context
def verify(ctx: click.Context, dataset: Path, decode: bool, workers: int | None, as_json: bool) -> None:
    """Verify every file of DATASET: checksums, counts, pictures, and the tables against the shards.

    Checked are dataset.json, every table, every shard (size, sha256, samples, pictures, what its JSON says), and that
    tiers agree with the measured pairs, crops lie inside their photos, splits share no scene and no photo, and every
    photo is accounted for. Every problem is one line that names the file and the id.

    Exit code: 0 when the dataset is sound, 4 when it is not.
    """
    from lmr_tools.verify import verify_dataset
    from lmr_tools.workers import ProcessMapper, default_workers

    size = sum(path.stat().st_size for path in (dataset / "shards").glob("*.tar"))
    with ProcessMapper(workers or (default_workers() if size > WORTH_WORKERS else 1)) as mapper:
        report = verify_dataset(dataset, decode=decode, mapper=mapper, watch=track)
    if as_json:
        click.echo(json.dumps({"sound": not report.problems, **dataclasses.asdict(report)}, indent=2))
    else:
        for line in report.problems:
            click.echo(line)
        looked = "decoded" if decode else "not decoded"
        note(
            f"{dataset}: {sum(report.rows.values())} table rows, {report.shards} shards, {report.samples} samples, "
            f"{report.pictures} pictures ({looked}), {report.bytes / 1e6:.1f} MB"
        )
        note(f"{len(report.problems)} problems" if report.problems else "sound: no problem found")
    if report.problems:
        ctx.exit(FAILED)
