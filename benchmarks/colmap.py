"""How far tiers from matches (the default) and from a reconstruction (`--geometry colmap`) agree on the same photos.

    python -m benchmarks.colmap --data SCENES --scenes llff_fern olsson_fountain [--models FOLDER] [--json]

SCENES holds one folder per scene. Each named scene is reconstructed by pycolmap (`pip install pycolmap`) with its own
features, then every pair is measured both ways by this toolkit: overlap, log2 of the scale, tier. Errors are over
directed pairs that both believe; photos that COLMAP could not place are counted. `--models` keeps the reconstructions.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.machine import hardware
from lmr_tools.features import extract_features
from lmr_tools.geometry import PairGeometry, match_pair
from lmr_tools.images import decode
from lmr_tools.observations import Observations, match_observed, name_photos, observe
from lmr_tools.reconstruction import read_models
from lmr_tools.schema import ImageRow
from lmr_tools.tiers import TierRule, grade

if TYPE_CHECKING:
    from lmr_tools.schema import Image


@dataclass(frozen=True, kw_only=True)
class Directed:
    """One target and reference, measured from matches and from points; tiers H, M, L or - for not believed."""

    tiers: tuple[str, str]
    overlaps: tuple[float, float]
    scales_log2: tuple[float, float]


def main() -> None:
    """Reconstruct, measure both ways, print; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of scene folders")
    parser.add_argument("--scenes", nargs="+", required=True, help="names of scene folders")
    parser.add_argument("--models", type=Path, help="keep the models here, and take what is there")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    arguments = parser.parse_args()
    pairs: list[Directed] = []
    scenes: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for scene in arguments.scenes:
            photos, model = arguments.data / scene, (arguments.models or Path(scratch)) / scene
            start = time.perf_counter()
            if not model.is_dir():
                _reconstruct(photos, model)
            seconds = time.perf_counter() - start
            placed, own = _measure(photos, model)
            pairs += own
            scenes[scene] = {"placed": placed, "reconstruction_s": round(seconds, 1), **_compare(own)}
            if not arguments.json:
                print(f"{scene:<22} {scenes[scene]}", flush=True)
    print(json.dumps({"benchmark": "colmap", **hardware(), "scenes": scenes, "all": _compare(pairs)}))


def _reconstruct(photos: Path, model: Path) -> None:
    try:
        import pycolmap
    except ImportError:
        sys.exit("benchmarks.colmap: pycolmap is not installed; run `pip install pycolmap`")
    pycolmap.set_random_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        database, made = Path(scratch) / "database.db", Path(scratch) / "sparse"
        made.mkdir()
        pycolmap.extract_features(database, photos)
        pycolmap.match_exhaustive(database)
        if not pycolmap.incremental_mapping(database, photos, made):
            sys.exit(f"benchmarks.colmap: COLMAP could not reconstruct {photos}")
        largest = max(made.iterdir(), key=lambda folder: (folder / "images.bin").stat().st_size)
        model.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(largest, model)


def _measure(photos: Path, model: Path) -> tuple[str, list[Directed]]:
    """Photos placed of all, and both measures of every directed pair of placed photos."""
    rule, images = TierRule(), {path.name: decode(path.read_bytes()) for path in sorted(photos.iterdir())}
    named = name_photos(read_models([model]), {name: name for name in images})
    seen = {n: observe(0, named[n][1], _row(n, images[n]), 1) for n in named}
    points: dict[str, Observations] = {n: value for n, value in seen.items() if value is not None}
    features = {n: extract_features(images[n]) for n in points}
    pairs = []
    for a, b in itertools.combinations(sorted(points), 2):
        matched, observed = match_pair(features[a], features[b]), match_observed(points[a], points[b])
        for turned in (False, True):
            two, three = (g.flipped() if turned else g for g in (matched, observed))
            pairs.append(
                Directed(
                    tiers=(_tier(two, rule), _tier(three, rule)),
                    overlaps=(two.overlap_a, three.overlap_a),
                    scales_log2=(two.scale_log2, three.scale_log2),
                )
            )
    return f"{len(points)}/{len(images)}", pairs


def _row(name: str, image: Image) -> ImageRow:
    height, width = image.shape[:2]
    return ImageRow(
        image_id=name, path=name, width=width, height=height, sha256=name, scene=None, status="unused", source=0,
        offset=None, bytes=1, phash="", sharpness=100.0, texture=1.0, no_target=None,
    )  # fmt: skip


def _tier(pair: PairGeometry, rule: TierRule) -> str:
    tier, _ = grade(pair.overlap_a, pair.scale_ratio, pair.consistent, pair.inliers, None, rule)
    return "-" if tier is None else str(tier)


def _compare(pairs: list[Directed]) -> dict[str, Any]:
    tiers = Counter(f"{matched}{observed}" for matched, observed in (pair.tiers for pair in pairs))
    both = [pair for pair in pairs if "-" not in pair.tiers]
    found: dict[str, Any] = {"directed_pairs": len(pairs), "both": len(both)}
    found["only_matches"] = sum(pair.tiers[1] == "-" != pair.tiers[0] for pair in pairs)
    found["only_points"] = sum(pair.tiers[0] == "-" != pair.tiers[1] for pair in pairs)
    if both:
        overlap, scale = (np.array([getattr(p, name) for p in both]) for name in ("overlaps", "scales_log2"))
        found["overlap_error"] = round(float(np.abs(overlap[:, 0] - overlap[:, 1]).mean()), 4)
        found["overlap_bias"] = round(float((overlap[:, 0] - overlap[:, 1]).mean()), 4)
        found["overlap_r"] = round(float(np.corrcoef(overlap.T)[0, 1]), 3)
        found["scale_error_octaves"] = round(float(np.abs(scale[:, 0] - scale[:, 1]).mean()), 4)
        found["same_tier"] = round(sum(pair.tiers[0] == pair.tiers[1] for pair in both) / len(both), 4)
        high = [pair for pair in both if pair.tiers[0] == "H"]
        found["H_of_matches_is_H_of_points"] = f"{sum(pair.tiers[1] == 'H' for pair in high)}/{len(high)}"
    return found | {"tiers_matches_points": dict(sorted(tiers.items()))}


if __name__ == "__main__":
    main()
