"""The matching kernel for CUDA GPUs with Triton: `mrefsr.matching` chooses it, nothing else calls it.

NOT MEASURED: no GPU was at hand when this was written. Its results are tested in Triton's interpreter; its speed is
an estimate until `python -m benchmarks.matching` has run on a GPU.

The product S of one input row with (a band of) the reference goes by `torch.mm` into a ring of rows small enough for
the L2 cache; one kernel then sums the nine taps straight from the ring, scales, and keeps the maximum. The taps
overlap, so they come from the caches. The product follows torch's own switch for TF32 (off by default: full float32).
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
# (Triton types its own kernels; it reads the annotations, so there is no `from __future__ import annotations`.)

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

RING_BYTES = 24 << 20  # about half of the L2 cache of an A100 or H100
BLOCK = 1024
TARGET_PROGRAMS = 1024  # enough to fill the GPU when a launch has few patches


def _best_of_band(
    s_ptr,  # (ring, width, n): rows of S, row y at y % ring; n = band's feature rows * width_ref
    scale_ptr,  # (band's patch rows * width_ref): NaN in the last two of each row, where no patch begins
    value_ptr,  # (height - 2, width - 2, parts)
    index_ptr,
    row,
    part,  # which of `parts` the first slice writes
    parts,
    ring,
    width,
    width_ref,
    n,
    slots,  # positions in the band, NaN ones included, up to its last patch
    slots_per_slice,
    first,  # index of the band's first patch
    BLOCK: tl.constexpr,
):
    r = row + tl.program_id(0) // (width - 2)
    x = tl.program_id(0) % (width - 2)
    y0 = ((r % ring).to(tl.int64) * width + x) * n
    y1 = (((r + 1) % ring).to(tl.int64) * width + x) * n + width_ref
    y2 = (((r + 2) % ring).to(tl.int64) * width + x) * n + 2 * width_ref
    lanes = tl.arange(0, BLOCK)
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    place = tl.full((BLOCK,), 0, tl.int32)
    begin = tl.program_id(1) * slots_per_slice
    end = tl.minimum(begin + slots_per_slice, slots)
    for start in range(begin, end, BLOCK):
        q = start + lanes
        ok = q < end
        # Tap (dy, dx) of patch q lies at q + dy * width_ref + dx in the row of input pixel (r + dy, x + dx).
        total = tl.load(s_ptr + y0 + q, mask=ok, other=0.0)
        total += tl.load(s_ptr + y0 + n + q + 1, mask=ok, other=0.0)
        total += tl.load(s_ptr + y0 + 2 * n + q + 2, mask=ok, other=0.0)
        total += tl.load(s_ptr + y1 + q, mask=ok, other=0.0)
        total += tl.load(s_ptr + y1 + n + q + 1, mask=ok, other=0.0)
        total += tl.load(s_ptr + y1 + 2 * n + q + 2, mask=ok, other=0.0)
        total += tl.load(s_ptr + y2 + q, mask=ok, other=0.0)
        total += tl.load(s_ptr + y2 + n + q + 1, mask=ok, other=0.0)
        total += tl.load(s_ptr + y2 + 2 * n + q + 2, mask=ok, other=0.0)
        score = total * tl.load(scale_ptr + q, mask=ok, other=float("nan"))
        better = score > best  # false for NaN; strict, and q ascends: each lane keeps its first maximum
        best = tl.where(better, score, best)
        place = tl.where(better, q, place)
    top = tl.max(best, axis=0)
    q_top = tl.min(tl.where(best == top, place, 2147483647), axis=0)
    at = (q_top // width_ref) * (width_ref - 2) + q_top % width_ref
    out = (r.to(tl.int64) * (width - 2) + x) * parts + part + tl.program_id(1)
    tl.store(value_ptr + out, top)
    tl.store(index_ptr + out, at + first)


# Numbers that change from launch to launch must not each compile a kernel of their own.
_CHANGING = ["row", "part", "parts", "ring", "n", "slots", "slots_per_slice", "first"]
_kernel: Any = triton.jit(_best_of_band, do_not_specialize=_CHANGING)


def match(
    feat_in: Tensor, feat_ref: Tensor, scale: Tensor, *, ring_bytes: int = RING_BYTES, programs: int = TARGET_PROGRAMS
) -> tuple[Tensor, Tensor]:
    """Index (int64) and value (float32), both (h - 2, w - 2), of the best reference patch of every input patch.

    Args: float32 CUDA tensors, CHW; `scale` (h2 - 2, w2 - 2) multiplies the correlation with each reference patch.
    A launch is cut into about `programs` programs. Scratch: `ring_bytes`, or what three rows of S with three rows of
    the reference need if that is more.
    """
    depth, height, width = feat_in.shape
    _, height_ref, width_ref = feat_ref.shape
    row_bytes = 4 * width * width_ref
    band = max(1, min(height_ref - 2, ring_bytes // (3 * row_bytes) - 2))  # patch rows; the band reads two rows more
    bands = range(0, height_ref - 2, band)
    ring = min(height, max(3, ring_bytes // (row_bytes * (band + 2))))
    slices = max(1, programs // ((ring - 2) * (width - 2)))
    slices = min(slices, triton.cdiv(band * width_ref, BLOCK))
    parts = len(bands) * slices
    rows_in = feat_in.permute(1, 2, 0).contiguous()
    flat_ref = feat_ref.reshape(depth, height_ref * width_ref)
    scale_line = torch.nn.functional.pad(scale, (0, 2), value=float("nan"))
    value = scale.new_full((height - 2, width - 2, parts), float("-inf"))
    index = torch.zeros_like(value, dtype=torch.int32)
    scratch = scale.new_empty(ring * width * (band + 2) * width_ref)
    for number, top in enumerate(bands):
        patch_rows = min(band, height_ref - 2 - top)
        n = (patch_rows + 2) * width_ref
        rows_s = scratch[: ring * width * n].view(ring, width, n)
        columns = flat_ref[:, top * width_ref : top * width_ref + n]
        slots = patch_rows * width_ref - 2
        done = 0
        for y in range(height):
            torch.mm(rows_in[y], columns, out=rows_s[y % ring])
            ready = y - 1 - done  # patch rows whose three rows of S lie in the ring
            if ready == ring - 2 or (y == height - 1 and ready > 0):
                with torch.cuda.device_of(value):  # Triton launches on the current GPU
                    _kernel[(ready * (width - 2), slices)](
                        rows_s, scale_line[top:], value, index, done, number * slices, parts, ring, width, width_ref,
                        n, slots, triton.cdiv(slots, slices), top * (width_ref - 2),
                        BLOCK=BLOCK, enable_fp_fusion=False,
                    )  # fmt: skip
                done += ready
    best, part = value.max(2)  # the first of equal parts, and parts ascend with the index
    return index.gather(2, part[..., None])[..., 0].long(), best
