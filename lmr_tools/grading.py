"""Pair numbers -> tiers: the rows of the `pairs` table, and for each target photo what may serve as its references.

Joins what `pairs`, `tiers`, `splits` and `groups` offer. Nothing is held per pair but the numbers; rows are made when
they are asked for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from lmr_tools.groups import Option, Task
from lmr_tools.schema import CandidateRow, ImageRow, PairRow, Tier
from lmr_tools.splits import Adjacency, adjacency, components, two_steps
from lmr_tools.tiers import TierRule, grade, is_strict, is_verified

# Photos two strict pairs away are Low references where nothing better is left; more than this many never help.
CHAINED = 8
PAIRS_AT_ONCE = 1 << 16


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """The surviving photos with everything mined and measured about them. Row numbers index `rows`.

    vectors: (N, V, D), None where photos were not embedded: their pairs have no score. candidates, scores: (N, k), -1
    for none; numbers: one PAIR_NUMBERS row per unordered pair.
    """

    rows: Sequence[ImageRow]
    vectors: npt.NDArray[np.float16] | None
    candidates: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    numbers: npt.NDArray[np.void]
    rule: TierRule
    labelled: bool

    def clip_scores(self, target: int, references: Sequence[int]) -> Sequence[float | None]:
        """Scores of pairs: as mined, from either side, or else the largest product over all pairs of views."""
        if self.vectors is None:
            return [None] * len(references)
        others = np.asarray(references, np.int64)
        score = np.full(len(others), np.nan)
        # The target's own list is put in last: where both lists name the pair, it decides.
        for same, mined in (
            (self.candidates[others] == target, self.scores[others]),
            (self.candidates[target] == others[:, None], self.scores[target]),
        ):
            row, place = np.nonzero(same)
            score[row] = mined[row, place] if mined.ndim == 2 else mined[place]
        for number in np.flatnonzero(np.isnan(score)):
            products = self.vectors[target].astype(np.float64) @ self.vectors[others[number]].astype(np.float64).T
            score[number] = products.max()
        return [round(value, 6) for value in score.tolist()]


def scenes_of(corpus: Corpus) -> list[str]:
    """Scene of each photo: its component of verified pairs (and of equal labels), named by its first photo's id."""
    rows = corpus.rows
    good = np.flatnonzero(is_verified(corpus.numbers["consistent"], corpus.numbers["inliers"], corpus.rule))
    edges: Iterator[tuple[int, int]] = _ends(corpus.numbers, good)
    if corpus.labelled:
        first: dict[str, int] = {}
        labels = ((first.setdefault(row.scene or "", number), number) for number, row in enumerate(rows))
        edges = itertools.chain(edges, labels)
    return [rows[root].image_id for root in components(len(rows), edges)]


def _ends(numbers: npt.NDArray[np.void], chosen: npt.NDArray[np.intp]) -> Iterator[tuple[int, int]]:
    """The two photos of the chosen pairs, some at a time: as Python numbers all of them would need gigabytes."""
    for start in range(0, len(chosen), PAIRS_AT_ONCE):
        part = numbers[chosen[start : start + PAIRS_AT_ONCE]]
        yield from zip(part["a"].tolist(), part["b"].tolist(), strict=True)


def _strict(count: int, numbers: npt.NDArray[np.void], rule: TierRule) -> Adjacency:
    """The graph of strict pairs; a step is log2(apparent size in the other / in the one)."""
    edges = numbers[is_strict(numbers["consistent"], numbers["inliers"], rule)]
    return adjacency(count, edges["a"], edges["b"], edges["consistent"], edges["scale_log2"])


def unmatched_chains(count: int, numbers: npt.NDArray[np.void], rule: TierRule) -> npt.NDArray[np.int32]:
    """Photos two strict pairs away whose own pair was never matched, because mining did not name it: (count, k).

    They are the best candidates that embeddings missed; -1 fills up.
    """
    graph = _strict(count, numbers, rule)
    found = np.full((count, CHAINED), -1, np.int32)
    for target in np.flatnonzero(np.diff(graph.start)).tolist():
        others = [other for other, _ in two_steps(graph, target, CHAINED)]
        found[target, : len(others)] = others
    matched = np.sort(_pair_keys(count, numbers["a"], numbers["b"]))
    keys = _pair_keys(count, np.arange(count)[:, None], found)
    place = np.minimum(np.searchsorted(matched, keys), max(len(matched) - 1, 0))
    found[(matched[place] == keys) if len(matched) else np.zeros_like(keys, bool)] = -1
    # What is left moves to the front, in its order.
    return np.take_along_axis(found, np.argsort(found < 0, axis=1, kind="stable"), 1)


def _pair_keys(count: int, a: npt.NDArray[np.integer[Any]], b: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int64]:
    """One number per unordered pair of photo numbers."""
    return np.asarray(np.minimum(a, b).astype(np.int64) * count + np.maximum(a, b))


def candidate_rows(corpus: Corpus) -> Iterator[CandidateRow]:
    """The `candidates` rows, best first for each photo, in the order of the photos."""
    rows = corpus.rows
    for target, row in enumerate(rows):
        mined = zip(corpus.candidates[target].tolist(), corpus.scores[target].tolist(), strict=True)
        for rank, (other, score) in enumerate(mined):
            if other >= 0:
                name = rows[other].image_id
                yield CandidateRow(target_image=row.image_id, ref_image=name, rank=rank, clip_score=round(score, 6))


def pair_rows(corpus: Corpus, duplicates: Mapping[str, Sequence[str]]) -> Iterator[list[PairRow]]:
    """The `pairs` rows of each photo as target, in the order of the photos.

    `duplicates` names, per target id, the references whose crop repeats the target's: their tier is null.
    """
    rows, numbers = corpus.rows, corpus.numbers
    graph = _strict(len(rows), numbers, corpus.rule)
    # The places in `numbers` of each photo's pairs, so that no photo has to search them all.
    order_a, order_b = np.argsort(numbers["a"], kind="stable"), np.argsort(numbers["b"], kind="stable")
    starts_a = np.searchsorted(numbers["a"][order_a], np.arange(len(rows) + 1))
    starts_b = np.searchsorted(numbers["b"][order_b], np.arange(len(rows) + 1))
    for target, row in enumerate(rows):
        own = [(pair.b, pair, True) for pair in _pairs(numbers, order_a[starts_a[target] : starts_a[target + 1]])]
        own += [(pair.a, pair, False) for pair in _pairs(numbers, order_b[starts_b[target] : starts_b[target + 1]])]
        own.sort()
        repeated = set(duplicates.get(row.image_id, ()))
        scores = corpus.clip_scores(target, [other for other, _, _ in own])
        made = {
            other: _direct(corpus, target, other, pair, forward, score, rows[other].image_id in repeated)
            for (other, pair, forward), score in zip(own, scores, strict=True)
        }
        # Matched, but not verified: the chain says more than the failed match. A duplicate stays one.
        chains = [
            (other, between)
            for other, between in two_steps(graph, target, CHAINED)
            if other not in made or not is_verified(made[other].consistent, made[other].inliers, corpus.rule)
        ]
        scores = corpus.clip_scores(target, [other for other, _ in chains])
        for (other, between), score in zip(chains, scores, strict=True):
            shift = graph.step_of(target, between) + graph.step_of(between, other)
            made[other] = _chained(corpus, target, other, between, shift, score)
        yield [made[other] for other in sorted(made)]


class _Pair(NamedTuple):
    """One row of PAIR_NUMBERS as Python numbers."""

    a: int
    b: int
    matches: int
    inliers: int
    consistent: int
    overlap_a: float
    overlap_b: float
    scale_log2: float
    scale_ratio: float


def _pairs(numbers: npt.NDArray[np.void], places: npt.NDArray[np.intp]) -> list[_Pair]:
    return [_Pair(*row) for row in numbers[places].tolist()]


def _direct(
    corpus: Corpus, target: int, other: int, pair: _Pair, forward: bool, clip_score: float | None, repeated: bool
) -> PairRow:
    overlap = pair.overlap_a if forward else pair.overlap_b
    tier, reason = grade(overlap, pair.scale_ratio, pair.consistent, pair.inliers, clip_score, corpus.rule)
    joined = 1 if tier is not None else 0
    if repeated:
        tier, reason = None, f"duplicate: crops agree at PSNR >= {corpus.rule.duplicate_psnr:g} dB"
    elif tier is None and corpus.labelled and corpus.rows[target].scene == corpus.rows[other].scene:
        tier, reason = Tier.LOW, f"same label; {reason}"
    return PairRow(
        target_image=corpus.rows[target].image_id,
        ref_image=corpus.rows[other].image_id,
        overlap=round(overlap, 6),
        scale_ratio=round(pair.scale_ratio, 6),
        inliers=pair.inliers,
        tier=None if tier is None else str(tier),
        reason=reason,
        clip_score=clip_score,
        matches=pair.matches,
        consistent=pair.consistent,
        scale_log2=round(pair.scale_log2 * (1 if forward else -1), 6),
        hops=joined,
        via=None,
    )


def _chained(corpus: Corpus, target: int, other: int, between: int, shift: float, clip_score: float | None) -> PairRow:
    through = corpus.rows[between].image_id
    return PairRow(
        target_image=corpus.rows[target].image_id,
        ref_image=corpus.rows[other].image_id,
        overlap=0.0,
        scale_ratio=round(2.0 ** -abs(shift), 6),
        inliers=0,
        tier=str(Tier.LOW),
        reason=f"same scene through {through}; the two were not verified themselves",
        clip_score=clip_score,
        matches=0,
        consistent=0,
        scale_log2=round(shift, 6),
        hops=2,
        via=through,
    )


def tasks(corpus: Corpus) -> Iterator[Task]:
    """For each photo, in order, the planning task of its groups: what may serve as its references."""
    by_id = {row.image_id: row for row in corpus.rows}
    for row, pairs in zip(corpus.rows, pair_rows(corpus, {}), strict=True):
        options = tuple(
            Option(
                row=by_id[pair.ref_image],
                tier=Tier(pair.tier),
                overlap=pair.overlap or 0.0,
                scale_ratio=pair.scale_ratio or 0.0,
                clip_score=pair.clip_score,
                via=by_id[pair.via].sha256 if pair.via else None,
                verified=pair.hops == 1,
            )
            for pair in pairs
            if pair.tier is not None
        )
        yield Task(target=row, options=options)
