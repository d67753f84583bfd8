"""Places that turn out to be one: their groups get one scene name, and nothing of a held-out place is left in training.

Pure. Two scenes are one place when they share a photo, or when a link says so. Imports `splits` for the components.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from lmr_tools.schema import Split
from lmr_tools.splits import components

# The more held out, the higher: a place that two splits claim belongs to the higher one.
HELD_OUT = {Split.TRAIN: 0, Split.VAL: 1, Split.TEST: 2}


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One group: the scene and split it was given, and its photos. Scenes are named by whoever gave them."""

    scene: str
    split: Split
    photos: tuple[str, ...]


def settle(claims: Sequence[Claim], links: Iterable[tuple[str, str]] = ()) -> tuple[dict[str, str], list[str | None]]:
    """({scene: name of its place}, for each claim why it must be left out, or None).

    A place has the name of its first scene. Held-out groups stay as they are; groups of the same place in a less
    held-out split are left out, because training on them would leak.
    """
    scenes: dict[str, int] = {}
    owner: dict[str, int] = {}
    edges = []
    for claim in claims:
        number = scenes.setdefault(claim.scene, len(scenes))
        edges += [(owner.setdefault(photo, number), number) for photo in claim.photos]
    edges += [(scenes[a], scenes[b]) for a, b in links if a in scenes and b in scenes]
    names = list(scenes)
    root = components(len(names), edges)
    place = {name: names[root[number]] for name, number in scenes.items()}
    highest: dict[str, tuple[int, Claim]] = {}
    for claim in claims:
        level = HELD_OUT[claim.split]
        if level > highest.get(place[claim.scene], (-1, claim))[0]:
            highest[place[claim.scene]] = (level, claim)
    reasons: list[str | None] = []
    for claim in claims:
        level, holder = highest[place[claim.scene]]
        mine = HELD_OUT[claim.split] == level
        reasons.append(
            None if mine else f"scene {claim.scene} is one place with {holder.scene}, held out for {holder.split}"
        )
    return place, reasons
