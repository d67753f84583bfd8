"""The matching kernel for CPUs: `mrefsr.matching` chooses it, nothing else calls it.

With S(p, q) = <F(p), G(q)> the correlation of two 3x3 patches is the sum of S(p + d, q + d) over nine d: a product of
width C instead of 9 C, then sums along diagonals. The sweep fixes delta = reference row - input row and walks down the
input rows; the horizontal sums T of the last three rows of S lie in a ring, and their sum is the correlation of one
row of patches with one row of patches. S is never larger than one row against one row, so it stays in the L2 cache.

The product is a register tile (`_tile`) written as LLVM vector instructions: no BLAS is called, so there is no thread
pool to clash with torch's, and every S is the same chain of additions wherever p and q lie. Equal patches therefore tie
exactly, and the result does not depend on the number of threads.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (numba infers the types of what it compiles, and LLVM builders have none.)

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from llvmlite import binding, ir  # type: ignore[import-untyped]
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

# The tile's accumulators (ROWS x 2 vectors), two vectors of the reference and one broadcast fill the vector registers:
# 16 on most CPUs, 32 twice as wide with AVX-512 (that branch is tested for its results, not timed: none was at hand).
ROWS, LANES = (12, 16) if binding.get_host_cpu_features().get("avx512f") else (6, 8)
LOWEST = -3e38  # finite, so that a masked column gives no NaN


def _compiled(function: Callable[..., Any]) -> Any:
    """Compile at the first call, without the GIL; keep the machine code where numba finds a writable folder."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return njit(nogil=True)(function)


def _make_tile(units: int) -> Any:
    """c[r * ldc + u * LANES + l] = sum over k of a[r * depth + k] * b[u * depth * LANES + k * LANES + l].

    r < ROWS, u < units, l < LANES; a, b, c are flat float32 arrays cut so that they begin at the tile. The sums stay in
    registers over the whole depth, which numba's own vectoriser does not achieve.
    """

    def tile(typingctx, a, b, depth, c, ldc):
        def codegen(context, builder, signature, args):
            _, _, depth_value, _, ldc_value = args
            a_ptr, b_ptr, c_ptr = (
                context.make_array(signature.args[n])(context, builder, args[n]).data for n in (0, 1, 3)
            )
            int64, vector = ir.IntType(64), ir.VectorType(ir.FloatType(), LANES)
            zero = ir.Constant(ir.IntType(32), 0)
            spread = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
            undefined = ir.Constant(vector, ir.Undefined)

            def at(pointer, factor, value):
                return builder.gep(pointer, [builder.mul(value, ir.Constant(int64, factor))])

            def as_vector(pointer):
                return builder.bitcast(pointer, vector.as_pointer())

            a_rows = [at(a_ptr, r, depth_value) for r in range(ROWS)]
            b_units = [at(b_ptr, u * LANES, depth_value) for u in range(units)]
            before = builder.block
            loop, after = builder.append_basic_block("depth"), builder.append_basic_block("store")
            builder.branch(loop)
            builder.position_at_end(loop)
            k = builder.phi(int64)
            k.add_incoming(ir.Constant(int64, 0), before)
            sums = {(r, u): builder.phi(vector) for r in range(ROWS) for u in range(units)}
            b_now = [builder.load(as_vector(at(unit, LANES, k)), align=4) for unit in b_units]
            new = {}
            for r in range(ROWS):
                first = builder.insert_element(undefined, builder.load(at(a_rows[r], 1, k)), zero)
                a_now = builder.shuffle_vector(first, undefined, spread)
                for u in range(units):
                    # "contract" lets LLVM fuse the two into one instruction where the CPU has it.
                    term = builder.fmul(a_now, b_now[u], flags=("contract",))
                    new[r, u] = builder.fadd(term, sums[r, u], flags=("contract",))
            k_next = builder.add(k, ir.Constant(int64, 1))
            k.add_incoming(k_next, loop)
            for key, phi in sums.items():
                phi.add_incoming(ir.Constant(vector, [0.0] * LANES), before)
                phi.add_incoming(new[key], loop)
            builder.cbranch(builder.icmp_signed("<", k_next, depth_value), loop, after)
            builder.position_at_end(after)
            for (r, u), total in new.items():
                target = builder.gep(at(c_ptr, r, ldc_value), [ir.Constant(int64, u * LANES)])
                builder.store(total, as_vector(target), align=4)
            return context.get_dummy_value()

        return types.void(a, b, depth, c, ldc), codegen

    return intrinsic(tile)


_tile_2 = _make_tile(2)
_tile_1 = _make_tile(1)


@_compiled
def _row_product(row_in, row_ref, depth, width, s):
    """S of one input row (pixels, depth) with one reference row (units, depth, LANES), all flat."""
    units = row_ref.size // (depth * LANES)
    line = units * LANES
    for u in range(0, units - 1, 2):  # two units of the reference stay in the L1 cache while the input passes by
        b = row_ref[u * depth * LANES :]
        for x in range(0, width, ROWS):
            _tile_2(row_in[x * depth :], b, depth, s[x * line + u * LANES :], line)
    if units % 2:
        b = row_ref[(units - 1) * depth * LANES :]
        for x in range(0, width, ROWS):
            _tile_1(row_in[x * depth :], b, depth, s[x * line + (units - 1) * LANES :], line)


@_compiled
def _sum_along_x(s, line, width, t):
    """T(x, slot) = S(x, slot) + S(x + 1, slot + 1) + S(x + 2, slot + 2)."""
    for x in range(width - 2):
        # Slices, not computed indices: only so is the loop vectorised.
        s0, s1, s2 = s[x * line :], s[(x + 1) * line + 1 :], s[(x + 2) * line + 2 :]
        out = t[x * line :]
        for n in range(line):
            out[n] = s0[n] + s1[n] + s2[n]


@_compiled
def _ordered(value):
    """The float's bits as an integer that sorts like the float: integer maxima are vectorised, float maxima are not."""
    bits = np.float32(value).view(np.int32)
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@_compiled
def _keep_best(t0, t1, t2, line, width, scale, mask, first, score, best, index):
    """Compare one row of input patches with one row of reference patches; `first` is the index of that row's first."""
    for x in range(width - 2):
        a, b, c = t0[x * line :], t1[x * line :], t2[x * line :]
        for n in range(line):
            score[n] = (a[n] + b[n] + c[n]) * scale[n] + mask[n]
        top = np.int32(-0x80000000)
        for n in range(line):
            top = max(top, _ordered(score[n]))
        if top > best[x]:  # rare, so the place is looked for only then; strict: the first of equals stays
            best[x] = top
            for n in range(line):
                if _ordered(score[n]) == top:
                    index[x] = first + n
                    break


@_compiled
def _sweep(pixels, units, scale, mask, width, delta_from, delta_to, best, index):
    """Every row offset in [delta_from, delta_to), ascending; `best` (ordered integers) and `index` are updated."""
    depth = pixels.shape[1]
    height, height_ref = best.shape[0] + 2, units.shape[0]
    line = units.shape[1] * LANES
    width_out_ref = int((mask == 0).sum())
    flat = pixels.reshape(-1)
    # Two floats more, because the last line is read from its third float on.
    s = np.zeros((width + ROWS - 1) // ROWS * ROWS * line + 2, np.float32)
    ring = np.zeros((3, width * line), np.float32)
    score = np.zeros(line, np.float32)
    for delta in range(delta_from, delta_to):
        top = max(0, -delta)
        for y in range(top, min(height, height_ref - delta)):
            _row_product(flat[y * width * depth :], units[y + delta].reshape(-1), depth, width, s)
            _sum_along_x(s, line, width, ring[y % 3])
            if y >= top + 2:
                row = y - 2
                _keep_best(
                    ring[row % 3], ring[(row + 1) % 3], ring[y % 3], line, width, scale[row + delta], mask,
                    (row + delta) * width_out_ref, score, best[row], index[row],
                )  # fmt: skip


def _shares(height: int, height_ref: int, parts: int) -> list[tuple[int, int]]:
    """Cut the row offsets that have patches into at most `parts` runs, ascending, of about the same work."""
    deltas = np.arange(3 - height, height_ref - 2)
    rows = np.minimum(height, height_ref - deltas) - np.maximum(0, -deltas)
    done = np.cumsum(rows) / rows.sum()
    cuts = [0, *(int(np.searchsorted(done, n / parts)) for n in range(1, parts)), len(deltas)]
    first = int(deltas[0])
    return [(first + a, first + b) for a, b in pairwise(cuts) if b > a]


def match(feat_in: Tensor, feat_ref: Tensor, scale: Tensor, *, threads: int) -> tuple[Tensor, Tensor]:
    """Index (int64) and value (float32), both (h - 2, w - 2), of the best reference patch of every input patch.

    Args: float32 CPU tensors, CHW; `scale` (h2 - 2, w2 - 2) multiplies the correlation with each reference patch.
    Memory beyond the result: about one copy of both feature maps, and 16 * w * w2 bytes per thread.
    """
    depth, height, width = feat_in.shape
    _, height_ref, width_ref = feat_ref.shape
    # A tile may begin up to ROWS - 1 pixels before the end; what it computes beyond a row's end is never read.
    pixels = torch.zeros(height * width + ROWS - 1, depth)
    pixels[: height * width].view(height, width, depth).copy_(feat_in.permute(1, 2, 0))
    whole, rest = divmod(width_ref, LANES)
    units = torch.zeros(height_ref, whole + bool(rest), depth, LANES)
    body = feat_ref[:, :, : whole * LANES].view(depth, height_ref, whole, LANES)
    units[:, :whole].copy_(body.permute(1, 2, 0, 3))
    if rest:
        units[:, whole, :, :rest].copy_(feat_ref[:, :, whole * LANES :].permute(1, 0, 2))
    line = units.shape[1] * LANES
    scale_line = torch.zeros(height_ref - 2, line)
    scale_line[:, : width_ref - 2] = scale
    mask = np.full(line, LOWEST, np.float32)
    mask[: width_ref - 2] = 0
    shape = (height - 2, width - 2)

    def run(share: tuple[int, int]) -> tuple[Any, Any]:
        best, index = np.full(shape, -0x80000000, np.int32), np.zeros(shape, np.int64)
        _sweep(pixels.numpy(), units.numpy(), scale_line.numpy(), mask, width, *share, best, index)
        return best, index

    shares = _shares(height, height_ref, threads)
    if len(shares) == 1:
        (best, index), *others = [run(shares[0])]
    else:
        with ThreadPoolExecutor(len(shares)) as pool:
            (best, index), *others = pool.map(run, shares)
    for later_best, later_index in others:  # in ascending order of the offset, so strict `>` keeps the first of equals
        better = later_best > best
        best[better], index[better] = later_best[better], later_index[better]
    value = (best ^ ((best >> 31) & 0x7FFFFFFF)).view(np.float32)
    return torch.from_numpy(index), torch.from_numpy(value)
