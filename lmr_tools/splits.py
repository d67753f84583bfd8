"""The graph of verified pairs: scenes are its connected components, and splits share none of them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lmr_tools.schema import Split

Edge = tuple[int, int]


def components(count: int, edges: Iterable[Edge]) -> list[int]:
    """Component of each of `count` nodes, named by its smallest node."""
    parent = list(range(count))

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in edges:
        low, high = sorted((find(a), find(b)))
        parent[high] = low  # the smaller one stays, so a root is the smallest node of its tree
    return [find(node) for node in range(count)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Adjacency:
    """Edges of an undirected graph by node: those of node n stand at start[n]:start[n + 1], other end ascending.

    `strength` is that of the edge, `step` a number that turns its sign with the direction. 16 bytes an edge and
    direction, where dicts of Python numbers would take some 200.
    """

    start: npt.NDArray[np.int64]  # nodes + 1
    other: npt.NDArray[np.int32]
    strength: npt.NDArray[np.int32]
    step: npt.NDArray[np.float64]

    def near(self, node: int) -> dict[int, int]:
        """The other ends of a node's edges, ascending, with their strengths."""
        part = slice(self.start[node], self.start[node + 1])
        return dict(zip(self.other[part].tolist(), self.strength[part].tolist(), strict=True))

    def step_of(self, a: int, b: int) -> float:
        """The step from a to b, which must have an edge."""
        first = self.start[a]
        return float(self.step[first + np.searchsorted(self.other[first : self.start[a + 1]], b)])


def adjacency(
    count: int,
    a: npt.NDArray[np.integer[Any]],
    b: npt.NDArray[np.integer[Any]],
    strength: npt.NDArray[np.integer[Any]],
    step: npt.NDArray[np.floating[Any]],
) -> Adjacency:
    """The edges a[i] - b[i] of `count` nodes, each unordered pair once; `step` goes from a to b."""
    node, other = np.r_[a, b].astype(np.int32), np.r_[b, a].astype(np.int32)
    order = np.lexsort((other, node))
    return Adjacency(
        start=np.searchsorted(node[order], np.arange(count + 1)),
        other=other[order],
        strength=np.r_[strength, strength].astype(np.int32)[order],
        step=np.r_[step, -step].astype(np.float64)[order],
    )


def two_steps(graph: Adjacency, node: int, limit: int) -> list[tuple[int, int]]:
    """Nodes two edges away from `node`: [(other, node between)], strongest chains first, at most `limit`.

    A chain is as strong as its weaker edge. Nodes that have an edge with `node` are left out.
    """
    near = graph.near(node)
    best: dict[int, tuple[int, int]] = {}
    for middle, first in near.items():
        for other, second in graph.near(middle).items():
            if other == node or other in near:
                continue
            chain = (min(first, second), -middle)
            if other not in best or chain > best[other]:
                best[other] = chain
    order = sorted(best, key=lambda other: (-best[other][0], other))[:limit]
    return [(other, -best[other][1]) for other in order]


def assign_splits(
    groups_per_scene: Mapping[str, int], *, val_share: float, test_share: float, seed: int
) -> dict[str, Split]:
    """Give whole scenes to test, then val, then train, so that test and val hold about their share of the groups.

    Scenes are taken in an order drawn from the seed and their names. A scene that would push a split past one and a
    half times its share is passed over; if that leaves a wanted split empty and at least three scenes exist, it gets
    the smallest scene.
    """
    total = sum(groups_per_scene.values())
    order = sorted(groups_per_scene, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    split = dict.fromkeys(order, Split.TRAIN)
    for wanted, share in ((Split.TEST, test_share), (Split.VAL, val_share)):
        quota, held = share * total, 0
        if not quota:
            continue
        for name in order:
            size = groups_per_scene[name]
            if held < quota and split[name] == Split.TRAIN and size > 0 and held + size <= 1.5 * quota:
                split[name] = wanted
                held += size
        training = [name for name in order if split[name] == Split.TRAIN and groups_per_scene[name]]
        if not held and len(order) >= 3 and len(training) >= 2:
            split[min(training, key=lambda name: (groups_per_scene[name], order.index(name)))] = wanted
    return split


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """Names in an order drawn from the seed; adding a name leaves the order of the others as it is."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
