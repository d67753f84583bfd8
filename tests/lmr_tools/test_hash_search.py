"""Close hashes against comparing all with all."""

import numpy as np
import pytest

from lmr_tools import hash_search
from lmr_tools.hash_search import close_hashes


def flipped(value: str, bits: int, random: np.random.Generator) -> str:
    number = int(value, 16)
    for place in random.choice(256, bits, replace=False):
        number ^= 1 << int(place)
    return f"{number:064x}"


@pytest.mark.parametrize("max_bits", [0, 3, 12, 31, 60])
def test_it_finds_what_comparing_all_with_all_finds(max_bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_search, "PART", 50)  # many parts
    random = np.random.default_rng(max_bits)
    a = [random.bytes(32).hex() for _ in range(60)]
    b = [random.bytes(32).hex() for _ in range(40)]
    b += [flipped(value, max(0, max_bits + shift), random) for value in a[:20] for shift in (-1, 0, 1)]
    b += [a[3], a[3], a[4]]
    a.append(a[4])
    expected = [
        (i, j, bits)
        for i, x in enumerate(a)
        for j, y in enumerate(b)
        if (bits := (int(x, 16) ^ int(y, 16)).bit_count()) <= max_bits
    ]
    assert list(close_hashes(a, b, max_bits)) == expected
    assert len(expected) > 3


def test_nothing_is_close_to_nothing() -> None:
    assert list(close_hashes([], ["0" * 64], 12)) == []
    assert list(close_hashes(["0" * 64], [], 12)) == []
