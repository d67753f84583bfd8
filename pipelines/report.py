"""`lmr report`: results of one or more runs as one HTML file."""

from __future__ import annotations

import json
from pathlib import Path

import click

from .progress import note as tell


@click.command()
@click.argument("runs", metavar="RUN...", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path, dir_okay=False), help="The .html file.")
@click.option("--against", metavar="LABEL", help="Run that the others are compared with.  [the first]")
@click.option("--only", metavar="LABEL", multiple=True, help="Show the runs of this label; may be given several times.")
@click.option("--data", type=click.Path(path_type=Path), help="Where the test set lies now, if it was moved.")
@click.option("--figures", type=click.IntRange(0), default=12, show_default=True, help="Pictures shown, at most.")
@click.option("--megabytes", type=click.IntRange(1), default=8, show_default=True, help="Room for them in the file.")
@click.option("--published/--no-published", default=True, show_default=True, help="Show published numbers, marked so.")
@click.option("--title", default="Super-resolution report", show_default=True, help="Title of the page.")
@click.option("--note", default="", help="A line that stands above everything, such as what these runs are not.")
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON.")
def report(
    runs: tuple[Path, ...],
    out: Path,
    against: str | None,
    only: tuple[str, ...],
    data: Path | None,
    figures: int,
    megabytes: int,
    published: bool,
    title: str,
    note: str,
    as_json: bool,
) -> None:
    """Write RUNs (folders of lmr evaluate, or their results.parquet) as one HTML file that opens offline.

    It holds the means with intervals, published numbers beside them, charts, crops of the pictures where the runs
    differ most, and a table of all pictures that sorts and filters. Targets and references are read from the test
    sets again; where they are gone, the page does without them and says so.
    """
    from lmr_tools.report import Options, write_report

    options = Options(
        against=against,
        only=only,
        figures=figures,
        room=megabytes * 1_000_000,
        published=published,
        title=title,
        note=note,
        data=data,
    )
    done = write_report(runs, out, options)
    if as_json:
        click.echo(json.dumps(done, indent=2, ensure_ascii=False))
        return
    for line in done["notes"]:
        tell(line)
    click.echo(f"{out}: {done['runs']} runs, {done['figures']} figures, {done['bytes'] / 1e6:.1f} MB")
