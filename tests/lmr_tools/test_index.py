"""Index: exact answers against plain Python, ties, thread counts, inverted lists, near duplicates, the cache."""

import builtins
from fractions import Fraction
from pathlib import Path

import faiss
import numpy as np
import pytest

from lmr_tools import exact, index
from lmr_tools.index import build_index, index_kind, mine_candidates, near_pairs, search_photos
from lmr_tools.schema import LmrError
from lmr_tools.sketch import ask_neighbours


def unit(*shape: int, seed: int = 0, places: int = 0) -> np.ndarray:
    """Random unit vectors (photos, views, dimension) in float16; with `places`, photos of a place lie together."""
    random = np.random.default_rng(seed)
    vectors = random.normal(size=shape)
    if places:
        vectors += 1.5 * random.normal(size=(places, 1, shape[-1]))[random.integers(0, places, shape[0])]
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float16)


def by_hand(corpus: np.ndarray, queries: np.ndarray, k: int, *, leave_out_self: bool) -> list[list[tuple[int, float]]]:
    """The definition, in plain loops over the largest exact inner product of two views."""
    answer = []
    for q, query in enumerate(queries.astype(np.float64)):
        scored = []
        for p, photo in enumerate(corpus.astype(np.float64)):
            if not (leave_out_self and p == q):
                scored.append((p, max(float((a * b).sum()) for a in query for b in photo)))
        answer.append(sorted(scored, key=lambda entry: (-entry[1], entry[0]))[:k])
    return answer


def test_a_score_is_the_exact_inner_product() -> None:
    a, b = unit(50, 320, seed=1), unit(50, 320, seed=2)
    scores = exact.pair_scores(a, np.arange(50), b, np.arange(50))
    for x, y, score in zip(a, b, scores, strict=True):
        assert Fraction(float(score)) == sum(Fraction(float(p)) * Fraction(float(q)) for p, q in zip(x, y, strict=True))


@pytest.mark.parametrize("k", [3, 60])
def test_candidates_are_those_of_the_definition(k: int) -> None:
    vectors = unit(40, 3, 16, places=8)
    mined = mine_candidates(vectors, k)
    assert (mined.kind, mined.recall) == ("flat", 1.0)
    for numbers, scores, want in zip(
        mined.numbers, mined.scores, by_hand(vectors, vectors, k, leave_out_self=True), strict=True
    ):
        count = len(want)
        assert numbers[:count].tolist() == [p for p, _ in want]
        assert scores[:count].tolist() == [np.float32(score) for _, score in want]
        assert (numbers[count:] == -1).all()
        assert (scores[count:] == -np.inf).all()


def test_ties_go_to_the_lower_index_even_among_many_equal_photos() -> None:
    vectors = unit(90, 2, 16, seed=3)
    vectors[10:60] = vectors[5]  # far more equal photos than one search returns
    mined = mine_candidates(vectors, 4)
    want = by_hand(vectors, vectors, 4, leave_out_self=True)
    assert mined.numbers.tolist() == [[p for p, _ in row] for row in want]
    assert mined.numbers[30].tolist() == [5, 10, 11, 12]


def test_another_corpus_is_searched_without_leaving_any_out() -> None:
    corpus, queries = unit(30, 3, 16, seed=4), unit(5, 3, 16, seed=5)
    queries[2] = corpus[7]
    ids, scores = search_photos(corpus, queries, 3)
    want = by_hand(corpus, queries, 3, leave_out_self=False)
    assert ids.tolist() == [[p for p, _ in row] for row in want]
    assert ids[2, 0] == 7
    np.testing.assert_array_equal(scores, np.array([[s for _, s in row] for row in want], np.float32))


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sketch"])
def test_thread_count_does_not_change_a_bit(kind: str) -> None:
    vectors = unit(1200, 2, 32, places=60)
    before = faiss.omp_get_max_threads()
    results = []
    for threads in (1, 2, 3):
        faiss.omp_set_num_threads(threads)
        mined = mine_candidates(vectors, 10, kind=kind)
        results.append((mined.numbers.tobytes(), mined.scores.tobytes(), mined.recall))
    faiss.omp_set_num_threads(before)
    assert len(set(results)) == 1


@pytest.mark.parametrize("kind", ["ivf", "ivf-sketch"])
def test_recall_of_inverted_lists_is_measured_against_the_truth(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    vectors = unit(1500, 1, 20)
    monkeypatch.setattr(index, "PROBES", 2)
    monkeypatch.setattr(index, "ROUNDS", 0)
    mined = mine_candidates(vectors, 10, kind=kind, seed=3)
    truth = mine_candidates(vectors, 10, kind="flat").numbers
    sample = np.random.default_rng(3).permutation(1500)[: index.TESTED]
    want = np.mean([len(set(truth[i]) & set(mined.numbers[i])) / 10 for i in sample])
    assert mined.recall == pytest.approx(want)
    assert 0.1 < mined.recall < 0.9
    monkeypatch.setattr(index, "ROUNDS", 4)
    asked = mine_candidates(vectors, 10, kind=kind, seed=3)
    assert asked.recall > mined.recall + 0.05
    scores = exact.photo_scores(vectors, np.repeat(np.arange(1500), 10), vectors, asked.numbers.ravel().astype(int))
    np.testing.assert_array_equal(asked.scores.ravel(), scores.astype(np.float32))
    monkeypatch.setattr(index, "PROBES", 64)
    assert mine_candidates(vectors, 10, kind=kind).recall > 0.95


def test_neighbours_of_neighbours_are_those_of_plain_loops() -> None:
    random = np.random.default_rng(5)
    sketch = random.integers(-127, 128, (60, 2, 8)).astype(np.int8)
    lists = np.array([random.permutation(60)[:6] for _ in range(60)], np.int32)
    lists[::7, 3:] = -1
    better = ask_neighbours(sketch, lists, keep=5, fan=4)
    wide = sketch.astype(int)
    for photo in range(60):
        known = set(lists[photo]) | {other for near in lists[photo, :4] if near >= 0 for other in lists[near, :4]}
        score = {o: max(int(a @ b) for a in wide[photo] for b in wide[o]) for o in known - {-1, photo}}
        assert better[photo].tolist() == sorted(score, key=lambda other: (-score[other], other))[:5]


def test_a_memory_mapped_file_gives_the_same_as_an_array(tmp_path: Path) -> None:
    vectors = unit(900, 2, 32, places=40)
    np.save(tmp_path / "v.npy", vectors)
    mapped = np.load(tmp_path / "v.npy", mmap_mode="r")
    for kind in index.KINDS:
        a, b = (mine_candidates(v, 6, kind=kind) for v in (vectors, mapped))
        np.testing.assert_array_equal(a.numbers, b.numbers)
        np.testing.assert_array_equal(a.scores, b.scores)


def test_labels_limit_the_candidates() -> None:
    vectors = unit(60, 3, 16, places=6)
    labels = [None if i % 10 == 0 else f"scene{i % 4}" for i in range(60)]
    mined = mine_candidates(vectors, 5, labels=labels)
    for i, row in enumerate(mined.numbers):
        same = [j for j in range(60) if labels[i] is not None and labels[j] == labels[i]]
        inside = by_hand(vectors[same], vectors[[i]], 6, leave_out_self=False)[0] if same else []
        want = [same[p] for p, _ in inside if same[p] != i][:5]
        assert row.tolist() == want + [-1] * (5 - len(want))


def test_kind_follows_size() -> None:
    kinds = [index_kind(n) for n in (1, 200_000, 200_001, 500_000, 500_001)]
    assert kinds == ["flat", "flat", "ivf", "ivf", "ivf-sketch"]


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sketch"])
def test_near_pairs_are_all_pairs_above_the_threshold(kind: str) -> None:
    vectors = unit(700, 1, 32, places=200)[:, 0]
    vectors[100:140] = vectors[3]  # a cluster larger than the first search
    exact = vectors.astype(np.float64) @ vectors.astype(np.float64).T
    left, right = np.where(np.triu(exact >= 0.8, 1))
    assert len(left) > 41 * 40 / 2
    assert near_pairs(vectors, 0.8, k=4, kind=kind) == [
        (int(i), int(j), exact[i, j]) for i, j in zip(left, right, strict=True)
    ]


def test_more_equal_photos_than_the_limit_stay_joined() -> None:
    vectors = np.repeat(unit(1, 1, 16)[:, 0], 300, axis=0)
    pairs = near_pairs(vectors, 0.9, k=4, limit=20)
    assert len(pairs) <= 300 * 21
    joined = {0}
    for _ in range(len(vectors)):
        joined |= {n for i, j, _ in pairs for n in (i, j) if i in joined or j in joined}
        if len(joined) == len(vectors):
            break
    assert joined == set(range(300))


@pytest.mark.parametrize("count", [0, 1, 2])
def test_tiny_corpora(count: int) -> None:
    vectors = unit(count, 2, 16)
    mined = mine_candidates(vectors, 3)
    assert mined.numbers.shape == (count, 3)
    assert (mined.numbers >= 0).sum() == count * (count - 1)
    assert mined.recall == 1.0
    assert near_pairs(vectors[:, 0], 2.0) == []
    assert search_photos(vectors, unit(1, 2, 16), 3)[0].shape == (1, 3)


@pytest.mark.parametrize("kind", ["flat", "ivf", "ivf-sketch"])
def test_an_index_is_kept_extended_and_read_back_for_its_own_vectors_only(tmp_path: Path, kind: str) -> None:
    vectors = unit(600, 1, 16)[:, 0]
    built, path = build_index(vectors[:500], kind=kind), tmp_path / "photos.faiss"
    assert index.load_index(path, model="m", dimension=16) is None
    index.save_index(path, built, model="m", content="500")
    again = index.load_index(path, model="m", dimension=16, content="500")
    for mine, other in zip(index.search(built, vectors, 5), index.search(again, vectors, 5), strict=True):
        np.testing.assert_array_equal(mine, other)
    index.extend_index(again, vectors[500:])
    assert again.ntotal == 600
    found = index.search(again, vectors[500:], 1)[1][:, 0]
    assert (found == np.arange(500, 600)).mean() > 0.95
    assert index.load_index(path, model="m", dimension=16, content="501") is None
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert index.load_index(path, model="m", dimension=16) is None


def test_an_index_of_another_model_or_dimension_is_refused(tmp_path: Path) -> None:
    built, path = build_index(unit(50, 1, 16)[:, 0]), tmp_path / "photos.faiss"
    index.save_index(path, built, model="ViT-B-32", content="")
    for model, dimension in (("RN50", 16), ("ViT-B-32", 17)):
        with pytest.raises(LmrError, match="index of model ViT-B-32 with 16 dimensions; wanted is"):
            index.load_index(path, model=model, dimension=dimension)
    with pytest.raises(LmrError, match="made for vectors of 16 numbers, not 8"):
        index.extend_index(built, unit(5, 1, 8)[:, 0])


def test_mining_keeps_its_index_and_trains_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(500, 2, 16, places=30)
    first = mine_candidates(vectors, 4, kind="ivf", keep=tmp_path, model="m")
    monkeypatch.setattr(index, "build_index", lambda *a, **b: pytest.fail("trained again"))
    again = mine_candidates(vectors, 4, kind="ivf", keep=tmp_path, model="m")
    np.testing.assert_array_equal(first.numbers, again.numbers)
    monkeypatch.undo()
    np.testing.assert_array_equal(
        mine_candidates(vectors[:400], 4, kind="ivf", keep=tmp_path, model="m").numbers,
        mine_candidates(vectors[:400], 4, kind="ivf").numbers,
    )


def test_without_faiss_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_faiss(name: str, *rest: object, **more: object) -> object:
        if name == "faiss":
            raise ImportError("No module named 'faiss'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_faiss)
    with pytest.raises(LmrError, match=r"faiss: not installed; run `pip install 'lmr-tools\[cpu\]'`, or `\[gpu\]`"):
        build_index(unit(3, 1, 8)[:, 0])


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="hnsw"):
        build_index(unit(3, 1, 8)[:, 0], kind="hnsw")
