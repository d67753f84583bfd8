"""Perceptual hashes that nearly agree, found without comparing all with all.

Two 256-bit hashes that differ in at most k bits agree wholly in one of k + 1 bands, so only photos that share a band
are compared.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

BITS = 256
MOST_BANDS = 32  # more, and bands are so short that everything shares one: all are compared then
PART = 2**22  # comparisons at a time
ONES = np.array([value.bit_count() for value in range(256)], np.uint8)


def close_hashes(a: Sequence[str], b: Sequence[str], max_bits: int) -> Iterator[tuple[int, int, int]]:
    """(number in `a`, number in `b`, differing bits) of every pair of hashes (64 hex digits) at most `max_bits` apart.

    Each pair once, ordered by the first number, then the second.
    """
    if not len(a) or not len(b):
        return
    packed_a, packed_b = _packed(a), _packed(b)
    found = [np.zeros((0, 3), np.int64)]
    if max_bits + 1 > MOST_BANDS:
        step = max(1, PART // len(b))
        for start in range(0, len(a), step):
            rows = np.arange(start, min(start + step, len(a)))
            found.append(
                _compared(packed_a, packed_b, np.repeat(rows, len(b)), np.tile(np.arange(len(b)), len(rows)), max_bits)
            )
    else:
        bits_a, bits_b = np.unpackbits(packed_a, axis=1), np.unpackbits(packed_b, axis=1)
        edges = np.linspace(0, BITS, max(max_bits + 1, 4) + 1).astype(int)  # a band is at most 64 bits
        for low, high in itertools.pairwise(edges.tolist()):
            for rows, others in _sharing(_keys(bits_a[:, low:high]), _keys(bits_b[:, low:high])):
                found.append(_compared(packed_a, packed_b, rows, others, max_bits))
    yield from map(tuple, np.unique(np.concatenate(found), axis=0).tolist())


def _packed(hashes: Sequence[str]) -> npt.NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex("".join(hashes)), np.uint8).reshape(len(hashes), BITS // 8)


def _keys(bits: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """One number per row of at most 64 bits."""
    packed = np.zeros((len(bits), 8), np.uint8)
    packed[:, : -(-bits.shape[1] // 8)] = np.packbits(bits, axis=1)
    return packed.view(np.uint64).ravel()


def _sharing(
    a: npt.NDArray[np.uint64], b: npt.NDArray[np.uint64]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """(numbers in a, numbers in b) of all pairs with equal keys, at most about PART at a time."""
    names, codes = np.unique(np.concatenate([a, b]), return_inverse=True)
    codes_a, codes_b = codes[: len(a)], codes[len(a) :]
    order = np.argsort(codes_b, kind="stable")
    starts = np.searchsorted(codes_b[order], np.arange(len(names) + 1))
    first, count = starts[codes_a], starts[codes_a + 1] - starts[codes_a]
    begin, total = 0, np.cumsum(count)
    while begin < len(a):
        done = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, done + PART, side="right")))
        own = count[begin:end]
        rows = np.repeat(np.arange(begin, end), own)
        inside = np.arange(own.sum()) - np.repeat(np.cumsum(own) - own, own)
        yield rows, order[np.repeat(first[begin:end], own) + inside]
        begin = end


def _compared(
    a: npt.NDArray[np.uint8],
    b: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.int64],
    others: npt.NDArray[np.int64],
    max_bits: int,
) -> npt.NDArray[np.int64]:
    bits = ONES[a[rows] ^ b[others]].sum(axis=1, dtype=np.int64)
    near = bits <= max_bits
    return np.column_stack([rows[near], others[near], bits[near]])
