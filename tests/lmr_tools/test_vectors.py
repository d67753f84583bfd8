"""Vectors of a corpus: the same from memory and from a file, rows kept in place, the table in parts."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks.scale import _photo
from lmr_tools import vectors
from lmr_tools.tables import read_table, write_tables


def test_rows_are_kept_in_place_and_in_order() -> None:
    random = np.random.default_rng(0)
    full = random.normal(size=(2000, 2, 3)).astype(np.float16)
    rows = np.flatnonzero(random.random(2000) < 0.6).tolist()
    want = full[rows].copy()
    kept = vectors.keep_rows(full, rows)
    np.testing.assert_array_equal(kept, want)
    assert np.shares_memory(kept, full)


def test_many_vectors_lie_in_a_file_that_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vectors, "IN_MEMORY", 100)
    made = vectors._zeros(tmp_path / "work", (7, 2, 5))
    assert isinstance(made, np.memmap)
    assert not made.any()
    made[3] = 1
    assert made[3].sum() == 10
    assert list((tmp_path / "work").iterdir()) == []


def test_the_table_in_parts_is_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [_photo(number) for number in range(25)]
    values = np.random.default_rng(1).normal(size=(25, 7, 4)).astype(np.float16)
    monkeypatch.setattr(vectors, "ROW_GROUP", 70)
    parts = list(vectors.embedding_tables(rows, values))
    assert [part.num_rows for part in parts] == [70, 70, 35]
    assert write_tables(tmp_path / "e.parquet", iter(parts)) == 175
    table = read_table(tmp_path / "e.parquet")
    assert table.equals(pa.concat_tables(parts))
    assert table["image_id"].to_pylist() == [row.image_id for row in rows for _ in range(7)]
    flat = table["vector"].combine_chunks().flatten()
    np.testing.assert_array_equal(np.asarray(flat).reshape(25, 7, 4), values)
