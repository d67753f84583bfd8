"""Files are whole or not there; rows come back as they went in; a foreign table is refused."""

import errno
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lmr_tools.schema import LmrError, RejectRow, arrow_schema
from lmr_tools.tables import append_piece, atomic_path, read_pieces, read_rows, write_rows


def rows(count: int) -> list[RejectRow]:
    return [RejectRow(image_id=f"{n}", path=f"p/{n}", stage="scan", reason="r", detail="ü") for n in range(count)]


def test_rows_come_back_and_equal_rows_give_equal_bytes(tmp_path: Path) -> None:
    assert write_rows(tmp_path / "a.parquet", iter(rows(70_000)), RejectRow) == 70_000
    write_rows(tmp_path / "b.parquet", rows(70_000), RejectRow)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert read_rows(tmp_path / "a.parquet", RejectRow) == rows(70_000)


def test_an_empty_table_keeps_its_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "t.parquet", [], RejectRow)
    assert pq.read_schema(tmp_path / "t.parquet").equals(arrow_schema(RejectRow))
    assert read_rows(tmp_path / "t.parquet", RejectRow) == []


def test_a_failure_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_rows(path, rows(2), RejectRow)
    before = path.read_bytes()

    def breaking():
        yield from rows(1)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_rows(path, breaking(), RejectRow)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    with pytest.raises(OSError, match=r"rows\.parquet") as error, atomic_path(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert error.value.filename == str(path)


def test_damage_and_foreign_tables_are_named(tmp_path: Path) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Other:
        image_id: str

    path = tmp_path / "t.parquet"
    write_rows(path, [Other(image_id="a")], Other)
    with pytest.raises(LmrError, match=r"t\.parquet: column path is missing"):
        read_rows(path, RejectRow)
    write_rows(path, rows(1000), RejectRow)
    data = bytearray(path.read_bytes())
    data[60] ^= 255
    path.write_bytes(bytes(data))
    with pytest.raises(LmrError, match=r"t\.parquet: not a readable Parquet table"):
        read_rows(path, RejectRow)
    with pytest.raises(LmrError, match="no such table"):
        read_rows(tmp_path / "none.parquet", RejectRow)


def test_a_damaged_piece_names_the_way_out(tmp_path: Path) -> None:
    append_piece(tmp_path, rows(2), RejectRow)
    (piece,) = tmp_path.iterdir()
    piece.write_bytes(piece.read_bytes()[:100])
    with pytest.raises(LmrError, match=r"000000.parquet: .*; delete this file and run the command again"):
        list(read_pieces(tmp_path, RejectRow))


def test_pieces_only_grow(tmp_path: Path) -> None:
    append_piece(tmp_path, rows(2), RejectRow)
    append_piece(tmp_path, rows(3), RejectRow)
    assert list(read_pieces(tmp_path, RejectRow)) == rows(2) + rows(3)
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "000002.parquet"):
        raise RuntimeError
    assert len(list(tmp_path.iterdir())) == 2
