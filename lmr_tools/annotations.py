"""The published annotation of LMR: CSV lines -> what they ask for, or why they can not be used.

Two layouts, told apart by the header: 13 columns `target,H,M1,M2,L1,L2,p0..p5,scene` (one group a line), and 6 columns
`target,reference,scene,sim,pA,pB` (one pair a line, with all its matched centres). Points are Python literals; they are
read by a pattern, nothing is evaluated.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmr_tools.schema import LmrError

SLOTS = ("H", "M1", "M2", "L1", "L2")
GROUP_COLUMNS = ("target", *SLOTS, "p0", "p1", "p2", "p3", "p4", "p5", "scene")
PAIR_COLUMNS = ("target", "reference", "scene", "sim", "pA", "pB")
TIERS = ("H", "M", "L")
# Scenes of the published test set.
TEST_SCENES = (
    *("0000", "0003", "0004", "0008", "0013", "0017", "0019", "0021", "0024", "0032"),
    *("0048", "0050", "0063", "0078", "0380", "1589", "5009", "5010", "5012"),
)
NUMBER = r"\s*([+-]?[0-9]{1,7}(?:\.[0-9]{0,15})?)\s*"
POINT = re.compile(rf"[(\[]{NUMBER},{NUMBER},?\s*[)\]]")
NAME = re.compile(r"[^/\\\x00-\x1f]{1,255}")
MAX_FIELD = 8 * 2**20

Point = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """One line: a target, its references by slot, and the centres of their crops (x, y), target's first.

    A pair's line offers several sets of centres, any of which makes a group; a group's line offers one.
    """

    line: int
    scene: str
    target: str
    references: tuple[tuple[str, str], ...]  # slot, file name
    centres: tuple[tuple[Point, ...], ...]


@dataclass(frozen=True, kw_only=True)
class BadLine:
    """A line that can not be used, with a short reason and what was seen."""

    line: int
    reason: str
    detail: str


def read_annotation(path: Path) -> tuple[str, list[Annotation | BadLine]]:
    """(layout: groups | pairs, all lines in order). LmrError when the file or its header is not such an annotation."""
    try:
        file = path.open(encoding="utf-8-sig", newline="")
    except OSError as error:
        raise LmrError(f"{path}: can not be read ({error.strerror})") from None
    limit = csv.field_size_limit(MAX_FIELD)
    try:
        with file:
            return _read(path, csv.reader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise LmrError(f"{path}: not a CSV file ({error})") from None
    finally:
        csv.field_size_limit(limit)


def _read(path: Path, lines: Iterator[list[str]]) -> tuple[str, list[Annotation | BadLine]]:
    header = [name.strip() for name in next(lines, [])]
    index = 1 if header[:1] == [""] else 0  # pandas writes its row number into a column without a name
    columns = header[index:]
    layouts = {tuple(sorted(GROUP_COLUMNS)): ("groups", _group), tuple(sorted(PAIR_COLUMNS)): ("pairs", _pair)}
    layout, parse = layouts.get(tuple(sorted(columns)), ("", _group))
    if not layout:
        raise LmrError(
            f"{path}: its columns are {', '.join(columns)[:200] or 'none'}; the published annotation has "
            f"{','.join(GROUP_COLUMNS)}, or {','.join(PAIR_COLUMNS)} for single references"
        )
    found: list[Annotation | BadLine] = []
    for number, fields in enumerate(lines, 2):
        if not fields:
            continue
        if len(fields) != len(header):
            found.append(
                BadLine(line=number, reason="bad line", detail=f"{len(fields)} fields, the header has {len(header)}")
            )
            continue
        values = {name: value.strip() for name, value in zip(columns, fields[index:], strict=True)}
        try:
            found.append(parse(number, values))
        except ValueError as error:
            found.append(BadLine(line=number, reason="bad line", detail=str(error)))
    return layout, found


def _group(line: int, values: Mapping[str, str]) -> Annotation:
    centres = tuple(_one(f"p{number}", values[f"p{number}"]) for number in range(6))
    references = tuple((slot, _name(slot, values[slot])) for slot in SLOTS)
    return Annotation(
        line=line,
        scene=_name("scene", values["scene"]),
        target=_name("target", values["target"]),
        references=references,
        centres=(centres,),
    )


def _pair(line: int, values: Mapping[str, str]) -> Annotation:
    if values["sim"] not in TIERS:
        raise ValueError(f"sim is {values['sim'][:40]!r}, not H, M or L")
    own, other = points(values["pA"]), points(values["pB"])
    if len(own) != len(other):
        raise ValueError(f"pA has {len(own)} points, pB {len(other)}")
    return Annotation(
        line=line,
        scene=_name("scene", values["scene"]),
        target=_name("target", values["target"]),
        references=((values["sim"], _name("reference", values["reference"])),),
        centres=tuple(zip(own, other, strict=True)),
    )


def _name(column: str, text: str) -> str:
    """A file or folder name; a path, or `..`, could lead out of the folder of photos."""
    if not NAME.fullmatch(text) or text in (".", ".."):
        raise ValueError(f"{column} is {text[:80]!r}, not a plain name")
    return text


def _one(column: str, text: str) -> Point:
    found = points(text)
    if len(found) != 1:
        raise ValueError(f"{column} is {text[:40]!r}, not one point (x, y)")
    return found[0]


def points(text: str) -> Sequence[Point]:
    """Whole-pixel points of a literal: `(x, y)`, or a list of such. ValueError for anything else."""
    matches = [(match.start(), match.end(), match) for match in POINT.finditer(text)]
    ends, starts = [0, *(end for _, end, _ in matches)], [*(start for start, _, _ in matches), len(text)]
    between = "".join(text[end:start] for end, start in zip(ends, starts, strict=True))
    if not matches or not re.fullmatch(r"\s*|\s*[\[(][\s,]*[\])]\s*", between):
        raise ValueError(f"{text[:40]!r} is not a point (x, y) or a list of them")
    return [(math.floor(float(m[1]) + 0.5), math.floor(float(m[2]) + 0.5)) for _, _, m in matches]
