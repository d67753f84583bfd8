"""A whole picture through MRefSR against the published way, in one run: `python -m benchmarks.inference`.

The full `mrefsr` preset with RANDOM weights on an LR of --size pixels a side and references of the enlarged size: time
and memory do not depend on what the weights are. The published way (`benchmarks.published_mrefsr`) and ours each run in
a process of their own, one after the other, --pairs times; ratios are taken inside a pair. Seconds are CPU seconds of
the process (wall seconds on a GPU), each counted in the innermost part only. Memory is the peak during the run, all of
the process and what the run adds; a small picture has gone before it, which compiles. Both images are compared as
floats, before they are rounded; where two reference patches fit equally well to float rounding, the ways may choose
differently, so the share of such patches is told, and the difference with the published way's choices given to ours.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import published_mrefsr
from benchmarks.machine import hardware
from lmr_tools.images import downscale, upscale
from mrefsr import fusion, infer, model, network, tiling
from mrefsr.config import MODEL_PRESETS
from mrefsr.model import MRefSR

MODEL: Any = model  # whose `match_batch` is watched
WAYS = ("published", "ours")
PARTS = {
    "extractor": "matching features, VGG16",
    "matching": "patch matching",
    "transfer features": "VGG19",
    "offsets": "restoration: offsets and masks",
    "deformable convolution": "restoration: deformable convolution",
    "fusion": "restoration: attention and filtering",
    "blocks": "restoration: residual blocks, enlarging",
    "rest": "pictures, copies",
}
RESTORATION = ("offsets", "deformable convolution", "fusion", "blocks")


class Clock:
    """Seconds by part; a part inside another is taken out of the outer one."""

    def __init__(self, device: str) -> None:
        self.parts: dict[str, float] = dict.fromkeys(PARTS, 0.0)
        self._device, self._open, self._last = device, ["rest"], 0.0

    def now(self) -> float:
        if self._device == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def reset(self) -> None:
        self.parts = dict.fromkeys(PARTS, 0.0)
        self._last = self.now()

    def _charge(self) -> None:
        now = self.now()
        self.parts[self._open[-1]] += now - self._last
        self._last = now

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self._charge()
        self._open.append(part)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Charge every call of `owner.name` to `part`."""
        plain: Callable[..., Any] = getattr(owner, name)

        def call(*given: Any, **named: Any) -> Any:
            with self(part):
                return plain(*given, **named)

        setattr(owner, name, call)

    def watch_steps(self, owner: Any, name: str, part: str) -> None:
        """The same for a generator: what it does between two items."""
        plain: Callable[..., Iterator[Any]] = getattr(owner, name)

        def steps(*given: Any, **named: Any) -> Iterator[Any]:
            items = plain(*given, **named)
            while True:
                with self(part):
                    item = next(items, None)
                if item is None:
                    return
                yield item
                del item

        setattr(owner, name, steps)


def random_model(seed: int) -> MRefSR:
    """The full preset with random weights, scaled so that activations neither vanish nor grow."""
    built = MRefSR(MODEL_PRESETS["mrefsr"])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in built.named_parameters():
            if value.ndim > 1:
                vgg = name.startswith(("extractor", "transfer"))
                gain = 2**0.5 if vgg else 4.0 if "conv_emb" in name else 0.3 if ".conv2." in name else 1.0
                value.normal_(0, gain / value[0].numel() ** 0.5, generator=generator)
            elif value.shape == (1,):
                value.fill_(0.25)
            else:
                value.normal_(0, 0.05, generator=generator)
    return built.eval()


def pictures(size: int, references: int) -> tuple[Any, list[Any]]:
    """Seeded uint8 LR and references: one texture, shifted, turned brighter or darker, and noisy."""
    random = np.random.default_rng(size)
    side = 4 * size + 64
    texture = np.zeros((side, side, 3))
    for step in (2, 5, 11, 29):
        coarse = torch.from_numpy(random.random((1, 3, side // step + 2, side // step + 2)))
        fine = torch.nn.functional.interpolate(coarse, (side, side), mode="bicubic", align_corners=False)
        texture += fine[0].permute(1, 2, 0).numpy()
    texture = (texture - texture.min()) / (texture.max() - texture.min())

    def view(top: int, left: int, gain: float, noise: float) -> Any:
        part = texture[top : top + 4 * size, left : left + 4 * size] * gain
        part = part + noise * random.standard_normal(part.shape)
        return (np.clip(part, 0, 1) * 255).round().astype(np.uint8)

    shifts = random.integers(0, 64, (references, 2))
    refs = [view(int(y), int(x), 1 - 0.05 * n, 0.01 + 0.01 * n) for n, (y, x) in enumerate(shifts)]
    return downscale(view(32, 32, 1, 0)), refs


def watch_ours(clock: Clock, built: MRefSR, caught: list[Tensor], matches: list[Tensor]) -> None:
    """Time the parts of `mrefsr.infer`, and keep the matches, and the image before it is rounded."""
    match = MODEL.match_batch

    def keep_matches(*given: Any, **named: Any) -> Any:
        found = match(*given, **named)
        matches.append(found[0][0, 0])
        return found

    MODEL.match_batch = keep_matches
    for copy in (built.extractor.feature_extraction_image1, built.extractor.feature_extraction_image2):
        clock.watch(copy, "forward", "extractor")
    clock.watch(model, "match_batch", "matching")
    clock.watch(built.transfer, "transfer", "transfer features")
    clock.watch(built.transfer, "relu1_1", "transfer features")
    clock.watch(network, "deform_conv2d", "deformable convolution")
    clock.watch_steps(network.DynamicRestoration, "_gather", "offsets")
    clock.watch(fusion.MultiReferenceFusion, "forward", "fusion")
    clock.watch(network.DynamicRestoration, "forward", "blocks")
    clock.watch(built.network.content_extractor, "forward", "blocks")
    plain = infer._to_picture

    def keep(image: Tensor) -> Any:
        caught.append(image)
        return plain(image)

    infer._to_picture = keep


def run_way(way: str, size: int, references: int, device: str, tile: str, dtype: str, out: Path) -> dict[str, Any]:
    """One way in this process; the image and the matches go to `out` (.npz).

    Beside them ours writes what it makes of the published way's matches, where those lie there already.
    """
    built = random_model(0).to(device)
    config = built.config
    clock = Clock(device)
    caught: list[Tensor] = []
    matches: list[Tensor] = []
    state: dict[str, Tensor] = {}
    if way == "ours":
        watch_ours(clock, built, caught, matches)
    else:
        state = {name: value.contiguous() for name, value in built.state_dict().items()}
        built.to("meta")

    def once(lr: Any, refs: list[Any]) -> Tensor:
        if way == "ours":
            infer.super_resolve(built, lr, refs, tile=None if tile == "none" else int(tile), dtype=infer.DTYPES[dtype])
            return caught.pop()

        def tensor(picture: Any) -> Tensor:
            return torch.tensor(picture).to(device).permute(2, 0, 1)[None].float().div_(255).contiguous()

        enlarged = tensor(upscale(lr))
        with torch.no_grad():
            return published_mrefsr.super_resolve(
                state, config, tensor(lr), enlarged, list(map(tensor, refs)), clock, matches
            )

    once(*pictures(12, references))
    matches.clear()
    lr, refs = pictures(size, references)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
        before = _resident_mb("VmRSS")
    clock.reset()
    wall, start = time.perf_counter(), clock.now()
    image = once(lr, refs)
    seconds, wall = clock.now() - start, time.perf_counter() - wall
    with clock("rest"):
        pass  # charge what is left
    peak = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else _resident_mb("VmHWM")
    saved: dict[str, Any] = {"image": image[0].cpu().numpy(), "matches": torch.stack(matches).cpu().numpy()}
    found = {"seconds": seconds, "wall": wall, "peak_mb": peak, "extra_mb": peak - before, "parts": dict(clock.parts)}
    published = out.with_name(f"{WAYS[0]}.npz")
    if way == "ours" and published.is_file():
        with np.load(published) as theirs:
            given = iter(torch.from_numpy(theirs["matches"]).to(device))

        def match_as_they(features: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
            return next(given)[None, None], features

        MODEL.match_batch = match_as_they
        saved["same_matches"] = once(lr, refs)[0].cpu().numpy()
    np.savez(out, **saved)
    if way == "ours":
        width = infer.DTYPES[dtype].itemsize
        per_pixel = tiling.bytes_per_pixel(config, references, width)
        kept = tiling.kept_bytes(config, (size, size), [(4 * size, 4 * size)] * references, width)
        plan = tiling.fixed_tiles(config, size, size, None if tile == "none" else int(tile), per_pixel)
        largest = (max((w.seen[1] - w.seen[0]) * (w.seen[3] - w.seen[2]) for w in windows) for windows in plan)
        found["estimate_mb"] = (kept + max(a * b for a, b in zip(largest, per_pixel, strict=True))) / 2**20
    return found


def _resident_mb(field: str) -> float:
    """`VmRSS` or `VmHWM` (its peak) of this process in MB; Linux only."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field))) / 1024


def in_child(way: str, args: argparse.Namespace, out: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.inference", "--way", way, "--out", str(out)]
    for name in ("size", "references", "device", "threads", "tile", "dtype"):
        command += [f"--{name}", str(getattr(args, name))]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def compare(ours: Path, published: Path) -> dict[str, float]:
    """How far the two float images are apart, in grey levels of 255, and the share of values beyond a tenth of one."""
    with np.load(ours) as a, np.load(published) as b:
        image = b["image"].astype(np.float64)
        levels = np.abs(a["image"] - image) * 255
        return {
            "largest_levels": float(levels.max()),
            "share_beyond_a_tenth": float((levels > 0.1).mean()),
            "spread_of_image": float(image.std()),
            "share_of_matches_that_differ": float((a["matches"] != b["matches"]).mean()),
            "largest_levels_same_matches": float(np.abs(a["same_matches"] - image).max() * 255),
        }


def report(args: argparse.Namespace) -> dict[str, Any]:
    ways = WAYS[1:] if args.skip_published else WAYS
    runs: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as folder:
        images = {way: Path(folder) / f"{way}.npz" for way in ways}
        for _ in range(args.pairs):
            for way in ways:
                runs[way].append(in_child(way, args, images[way]))
        difference = None if args.skip_published else compare(images["ours"], images["published"])
    rows = {}
    for way, of_way in runs.items():
        rows[way] = {
            key: statistics.median(run[key] for run in of_way)
            for key in ("seconds", "wall", "peak_mb", "extra_mb", "estimate_mb")
            if key in of_way[0]
        } | {"parts": {part: statistics.median(run["parts"][part] for run in of_way) for part in PARTS}}
    found: dict[str, Any] = {"benchmark": "inference", "weights": "random", "preset": "mrefsr"}
    found |= hardware() | {"device": args.device, "torch": torch.__version__, "size": args.size}
    found |= {
        "references": args.references,
        "threads": args.threads,
        "pairs": args.pairs,
        "tile": args.tile,
        "dtype": args.dtype,
    }
    if args.device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    found["ways"] = rows
    if not args.skip_published:
        pairs = list(zip(runs["published"], runs["ours"], strict=True))
        for key in ("seconds", "peak_mb", "extra_mb"):
            found[f"ratio_{key}"] = statistics.median(a[key] / b[key] for a, b in pairs)
        found["difference"] = difference
    return found


def print_table(found: dict[str, Any]) -> None:
    print(
        f"{found.get('gpu', found['cpu'])}, {found['device']}, {found['threads']} thread(s), torch {found['torch']}, "
        f"{found['date']}: LR {found['size']}x{found['size']}, {found['references']} references, random weights"
    )
    ways = list(found["ways"])
    print(f"{'seconds':44}" + "".join(f"{way:>12}" for way in ways))
    for part, what in PARTS.items():
        print(f"{what:44}" + "".join(f"{found['ways'][way]['parts'][part]:12.2f}" for way in ways))
    totals = {way: sum(found["ways"][way]["parts"][part] for part in RESTORATION) for way in ways}
    print(f"{'restoration':44}" + "".join(f"{totals[way]:12.2f}" for way in ways))
    for key, what in (
        ("seconds", "all"),
        ("wall", "all, wall"),
        ("peak_mb", "peak MB"),
        ("extra_mb", "of it, the run"),
    ):
        print(f"{what:44}" + "".join(f"{found['ways'][way][key]:12.2f}" for way in ways))
    print(f"estimate of `--tile auto` for ours: {found['ways']['ours']['estimate_mb']:.0f} MB")
    if "difference" in found:
        difference = found["difference"]
        print(
            f"{found['ratio_seconds']:.2f} times as fast, with {1 / found['ratio_peak_mb']:.2f} of the peak memory "
            f"({1 / found['ratio_extra_mb']:.2f} of the run's own)"
        )
        print(
            f"images at most {difference['largest_levels_same_matches']:.4f} grey levels apart with the same matches; "
            f"{difference['share_of_matches_that_differ']:.2e} of the matches differ (equal to rounding), with them "
            f"{difference['largest_levels']:.4f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=125, help="side of the LR, pixels")
    parser.add_argument("--references", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=1, help="how often both ways run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--tile", default="none", help="of ours: none or a side in LR pixels")
    parser.add_argument(
        "--dtype", choices=sorted(infer.DTYPES), default="fp32", help="of ours; the published way is fp32"
    )
    parser.add_argument("--skip-published", action="store_true", help="ours alone")
    parser.add_argument("--json", action="store_true", help="print the JSON line only")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    if args.way:
        print(json.dumps(run_way(args.way, args.size, args.references, args.device, args.tile, args.dtype, args.out)))
        return
    found = report(args)
    if not args.json:
        print_table(found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
