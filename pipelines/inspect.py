"""`lmr inspect`: what is in a dataset, in numbers and as a contact sheet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .progress import note

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 8
BLOCKS = "·▁▂▃▄▅▆▇█"
SCORES = ("overlap", "scale_ratio", "clip_score")
NAMES = {"H": "High", "M": "Medium", "L": "Low"}


@click.command()
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--split", type=click.Choice(["train", "val", "test"]), help="Only this split.")
@click.option(
    "--groups", "count", type=click.IntRange(1, 100), help=f"Groups on the sheet, drawn by --seed.  [{SHOWN}]"
)
@click.option("--group", "chosen", multiple=True, metavar="ID", help="Put this group on the sheet; may be repeated.")
@click.option("--seed", default=0, show_default=True, help="Seed of the choice of groups.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write a contact sheet (.png or .jpg).")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def inspect(
    dataset: Path,
    split: str | None,
    count: int | None,
    chosen: tuple[str, ...],
    seed: int,
    out: Path | None,
    as_json: bool,
) -> None:
    """Show what DATASET holds: groups by split, tier, slot and scene, scores, rejected and unused photos.

    With --out a contact sheet of some groups is drawn: target, then High, Medium and Low references with their scores.
    """
    from lmr_tools.dataset import read_manifest, table_path
    from lmr_tools.summary import summarise
    from lmr_tools.tables import read_table

    if (count or chosen) and out is None:
        raise click.UsageError("--groups and --group choose what is drawn: name the picture with --out.")
    if count and chosen:
        raise click.UsageError("--groups draws at random, --group names groups: use one of the two.")
    manifest = read_manifest(dataset)
    names = ("images", "rejects", "pairs", "groups", "shards")
    summary = summarise({name: read_table(table_path(dataset, name)).to_pandas() for name in names}, split)
    summary["embedder"] = manifest.get("embedder")
    if as_json:
        click.echo(json.dumps(summary, indent=2))
    else:
        _show(summary, str(dataset))
    if out is not None:
        _draw(dataset, split, count or SHOWN, chosen, seed, out)
        note(f"contact sheet: {out}")


def _draw(dataset: Path, split: str | None, count: int, chosen: tuple[str, ...], seed: int, out: Path) -> None:
    from lmr_tools.dataset import table_path
    from lmr_tools.explanation import known_group, read_groups
    from lmr_tools.preview import contact_sheet
    from lmr_tools.schema import GroupRow, LmrError
    from lmr_tools.splits import shuffled
    from lmr_tools.tables import read_rows

    rows = {row.group_id: row for row in read_rows(table_path(dataset, "groups"), GroupRow)}
    for group_id in chosen:
        known_group(dataset, group_id)
    # Drawn by hash, so that the same seed shows the same groups after the dataset has grown.
    ids = list(dict.fromkeys(chosen)) or shuffled([i for i, row in rows.items() if split in (None, row.split)], seed)
    if not ids:
        raise LmrError(f"{dataset}: no groups{f' in split {split}' if split else ''} to draw")
    places = {group_id: rows[group_id].shard for group_id in ids[: len(chosen) or count]}
    contact_sheet(read_groups(dataset, places), out)


def _show(summary: dict[str, Any], name: str) -> None:
    import sys

    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    console.print(name, style="bold", markup=False)
    if model := (summary["embedder"] or {}).get("model"):
        console.print(f"embedded with {model}; clip score is the cosine of its vectors", markup=False)
    _table(console, "Groups", summary["splits"])
    names = {"own": "of its tier", **{score: f"median {score}" for score in SCORES}}
    slots = [{names.get(name, name): value for name, value in row.items()} for row in summary["slots"]]
    _table(console, "References by slot", slots)
    _scores(console, summary["tiers"])
    photos, scenes = summary["photos"], summary["scenes"]
    _table(
        console,
        "Scenes with most groups",
        [{"scene": scene, "groups": number} for scene, number in scenes["largest"].items()],
    )
    pairs = ", ".join(f"{facts['pairs']:,} {NAMES[tier]}" for tier, facts in summary["tiers"].items())
    console.print(f"\nScenes with groups: {scenes['count']:,}")
    console.print(f"Graded pairs: {pairs}; without a tier: {summary['ungraded_pairs']:,}")
    console.print(f"Photos: {photos['used']:,} used, {photos['unused']:,} unused, {photos['rejected']:,} rejected")
    for title, column in (("Why good photos are no target", "no_target"), ("Rejected photos", "rejects")):
        _table(console, title, [{"reason": reason, "photos": n} for reason, n in summary[column].items()])


def _table(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    console.print(f"\n{title}", style="bold")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column, value in rows[0].items():
        table.add_column(column.replace("_", " "), justify="left" if isinstance(value, str) else "right")
    for row in rows:
        # Text, not markup: reasons and scene names come from files.
        table.add_row(*(Text(_cell(value)) for value in row.values()))
    console.print(table)


def _cell(value: Any) -> str:
    from lmr_tools.summary import printable

    if value is None:
        return "-"
    if isinstance(value, str):
        return printable(value)
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


def _scores(console: Console, tiers: dict[str, Any]) -> None:
    rows = []
    for tier, facts in tiers.items():
        for score in SCORES:
            quantiles = facts[score]["quantiles"] or [None] * 5
            rows.append(
                {
                    "tier": NAMES[tier] if score == "overlap" else "",
                    "references": f"{facts['references']:,}" if score == "overlap" else "",
                    "score": score.replace("_", " "),
                    "0 to 1": _bars(facts[score]["histogram"]),
                    **dict(zip(("5%", "25%", "median", "75%", "95%"), quantiles, strict=True)),
                }
            )
    _table(console, "Scores of the references by tier", rows)


def _bars(counts: list[int]) -> str:
    """A histogram in one line; any count above zero shows."""
    highest = max(counts) or 1
    return "".join(BLOCKS[-(-count * (len(BLOCKS) - 1) // highest)] for count in counts)
