"""Nearest photos by their vectors, through FAISS: build, keep, search, mine candidates, find near duplicates.

FAISS proposes, `exact` decides: scores and their order do not depend on the index, and vectors may lie in a
memory-mapped file of any size. Up to 200,000 vectors the index is exact; up to 500,000 it is inverted lists of the
vectors as they are; above, inverted lists of their `sketch` (128 bytes each). What lists miss, neighbours of neighbours
find; the recall that results is measured and kept.

After a FAISS search a forked child process hangs in its first parallel section: start processes by `spawn`.
An index file can crash the program that reads it: only files of our own cache are read, never somebody else's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lmr_tools.exact import SLACK, best_photos, exact_photos, pair_scores, photo_scores
from lmr_tools.schema import LmrError
from lmr_tools.sketch import SAMPLE as LEARNT_FROM
from lmr_tools.sketch import ask_neighbours, learn_directions, sketch_of
from lmr_tools.tables import atomic_path, sha256_file, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Float16s = npt.NDArray[np.float16]
    Float32s = npt.NDArray[np.float32]
    Ints = npt.NDArray[np.int64]

FLAT_UP_TO = 200_000  # vectors: exact search is fast enough below
IVF_UP_TO = 500_000  # vectors: above, sketches of 128 bytes are a quarter of the work and an eighth of the memory
KINDS = ("flat", "ivf", "ivf-sketch")
PROBES = 32  # inverted lists visited per query
TRAINING = 40  # vectors per list that the lists are learnt from
FEWEST = 39  # FAISS complains below this number of training vectors per list
QUERIES = 1024  # vectors per search call
CHUNK = 1 << 16  # vectors converted at a time
FAN = 32  # neighbours whose neighbours are asked
ROUNDS = 4  # of asking, at most
ENOUGH = 0.98  # recall at which asking ends, and
GAIN = 0.005  # what a round must add for another one
TESTED = 200  # photos on which recall is measured
ROUGH = 0.05  # more than products of sketches of near duplicates are wrong by
GPU_HITS = 2048  # most hits per query that FAISS gives on a GPU


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise LmrError(
            "faiss: not installed; run `pip install 'lmr-tools[cpu]'`, or `[gpu]` on Linux with an NVIDIA GPU"
        ) from None
    return faiss


def index_kind(count: int) -> str:
    """The kind of index for `count` vectors: flat (exact), ivf, or ivf-sketch."""
    return "flat" if count <= FLAT_UP_TO else "ivf" if count <= IVF_UP_TO else "ivf-sketch"


def build_index(vectors_ND: Float32s | Float16s, *, kind: str = "auto", seed: int = 0) -> Any:
    """A FAISS index (inner product) over unit vectors (N, D); `kind`: auto, flat, ivf or ivf-sketch.

    Lists and sketches are learnt from a seeded sample. float16 input is converted block by block, never as a whole.
    """
    faiss = _faiss()
    count, dimension = vectors_ND.shape
    kind = index_kind(count) if kind == "auto" else kind
    if kind not in KINDS:
        raise ValueError(f"kind must be auto, {', '.join(KINDS)}, not {kind!r}")
    if kind == "flat":
        index = faiss.IndexFlatIP(dimension)
    else:
        lists = max(1, min(2 ** round(math.log2(4 * math.sqrt(max(count, 1)))), count // FEWEST))
        sample = _sample(vectors_ND, TRAINING * lists, seed)
        if kind == "ivf":
            index = ivf = faiss.index_factory(dimension, f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        else:
            directions = learn_directions(sample[:LEARNT_FROM])
            step = faiss.LinearTransform(dimension, directions.shape[1], False)
            faiss.copy_array_to_vector(np.ascontiguousarray(directions.T).ravel(), step.A)
            step.is_trained = True
            ivf = faiss.index_factory(directions.shape[1], f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
            index = faiss.IndexPreTransform(step, ivf)
        ivf.by_residual = False  # half precision then stores our float16 vectors without loss
        ivf.cp.seed, ivf.cp.spherical, ivf.nprobe = seed + 1, True, min(PROBES, lists)
        index.train(sample)
    extend_index(index, vectors_ND)
    return index


def extend_index(index: Any, vectors_ND: Float32s | Float16s) -> None:
    """Add unit vectors (N, D) to an index; their ids go on where its ids end. Its lists stay as they were learnt."""
    if vectors_ND.shape[1] != index.d:
        raise LmrError(f"index: made for vectors of {index.d} numbers, not {vectors_ND.shape[1]}; build it again")
    for start in range(0, len(vectors_ND), CHUNK):
        index.add(np.ascontiguousarray(vectors_ND[start : start + CHUNK], dtype=np.float32))


def _sample(vectors_ND: Float32s | Float16s, count: int, seed: int) -> Float32s:
    chosen = np.random.default_rng(seed).permutation(len(vectors_ND))[:count]
    return np.asarray(vectors_ND[np.sort(chosen)], dtype=np.float32)


def on_gpu(index: Any) -> Any:
    """The index on the first GPU if FAISS and the machine have one and it fits there, else as it is."""
    faiss = _faiss()
    if not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus():
        return index
    options = faiss.GpuClonerOptions()
    options.useFloat16 = False  # an exact index has to stay one
    with contextlib.suppress(RuntimeError):  # too large for the card
        return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index, options)
    return index


def search(index: Any, queries_ND: Float32s | Float16s, k: int) -> tuple[Float32s, Ints]:
    """Scores (N, k), best first, and ids (N, k) of the nearest vectors; -1 where the index found fewer."""
    scores, ids = index.search(np.ascontiguousarray(queries_ND, dtype=np.float32), k)
    return scores, ids


def save_index(path: Path, index: Any, *, model: str, content: str) -> None:
    """Keep an index in our cache; a JSON file beside it says which embedder and which vectors it is of."""
    data = _faiss().serialize_index(index)
    with atomic_path(path) as temporary:
        data.tofile(temporary)
    record = {"model": model, "dimension": index.d, "content": content, "vectors": index.ntotal}
    write_json(path.with_suffix(".json"), {**record, "sha256": sha256_file(path), "faiss": _faiss().__version__})


def load_index(path: Path, *, model: str, dimension: int, content: str | None = None) -> Any | None:
    """The index kept at `path`, or None if there is none, it is damaged, or of other vectors than `content`.

    An index of another model or dimension is an LmrError: ids and scores would come out, and mean nothing.
    """
    faiss = _faiss()
    try:
        record = json.loads(path.with_suffix(".json").read_text())
        whole = record["sha256"] == sha256_file(path) and record["faiss"] == faiss.__version__
        found, width, of = record["model"], record["dimension"], record["content"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if (found, width) != (model, dimension):
        raise LmrError(
            f"{path}: an index of model {found} with {width} dimensions; wanted is {model} with {dimension}; "
            "delete it, or name the right one"
        )
    if not whole or content not in (None, of):
        return None
    return faiss.deserialize_index(np.fromfile(path, dtype=np.uint8))


@dataclass(frozen=True, kw_only=True)
class Mined:
    """Candidates of N photos, best first: `numbers` (N, k), -1 for none, and `scores` (N, k), -inf for none.

    `recall` is the measured share of the exact k nearest that were found; `kind` names the index.
    """

    numbers: npt.NDArray[np.int32]
    scores: Float32s
    recall: float
    kind: str


def mine_candidates(
    vectors_NVD: Float16s,
    k: int,
    *,
    kind: str = "auto",
    labels: Sequence[str | None] | None = None,
    seed: int = 0,
    keep: Path | None = None,
    model: str = "",
) -> Mined:
    """The k photos most similar to each photo, itself left out.

    Similarity of two photos is the largest inner product over all pairs of their views; ties go to the lower index. A
    flat index gives the exact answer; recall is measured in any case, against brute force on a seeded sample of
    photos. With `labels`, only photos of equal label are candidates (None: no candidates) and the search is exact.
    An index of more than a flat one is kept in the folder `keep` under `model`, for a run that goes on after a kill.
    """
    if labels is None:
        index, kind = _index_of(vectors_NVD, kind, seed, keep, model)
        own = np.arange(len(vectors_NVD))
        tested = np.sort(np.random.default_rng(seed).permutation(len(vectors_NVD))[:TESTED])
        truth, _ = exact_photos(vectors_NVD, vectors_NVD[tested], k, own=tested)
        if kind == "flat":
            numbers, scores = _nearest(index, kind, vectors_NVD, vectors_NVD, own, k)
        else:
            numbers, scores = _near_neighbours(index, vectors_NVD, k, tested, truth, seed)
        recall = _recall(truth, numbers[tested])
    else:
        kind, recall = "exact within labels", 1.0
        numbers = np.full((len(vectors_NVD), k), -1, np.int64)
        scores = np.full((len(vectors_NVD), k), -np.inf, np.float32)
        members: dict[str, list[int]] = {}
        for photo, label in enumerate(labels):
            if label is not None:
                members.setdefault(label, []).append(photo)
        for rows in map(np.array, members.values()):
            numbers[rows], scores[rows] = exact_photos(vectors_NVD, vectors_NVD[rows], k, own=rows, among=rows)
    return Mined(numbers=numbers.astype(np.int32), scores=scores, recall=recall, kind=kind)


def _near_neighbours(
    index: Any, vectors_NVD: Float16s, k: int, tested: Ints, truth: Ints, seed: int
) -> tuple[Ints, Float32s]:
    """Ids (N, k) and scores (N, k): lists of an inexact index, made better by neighbours, at last scored exactly."""
    photos, views, dimension = vectors_NVD.shape
    flat, width = vectors_NVD.reshape(-1, dimension), min(3 * k, photos)
    directions = learn_directions(_sample(flat, LEARNT_FROM, seed))
    sketch = sketch_of(flat, directions).reshape(photos, views, -1)
    lists = np.full((photos, width), -1, np.int32)
    step = max(1, QUERIES // views)
    hits = min(width + 1, len(flat), GPU_HITS)
    for start in range(0, photos, step):
        part = slice(start, start + step)
        _, vector = search(index, vectors_NVD[part].reshape(-1, dimension), hits)
        block = np.where(vector < 0, -1, vector // views).reshape(-1, views * hits).astype(np.int32)
        block[block == np.arange(start, start + len(block))[:, None]] = -1
        lists[part] = ask_neighbours(sketch, block, keep=width, fan=0, first=start)
    found, before = _recall(truth, _scored(vectors_NVD, lists, tested, k)[0]), 0.0
    for _ in range(ROUNDS):
        if found >= ENOUGH or found - before < GAIN:
            break
        lists, before = ask_neighbours(sketch, lists, keep=width, fan=FAN), found
        found = _recall(truth, _scored(vectors_NVD, lists, tested, k)[0])
    numbers, scores = np.full((photos, k), -1, np.int64), np.full((photos, k), -np.inf, np.float32)
    for start in range(0, photos, step):
        part = slice(start, start + step)
        numbers[part], scores[part] = _scored(vectors_NVD, lists, np.arange(start, min(start + step, photos)), k)
    return numbers, scores


def _scored(vectors_NVD: Float16s, lists_NW: npt.NDArray[np.int32], rows: Ints, k: int) -> tuple[Ints, Float32s]:
    """The k best of the lists of some photos, by exact scores: ids (len(rows), k) and scores."""
    chosen = lists_NW[rows].astype(np.int64)
    row, place = np.nonzero(chosen >= 0)
    photo = chosen[row, place]
    return best_photos(row, photo, photo_scores(vectors_NVD, rows[row], vectors_NVD, photo), len(rows), k)


def search_photos(
    vectors_NVD: Float16s, queries_QVD: Float16s, k: int, *, kind: str = "auto", seed: int = 0
) -> tuple[Ints, Float32s]:
    """The k photos of the corpus most similar to each query photo: ids (Q, k), -1 for none, and scores (Q, k)."""
    index, kind = _index_of(vectors_NVD, kind, seed)
    return _nearest(index, kind, vectors_NVD, queries_QVD, np.full(len(queries_QVD), -1), k)


def _index_of(
    vectors_NVD: Float16s, kind: str, seed: int, keep: Path | None = None, model: str = ""
) -> tuple[Any, str]:
    flat = vectors_NVD.reshape(-1, vectors_NVD.shape[2])
    kind = index_kind(len(flat)) if kind == "auto" else kind
    if kind == "flat" or keep is None:
        return on_gpu(build_index(flat, kind=kind, seed=seed)), kind
    content, path = _content(flat, kind, seed), keep / f"{kind}.faiss"
    index = load_index(path, model=model, dimension=flat.shape[1], content=content)
    if index is None:
        index = build_index(flat, kind=kind, seed=seed)
        save_index(path, index, model=model, content=content)
    return on_gpu(index), kind


def _content(vectors_ND: Float16s, kind: str, seed: int) -> str:
    digest = hashlib.sha256(f"{kind} {seed} {PROBES} {TRAINING} {vectors_ND.shape}".encode())
    for start in range(0, len(vectors_ND), CHUNK):
        digest.update(np.ascontiguousarray(vectors_ND[start : start + CHUNK]).view(np.uint8).data)
    return digest.hexdigest()


def _nearest(
    index: Any, kind: str, vectors_NVD: Float16s, queries_QVD: Float16s, own_Q: Ints, k: int
) -> tuple[Ints, Float32s]:
    """Ids (Q, k) and scores (Q, k); photo `own_Q[q]` is left out of the answer to query q."""
    photos, views, _ = vectors_NVD.shape
    ids, scores = np.full((len(queries_QVD), k), -1, np.int64), np.full((len(queries_QVD), k), -np.inf, np.float32)
    # k + 1 photos have (k + 1) * views vectors: that many hits per view hold k photos beside the photo itself.
    hits = min((k + 2) * views, photos * views)
    step = max(1, QUERIES // views)
    for start in range(0, len(queries_QVD) if photos else 0, step):
        part = slice(start, start + step)
        queries, own = queries_QVD[part], own_Q[part]
        ids[part], scores[part], bound = _nearest_block(index, vectors_NVD, queries, own, k, hits)
        if kind == "flat" and hits < photos * views:
            # Hits that do not prove the answer (many equal photos) are replaced by brute force.
            unsure = start + np.flatnonzero(scores[part][:, -1] - 2 * SLACK <= bound)
            ids[unsure], scores[unsure] = exact_photos(vectors_NVD, queries_QVD[unsure], k, own=own_Q[unsure])
    return ids, scores


def _nearest_block(
    index: Any, vectors_NVD: Float16s, queries_BVD: Float16s, own_B: Ints, k: int, hits: int
) -> tuple[Ints, Float32s, Float32s]:
    """Ids (B, k), scores (B, k), and (B,) the most that a pair of views which the index did not return can score."""
    photos, views, dimension = vectors_NVD.shape
    queries = queries_BVD.reshape(-1, dimension)
    found_QH, vector_QH = search(index, queries, hits)
    bound = found_QH[:, -1].reshape(len(queries_BVD), views).max(1)
    query = np.repeat(np.arange(len(queries)), hits)
    found, vector = found_QH.ravel(), vector_QH.ravel()
    usable = (vector >= 0) & (vector // views != own_B[query // views])
    query, found, vector = query[usable], found[usable], vector[usable]
    row = query // views

    # The best hit of each (row, photo), and of each row the k-th best photo.
    pair, member = np.unique(row * photos + vector // views, return_inverse=True)
    best = np.full(len(pair), -np.inf, np.float32)
    np.maximum.at(best, member, found)
    pair_row = pair // photos
    ranked = best[np.lexsort((-best, pair_row))]
    begin = np.searchsorted(pair_row, np.arange(len(queries_BVD) + 1))
    enough = np.diff(begin) >= k
    kth = np.full(len(queries_BVD), -np.inf)
    kth[enough] = ranked[begin[:-1][enough] + k - 1]

    # Only what can be in the answer is scored exactly: photos near the k-th, and of each the pairs near its best.
    keep = (found >= best[member] - 2 * SLACK) & (best[member] >= kth[row] - 2 * SLACK)
    scores = pair_scores(queries, query[keep], vectors_NVD.reshape(-1, dimension), vector[keep])
    return *best_photos(row[keep], vector[keep] // views, scores, len(queries_BVD), k), bound


def _recall(truth: Ints, found: Ints) -> float:
    """Share of the ids of `truth` (Q, k), -1 for none, that stand in the same row of `found`."""
    wanted = int((truth >= 0).sum())
    both = sum(len(np.intersect1d(a[a >= 0], b)) for a, b in zip(truth, found, strict=True))
    return both / wanted if wanted else 1.0


def near_pairs(
    vectors_ND: Float16s, threshold: float, *, k: int = 16, limit: int = 1024, kind: str = "auto", seed: int = 0
) -> list[tuple[int, int, float]]:
    """All (i, j, score), i < j, of vectors whose inner product is at least `threshold`, in order of (i, j).

    Asks the index for k neighbours of each vector and, where the last of them is still above the threshold, for four
    times as many, up to `limit` (a corpus of equal frames would have quadratically many pairs; the `limit` found per
    frame still join them all). Exact with a flat index; with inverted lists, which are taken above 50,000 vectors, a
    pair far from either's lists can be missed. Scores of a sketch are rough, so hits are taken from further down.
    """
    count = len(vectors_ND)
    kind = kind if kind != "auto" else "flat" if count <= FLAT_UP_TO // 4 else index_kind(max(count, FLAT_UP_TO + 1))
    index = on_gpu(build_index(vectors_ND, kind=kind, seed=seed))
    slack = ROUGH if kind == "ivf-sketch" else SLACK
    pairs: list[Ints] = [np.empty((0, 2), np.int64)]
    for start in range(0, count, QUERIES):
        rows, hits = np.arange(start, min(start + QUERIES, count)), k + 1
        while len(rows):
            hits = min(hits, limit + 1, count)
            found, ids = search(index, vectors_ND[rows], hits)
            last = found[:, -1] < threshold - slack
            done = np.full(len(rows), True) if hits in (limit + 1, count) else last
            near = (found >= threshold - slack) & (ids >= 0) & (ids != rows[:, None]) & done[:, None]
            left = np.broadcast_to(rows[:, None], ids.shape)[near]
            pairs.append(np.sort(np.stack([left, ids[near]], 1), 1))
            rows, hits = rows[~done], hits * 4
    unique = np.unique(np.concatenate(pairs), axis=0)
    scores = pair_scores(vectors_ND, unique[:, 0], vectors_ND, unique[:, 1])
    return [(int(i), int(j), float(score)) for (i, j), score in zip(unique, scores, strict=True) if score >= threshold]
