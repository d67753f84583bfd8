"""`lmr explain`: why a group has these references with these tiers, in numbers and with the matches drawn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .progress import note

if TYPE_CHECKING:
    from lmr_tools.explanation import Explanation


@click.command()
@click.argument("dataset", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("group")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Draw the matches (.png or .jpg).")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def explain(dataset: Path, group: str, out: Path | None, as_json: bool) -> None:
    """Explain the references of GROUP in DATASET: every photo considered, what was measured, what decided.

    With --out the target is drawn beside each reference, with crop boxes and the matches between them, from the
    source photos where they can still be read, else from the crops in the shard. GROUP may be a photo's id or path:
    then you are told its groups, or why it has none.
    """
    from lmr_tools.explanation import draw_evidence, explain_group

    explanation = explain_group(dataset, group)
    click.echo(json.dumps(_as_json(explanation), indent=2) if as_json else _as_text(explanation))
    if out is not None:
        note(draw_evidence(dataset, explanation, out))
        note(f"matches: {out}")


def _as_json(explanation: Explanation) -> dict[str, Any]:
    return {
        "group_id": explanation.group_id,
        "target": dataclasses.asdict(explanation.target),
        "references": [dataclasses.asdict(row) for row in explanation.rows],
        "considered": [dataclasses.asdict(considered) for considered in explanation.considered],
    }


def _as_text(explanation: Explanation) -> str:
    from lmr_tools.explanation import numbers_line
    from lmr_tools.summary import printable

    row, recipe, target = explanation.rows[0], explanation.recipe, explanation.target
    lines = [
        f"group      {explanation.group_id} ({row.split}, {row.shard}, scene {row.scene})",
        f"target     {target.path} ({target.image_id}, {target.width}x{target.height})",
        f"crop       {row.size}x{row.size} at ({row.target_x}, {row.target_y})",
        f"tiers      High: overlap > {recipe.get('high_overlap')} and scale ratio > {recipe.get('high_scale')}; "
        f"Medium: > {recipe.get('medium_overlap')} and > {recipe.get('medium_scale')}; Low: the rest of the scene",
    ]
    corners = {r.ref_image: (r.ref_x, r.ref_y, r.landing) for r in explanation.rows}
    for considered in explanation.considered:
        pair = considered.pair
        tier = (pair.tier if pair else None) or "-"
        lines.append("")
        lines.append(f"{considered.slot or '--':<4} tier {tier}  {considered.path} ({considered.image_id})")
        lines.append(f"     {numbers_line(considered)}")
        if pair:
            lines.append(f"     graded: {pair.reason}")
        lines.append(f"     {considered.why}")
        if considered.image_id in corners:
            x, y, landing = corners[considered.image_id]
            lines.append(f"     crop at ({x}, {y}), {landing}")
    return "\n".join(printable(line) for line in lines)
