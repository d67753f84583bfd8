"""How importing and merging grow, on generated rows: `python -m benchmarks.growing`.

Two parts that look at every row, at 10^3 to 10^5 rows (the published annotation has 112,142 lines):
`import` reads a generated annotation of the 13-column layout and plans its groups, without photos; `near copies` finds
the hashes of one set within 12 of 256 bits of another set's, of which one in ten has a planted copy; the share found is
counted. `slope` is that of log time over log rows between the two largest sizes. The last line is JSON.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.machine import hardware
from lmr_tools.annotations import GROUP_COLUMNS, SLOTS, Annotation, read_annotation
from lmr_tools.hash_search import close_hashes
from lmr_tools.importing import Photo, place_groups
from lmr_tools.schema import ImageRow

SIZES = (1_000, 10_000, 112_142)
PER_SCENE = 400  # photos
MAX_BITS = 12


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true", help="Print the JSON line alone.")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    arguments = parser.parse_args()
    results: dict[str, object] = {"machine": hardware()}
    for name, measure in (("import", import_lines), ("near copies", near_copies)):
        rows = [measure(size) for size in arguments.sizes]
        for row in rows if not arguments.json else []:
            print(f"{name:<12} {row['rows']:>8.0f} rows {row['seconds']:8.2f} s  {row['found']:.4f} found")
        slope = None
        if len(rows) > 1:
            a, b = rows[-2:]
            slope = math.log(b["seconds"] / a["seconds"]) / math.log(b["rows"] / a["rows"])
        results[name] = {"rows": rows, "slope": slope}
    print(json.dumps(results))


def import_lines(count: int) -> dict[str, float]:
    """Read and plan `count` lines; `found` is the share that makes a group: all of them can."""
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotation.csv"
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(GROUP_COLUMNS)
            for line in range(count):
                chosen = random.choice(PER_SCENE, 6, replace=False)
                points = [f"({x}, {y})" for x, y in random.integers(150, 600, (6, 2)).tolist()]
                writer.writerow([*(f"{n}.jpg" for n in chosen), *points, f"{line // 1000 + 6000:04d}"])
        start = time.process_time()
        _, lines = read_annotation(path)
    photos = {
        f"{line.scene}/{name}": _photo(f"{line.scene}/{name}")
        for line in lines
        if isinstance(line, Annotation)
        for name in (line.target, *(name for _, name in line.references))
    }
    made = place_groups(lines, photos, name="a.csv", size=300, per_line=1, test_scenes=())
    seconds = time.process_time() - start
    tiers = {reference.slot for group in made.groups for reference in group.plan.references}
    assert tiers == set(SLOTS)
    # Two lines may give one pair two tiers: such a line is rejected, as in life.
    return {"rows": count, "seconds": seconds, "found": len(made.groups) / count}


def _photo(path: str) -> Photo:
    name = path.replace("/", "-").removesuffix(".jpg")
    row = ImageRow(
        image_id=name, path=path, width=800, height=800, sha256=name, scene=path[:4], status="unused", source=0,
        offset=None, bytes=1, phash="", sharpness=100.0, texture=1.0, no_target=None,
    )  # fmt: skip
    return Photo(row=row, orientation=1)


def near_copies(count: int) -> dict[str, float]:
    """Compare `count` hashes with `count` others; `found` is the share of the planted copies that was found."""
    random = np.random.default_rng(1)
    own = random.bytes(32 * count)
    other = bytearray(random.bytes(32 * count))
    planted = range(0, count, 10)
    for number in planted:
        value = int.from_bytes(own[32 * number : 32 * number + 32], "big")
        for place in random.choice(256, int(random.integers(0, MAX_BITS + 1)), replace=False).tolist():
            value ^= 1 << place
        other[32 * number : 32 * number + 32] = value.to_bytes(32, "big")
    first, second = ([data[32 * n : 32 * n + 32].hex() for n in range(count)] for data in (own, bytes(other)))
    start = time.process_time()
    pairs = {(a, b) for a, b, _ in close_hashes(first, second, MAX_BITS)}
    seconds = time.process_time() - start
    return {"rows": count, "seconds": seconds, "found": sum((n, n) in pairs for n in planted) / len(planted)}


if __name__ == "__main__":
    main()
