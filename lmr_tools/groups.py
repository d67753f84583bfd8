"""What a group is made of: which references fill which slot, and the plan that is kept per target photo.

Pure: nothing is read here. A pair keeps its own tier; the slot says which place it fills. `crops` draws the target
crops and places the reference crops.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

from lmr_tools.schema import ImageRow, Tier


@dataclass(frozen=True, kw_only=True)
class Counts:
    """References per group, and whether a higher tier may fill a lower slot and slots may stay empty."""

    high: int
    medium: int
    low: int
    strict_tiers: bool
    allow_partial: bool

    def slots(self) -> list[tuple[str, Tier]]:
        """Slot names with their tiers: H, M1, M2, L1, L2 by default (a tier's only slot carries no number)."""
        named = []
        for tier, count in ((Tier.HIGH, self.high), (Tier.MEDIUM, self.medium), (Tier.LOW, self.low)):
            named += [(f"{tier}{n + 1}" if count > 1 else str(tier), tier) for n in range(count)]
        return named


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One photo that may serve as reference. `via` names the photo (sha256) through which an unseen pair is joined."""

    row: ImageRow
    tier: Tier
    overlap: float
    scale_ratio: float
    clip_score: float | None
    via: str | None = None
    verified: bool = True
    seen: bool = True  # whether the reference shows the target crop in question

    @property
    def similarity(self) -> float:
        """Rolp * Rs, the order of references within a tier."""
        return self.overlap * self.scale_ratio

    @property
    def rank(self) -> int:
        """Pairs that share the crop, then chained pairs, verified pairs that show another part, bare equal labels."""
        if self.verified:
            return 0 if self.seen else 2
        return 1 if self.via else 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """One target photo with its possible references."""

    target: ImageRow
    options: tuple[Option, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedReference:
    """A reference of a planned group; corners in source pixels."""

    image_id: str
    slot: str
    tier: str
    overlap: float | None
    scale_ratio: float | None
    clip_score: float | None
    x: int
    y: int
    landing: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedGroup:
    """A target crop and its references, not yet given to a split or shard."""

    target_image: str
    x: int
    y: int
    references: tuple[PlannedReference, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What came of one target photo: its groups, the references that repeat it, why there is no group."""

    target_image: str
    groups: tuple[PlannedGroup, ...]
    duplicates: tuple[str, ...]
    reason: str


def choose(options: Sequence[Option], counts: Counts) -> list[tuple[str, Option]] | None:
    """Fill the slots from usable options: (slot, option) pairs, or None when a group can not be made.

    Each tier's slots take that tier's most similar pairs first. Empty Medium and Low slots then take, unless
    `strict_tiers`, what High and Medium pairs are left, the least similar ones for Low: a High pair also meets the
    thresholds of Medium (Rolp > .10, Rs > .66), and Low is any other pair of the scene.
    """
    ordered = sorted(options, key=lambda o: (o.rank, -o.similarity, -(o.clip_score or 0.0), o.row.image_id))
    waiting = {tier: [o for o in ordered if o.tier == tier] for tier in Tier}
    filled: dict[str, Option] = {}
    empty: list[str] = []
    for slot, tier in counts.slots():
        if waiting[tier]:
            filled[slot] = waiting[tier].pop(0)
        else:
            empty.append(slot)
    if not counts.strict_tiers:
        surplus = sorted(waiting[Tier.HIGH] + waiting[Tier.MEDIUM], key=lambda o: (-o.similarity, o.row.image_id))
        lower = [slot for slot in empty if not slot.startswith(Tier.HIGH)]
        # The last slots (Low) take the least similar of the surplus, the ones before them (Medium) the next.
        tail = surplus[-len(lower) :] if lower else []
        # With too few left over, the Medium slots are served first: nothing below Medium could fill them.
        filled.update(zip(lower, tail, strict=False))
    if not filled or (len(filled) < len(counts.slots()) and not counts.allow_partial):
        return None
    return [(slot, filled[slot]) for slot, _ in counts.slots() if slot in filled]


def shortage(options: Sequence[Option], counts: Counts) -> str:
    """Why these options make no group."""
    have = ", ".join(f"{sum(o.tier == tier for o in options)} {tier}" for tier in Tier)
    return f"too few references: {have} for {counts.high} H, {counts.medium} M, {counts.low} L"


def plan_to_json(plan: Plan) -> str:
    """A plan as JSON text."""
    return json.dumps(dataclasses.asdict(plan))


def plan_from_json(text: str) -> Plan:
    """The plan written by `plan_to_json`."""
    value = json.loads(text)
    groups = tuple(
        PlannedGroup(**{**group, "references": tuple(PlannedReference(**r) for r in group["references"])})
        for group in value["groups"]
    )
    return Plan(**{**value, "groups": groups, "duplicates": tuple(value["duplicates"])})
