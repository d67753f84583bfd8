"""Pairs of a corpus: each measured once, chains that mining missed and scores, all against plain loops."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lmr_tools.grading import CHAINED, Corpus, pair_rows, unmatched_chains
from lmr_tools.pairs import PAIR_NUMBERS, PairStore, verify_all
from lmr_tools.schema import ImageRow
from lmr_tools.tiers import TierRule, is_strict

COUNT = 40


def photo(name: str) -> ImageRow:
    return ImageRow(
        image_id=name[:16], path=name, width=400, height=300, sha256=name, scene=None, status="unused", source=0,
        offset=None, bytes=1, phash=name, sharpness=100.0, texture=1.0, no_target=None,
    )  # fmt: skip


def mined(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    lists = np.array([random.permutation(COUNT)[:6] for _ in range(COUNT)], np.int32)
    lists[::5, 3:] = -1
    return lists


def measured(candidates: np.ndarray, seed: int) -> np.ndarray:
    """PAIR_NUMBERS of every candidate pair, some strict, some verified, some not."""
    random = np.random.default_rng(seed)
    ends = sorted({tuple(sorted((a, int(b)))) for a, row in enumerate(candidates) for b in row if b not in (-1, a)})
    numbers = np.zeros(len(ends), PAIR_NUMBERS)
    numbers["a"], numbers["b"] = np.array([e[:: random.choice([1, -1])] for e in ends]).T
    numbers["inliers"] = random.integers(5, 40, len(ends))
    numbers["consistent"] = numbers["inliers"] * random.choice([0.5, 0.7, 0.9], len(ends))
    numbers["overlap_a"], numbers["overlap_b"] = random.random((2, len(ends)))
    numbers["scale_log2"] = random.normal(0, 0.3, len(ends))
    numbers["scale_ratio"] = 2.0 ** -np.abs(numbers["scale_log2"])
    return numbers


@pytest.mark.parametrize("seed", range(4))
def test_every_candidate_pair_is_measured_once_under_the_smaller_hash(tmp_path: Path, seed: int) -> None:
    candidates = mined(seed)
    candidates[3, 0] = 3  # a photo is no partner of itself
    rows = [photo(f"{(number * 7919) % 64:064x}") for number in range(COUNT)]
    sent = []

    def mapper(_: object, items: object) -> list:
        sent.extend(itertools.chain.from_iterable(items))
        return []

    assert list(verify_all(rows, candidates, PairStore(work=tmp_path, max_side=1, max_features=1), mapper)) == []
    assert [(index, name) for index, name, _ in sent] == [(index, row.sha256) for index, row in enumerate(rows)]
    wanted: dict[int, set[int]] = {index: set() for index in range(COUNT)}
    for target, other in ((t, int(o)) for t, own in enumerate(candidates) for o in own if o not in (-1, t)):
        low, high = sorted((target, other), key=lambda number: rows[number].sha256)
        wanted[low].add(high)
    for index, _, partners in sent:
        assert partners == tuple((other, rows[other].sha256) for other in sorted(wanted[index]))


@pytest.mark.parametrize("seed", range(4))
def test_chains_are_strict_pairs_of_strict_pairs_that_nobody_matched(seed: int) -> None:
    rule, numbers = TierRule(), measured(mined(seed), seed)
    strict = {}
    for row in numbers:
        if is_strict(int(row["consistent"]), int(row["inliers"]), rule):
            strict[int(row["a"]), int(row["b"])] = strict[int(row["b"]), int(row["a"])] = int(row["consistent"])
    matched = {frozenset((int(row["a"]), int(row["b"]))) for row in numbers}
    found = unmatched_chains(COUNT, numbers, rule)
    assert found.shape == (COUNT, CHAINED)
    some = 0
    for target in range(COUNT):
        strength: dict[int, int] = {}
        for middle, other in itertools.product(range(COUNT), repeat=2):
            if {(target, middle), (middle, other)} <= strict.keys() and other != target:
                chain = min(strict[target, middle], strict[middle, other])
                strength[other] = max(strength.get(other, 0), chain)
        reached = [other for other in strength if (target, other) not in strict]
        best = sorted(reached, key=lambda other: (-strength[other], other))[:CHAINED]
        fresh = [other for other in best if frozenset((target, other)) not in matched]
        assert found[target].tolist() == fresh + [-1] * (CHAINED - len(fresh))
        some += len(fresh)
    assert some > COUNT
    assert (unmatched_chains(COUNT, numbers[:0], rule) == -1).all()


def test_a_score_is_the_targets_own_or_the_others_or_computed() -> None:
    random, candidates = np.random.default_rng(1), mined(1)
    vectors = random.normal(size=(COUNT, 2, 8)).astype(np.float16)
    scores = random.random(candidates.shape).astype(np.float32)
    corpus = Corpus(
        rows=[photo(f"{number:064x}") for number in range(COUNT)], vectors=vectors, candidates=candidates,
        scores=scores, numbers=measured(candidates, 1), rule=TierRule(), labelled=False,
    )  # fmt: skip
    kinds = SimpleNamespace(own=0, others=0, computed=0)
    for target in range(COUNT):
        others = [other for other in range(COUNT) if other != target]
        for other, score in zip(others, corpus.clip_scores(target, others), strict=True):
            own, back = candidates[target].tolist(), candidates[other].tolist()
            if other in own:
                wanted = scores[target, own.index(other)]
                kinds.own += 1
            elif target in back:
                wanted = scores[other, back.index(target)]
                kinds.others += 1
            else:
                wanted = max(float(a @ b) for a in vectors[target].astype(float) for b in vectors[other].astype(float))
                kinds.computed += 1
            assert score == pytest.approx(float(wanted), abs=1e-6)
    assert min(vars(kinds).values()) > 50
    assert corpus.clip_scores(0, []) == []


def test_both_directions_of_a_pair_have_a_row_with_their_own_overlap() -> None:
    candidates = mined(2)
    numbers = measured(candidates, 2)
    rows = [photo(f"{number:016d}") for number in range(COUNT)]
    names = {row.image_id: number for number, row in enumerate(rows)}
    corpus = Corpus(
        rows=rows, vectors=np.ones((COUNT, 1, 4), np.float16), candidates=candidates,
        scores=np.zeros(candidates.shape, np.float32), numbers=numbers, rule=TierRule(), labelled=False,
    )  # fmt: skip
    found = {
        (names[row.target_image], names[row.ref_image]): row
        for part in pair_rows(corpus, {})
        for row in part
        if row.hops < 2
    }
    replaced = 0
    for number in numbers:
        a, b = int(number["a"]), int(number["b"])
        for ends, overlap, sign in (((a, b), number["overlap_a"], 1), ((b, a), number["overlap_b"], -1)):
            if ends not in found:  # a chain took the place of a pair that was not verified
                replaced += 1
                continue
            row = found[ends]
            assert (row.overlap, row.matches) == (pytest.approx(overlap, abs=1e-6), number["matches"])
            assert row.scale_log2 == pytest.approx(sign * number["scale_log2"], abs=1e-6)
    assert len(found) == 2 * len(numbers) - replaced
