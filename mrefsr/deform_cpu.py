"""CPU kernels of the deformable convolution: gather samples into columns, and the way back.

Written for numba. One item of the batch at a time, channels last: a corner of a bilinear sample is then one run of
channels in memory, and eight of them are one vector. `mrefsr.deform` owns the matrix products between the kernels.

Nothing is compiled when this module is imported. A kernel is compiled when it is first asked for, which takes some
seconds, once per machine: numba keeps the machine code beside this file or in the user's cache folder. Where neither
can be written each process compiles anew.

A column is the run [group, tap, channel of the group] of one output pixel. Work goes by tiles of up to `TILE` pixels of
one output row: first positions and corner weights of all nine taps, in loops of constant length that the compiler turns
into vectors, then the channels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]
Function = TypeVar("Function", bound=Callable[..., Any])
Kernel = Callable[..., None]
FLAT = types.Array(types.float32, 1, "C")
STRIDED = types.Array(types.float32, 3, "A")
SAMPLE = (
    *(FLAT, STRIDED, STRIDED, types.Array(types.float32, 4, "A"), FLAT),  # x, offset, mask, flow, columns
    *(types.Array(types.float32, 2, "C"), types.Array(types.int32, 2, "C")),  # scratch
)

TILE = 64
TAPS = 9
SLOTS = TAPS * TILE  # one slot per tap and pixel of a tile: slot = tap * TILE + pixel
LANES = 8
# Rows of the scratch memory, each with a value per slot. Two of one axis, four of the corners follow one another.
AT_Y, AT_X, MASK, FLOW_Y, FLOW_X, RAMP, ZEROS = range(7)
UP, DOWN, LEFT, RIGHT = range(7, 11)  # bilinear weights, 0 outside the image
IN_UP, IN_DOWN, IN_LEFT, IN_RIGHT = range(11, 15)  # 1 inside the image, 0 outside
WEIGHT, DOT, SLOPE, FLOATS = 15, 19, 23, 26
W0, W1, W2, W3, D0, D1, D2, D3 = range(WEIGHT, WEIGHT + 8)
INDEX, INTS = 4, 8
I0, I1, I2, I3 = range(INDEX, INDEX + 4)
# "contract" lets a product and a sum become one instruction; NaN must keep its meaning, so no wider licence is given.
OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": {"contract", "nsz"}, "error_model": "numpy"}


# --- Three vector steps -----------------------------------------------------------------------------------------------
# The compiler can not know that columns and features never overlap. It would test that for every run of channels, and
# the test costs more than the eight channels themselves. Hence vector steps spelled out; any CPU can run them.


def _vector_at(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), ir.VectorType(ir.FloatType(), LANES).as_pointer())


def _shuffle(builder: Any, left: Any, right: Any, lanes: list[int]) -> Any:
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(ir.IntType(32), len(lanes)), lanes))


def _broadcast(builder: Any, scalar: Any) -> Any:
    undefined = ir.Constant(ir.VectorType(ir.FloatType(), LANES), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
    return _shuffle(builder, first, undefined, [0] * LANES)


def _add_pairs(builder: Any, left: Any, right: Any) -> Any:
    """Sums of neighbouring lanes, within each half of the two vectors."""
    even, odd = [0, 2, 8, 10, 4, 6, 12, 14], [1, 3, 9, 11, 5, 7, 13, 15]
    return builder.fadd(_shuffle(builder, left, right, even), _shuffle(builder, left, right, odd))


@intrinsic  # type: ignore[untyped-decorator]
def _blend8(
    typing: Any, to: Any, at: Any, x: Any, i0: Any, i1: Any, i2: Any, i3: Any, w0: Any, w1: Any, w2: Any, w3: Any
) -> Any:
    """to[at : at + 8] = w0 * x[i0 : i0 + 8] + w1 * x[i1 : i1 + 8] + ..."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total = None
        for index, weight in zip(args[3:7], args[7:11], strict=True):
            corner = builder.load(_vector_at(context, builder, signature.args[2], args[2], index), align=4)
            part = builder.fmul(_broadcast(builder, weight), corner, flags=["contract"])
            total = part if total is None else builder.fadd(total, part, flags=["contract"])
        builder.store(total, _vector_at(context, builder, signature.args[0], args[0], args[1]), align=4)
        return context.get_dummy_value()

    return types.void(to, at, x, i0, i1, i2, i3, w0, w1, w2, w3), generate


@intrinsic  # type: ignore[untyped-decorator]
def _spread8(
    typing: Any, to: Any, i0: Any, i1: Any, i2: Any, i3: Any, w0: Any, w1: Any, w2: Any, w3: Any, x: Any, at: Any
) -> Any:
    """to[i0 : i0 + 8] += w0 * x[at : at + 8], then the same for i1, i2, i3 (which may be equal)."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = builder.load(_vector_at(context, builder, signature.args[9], args[9], args[10]), align=4)
        for index, weight in zip(args[1:5], args[5:9], strict=True):
            place = _vector_at(context, builder, signature.args[0], args[0], index)
            part = builder.fmul(_broadcast(builder, weight), vector, flags=["contract"])
            builder.store(builder.fadd(builder.load(place, align=4), part, flags=["contract"]), place, align=4)
        return context.get_dummy_value()

    return types.void(to, i0, i1, i2, i3, w0, w1, w2, w3, x, at), generate


@intrinsic  # type: ignore[untyped-decorator]
def _dots8(typing: Any, columns: Any, at: Any, x: Any, i0: Any, i1: Any, i2: Any, i3: Any) -> Any:
    """The four inner products of columns[at : at + 8] with x[i0 : i0 + 8], x[i1 : i1 + 8], ..."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = builder.load(_vector_at(context, builder, signature.args[0], args[0], args[1]), align=4)
        products = []
        for index in args[3:7]:
            corner = builder.load(_vector_at(context, builder, signature.args[2], args[2], index), align=4)
            products.append(builder.fmul(vector, corner))
        pairs = _add_pairs(builder, *products[:2]), _add_pairs(builder, *products[2:])
        halves = _add_pairs(builder, *pairs)
        sums = builder.fadd(
            _shuffle(builder, halves, halves, [0, 1, 2, 3]), _shuffle(builder, halves, halves, [4, 5, 6, 7])
        )
        lanes = [builder.extract_element(sums, ir.Constant(ir.IntType(32), lane)) for lane in range(4)]
        return context.make_tuple(builder, signature.return_type, lanes)

    return types.UniTuple(types.float32, 4)(columns, at, x, i0, i1, i2, i3), generate


# --- Positions and corner weights of a tile ---------------------------------------------------------------------------


def _inline(function: Function) -> Function:
    return cast(Function, numba.njit(**OPTIONS)(function))


@_inline
def _copy(values: Floats, count: int, out: Floats) -> None:
    for j in range(count):
        out[j] = values[j]


@_inline
def _place(base: np.float32, ramp: Floats, offset: Floats, flow: Floats, count: int, out: Floats) -> None:
    """Sample positions along one axis. The flow is added to the offset first, as if the caller had done it."""
    for j in range(count):
        out[j] = (base + ramp[j]) + (offset[j] + flow[j])


@_inline
def _product(left: Floats, right: Floats, out: Floats) -> None:
    for j in range(SLOTS):
        out[j] = left[j] * right[j]


@_inline
def _split(
    position: Floats,
    size: int,
    near: Floats,
    far: Floats,
    inside_near: Floats,
    inside_far: Floats,
    low: Ints,
    high: Ints,
) -> None:
    """The two grid lines around each position: weights (0 outside the image), 1 or 0 for inside, indices made safe.

    A position is clamped before it becomes an integer, so that no offset reads outside memory. NaN stays NaN.
    """
    below, zero, one = np.float32(-2), np.float32(0), np.float32(1)
    last = np.float32(size - 1)
    above = np.float32(size + 1)
    for j in range(SLOTS):
        given = position[j]
        at = given if given > below else below
        at = at if at < above else above
        floor = np.floor(at)
        ceiling = floor + one
        rest = at - floor
        exists = one if given == given else given
        here = exists if (floor >= zero) & (floor <= last) else exists * zero
        there = exists if (ceiling >= zero) & (ceiling <= last) else exists * zero
        inside_near[j] = here
        inside_far[j] = there
        near[j] = (one - rest) * here
        far[j] = rest * there
        floor = floor if floor > zero else zero
        ceiling = ceiling if ceiling > zero else zero
        low[j] = np.int32(floor if floor < last else last)
        high[j] = np.int32(ceiling if ceiling < last else last)


@_inline
def _index(row: Ints, column: Ints, width: int, channels: int, out: Ints) -> None:
    wide, deep = np.int32(width), np.int32(channels)
    for j in range(SLOTS):
        out[j] = np.int32(np.int32(np.int32(row[j] * wide) + column[j]) * deep)


@_inline
def _load_flow(flow: Floats, y: int, x0: int, count: int, floats: Floats) -> None:
    for tap in range(TAPS):
        slots = slice(tap * TILE, (tap + 1) * TILE)
        _copy(flow[tap, y, x0 : x0 + count, 1], count, floats[FLOW_Y, slots])
        _copy(flow[tap, y, x0 : x0 + count, 0], count, floats[FLOW_X, slots])


@_inline
def _corners(
    offset: Floats, mask: Floats, floats: Floats, ints: Ints, group: int, y: int, x0: int, count: int, padding: int,
    height: int, width: int, channels: int,
) -> None:  # fmt: skip
    """Fills, for the four corners of every slot, bilinear weight times mask, and the index of the first channel."""
    for tap in range(TAPS):
        sample = group * TAPS + tap
        slots = slice(tap * TILE, (tap + 1) * TILE)
        dy, dx = offset[2 * sample, y, x0 : x0 + count], offset[2 * sample + 1, y, x0 : x0 + count]
        base_y, base_x = np.float32(y - padding + tap // 3), np.float32(x0 - padding + tap % 3)
        _place(base_y, floats[ZEROS], dy, floats[FLOW_Y, slots], count, floats[AT_Y, slots])
        _place(base_x, floats[RAMP], dx, floats[FLOW_X, slots], count, floats[AT_X, slots])
        _copy(mask[sample, y, x0 : x0 + count], count, floats[MASK, slots])
    _split(floats[AT_Y], height, floats[UP], floats[DOWN], floats[IN_UP], floats[IN_DOWN], ints[0], ints[1])
    _split(floats[AT_X], width, floats[LEFT], floats[RIGHT], floats[IN_LEFT], floats[IN_RIGHT], ints[2], ints[3])
    for corner in range(4):
        _product(floats[UP + corner // 2], floats[LEFT + corner % 2], floats[WEIGHT + corner])
        _product(floats[WEIGHT + corner], floats[MASK], floats[WEIGHT + corner])
        _index(ints[corner // 2], ints[2 + corner % 2], width, channels, ints[INDEX + corner])


@_inline
def _slopes(floats: Floats) -> None:
    """Gradients of offset and mask of every slot from the inner products of its column gradient with the corners."""
    up, down, left, right, mask = floats[UP], floats[DOWN], floats[LEFT], floats[RIGHT], floats[MASK]
    d0, d1, d2, d3 = floats[DOT], floats[DOT + 1], floats[DOT + 2], floats[DOT + 3]
    in_up, in_down, in_left, in_right = floats[IN_UP], floats[IN_DOWN], floats[IN_LEFT], floats[IN_RIGHT]
    dy, dx, dm = floats[SLOPE], floats[SLOPE + 1], floats[SLOPE + 2]
    for j in range(SLOTS):
        top = (left[j] * d0[j] + right[j] * d1[j]) * in_up[j]
        bottom = (left[j] * d2[j] + right[j] * d3[j]) * in_down[j]
        dy[j] = mask[j] * (bottom - top)
        dm[j] = up[j] * top + down[j] * bottom
        west = (up[j] * d0[j] + down[j] * d2[j]) * in_left[j]
        east = (up[j] * d1[j] + down[j] * d3[j]) * in_right[j]
        dx[j] = mask[j] * (east - west)


# --- The two kernels --------------------------------------------------------------------------------------------------


def scratch() -> tuple[Floats, Ints]:
    """Working memory for one call of a kernel."""
    floats, ints = np.zeros((FLOATS, SLOTS), np.float32), np.zeros((INTS, SLOTS), np.int32)
    floats[RAMP] = np.arange(SLOTS)
    return floats, ints


def gather(
    x: Floats, offset: Floats, mask: Floats, flow: Floats, columns: Floats, floats: Floats, ints: Ints,
    channels: int, height: int, width: int, out_width: int, padding: int, groups: int,
    first: int, start: int, stop: int,
) -> None:  # fmt: skip
    """Columns of the output pixels `start` to `stop` (counted row by row).

    Args:
        x: features, (height * width * channels,).
        offset: (groups * 18, Ho, Wo), (y, x) per tap per group.
        mask: (groups * 9, Ho, Wo).
        flow: added to every group's offset, (9, Ho, Wo, 2), (x, y).
        columns: (pixels * channels * 9,), written.
        floats, ints: from `scratch()`.
        out_width: Wo.
        first: the pixel that `columns` begins with.
    """
    deep = channels // groups
    pixel = start
    while pixel < stop:
        y = pixel // out_width
        x0 = pixel - y * out_width
        count = min(TILE, out_width - x0, stop - pixel)
        _load_flow(flow, y, x0, count, floats)
        for group in range(groups):
            _corners(offset, mask, floats, ints, group, y, x0, count, padding, height, width, channels)
            shift = group * deep
            for j in range(count):
                at = ((pixel - first + j) * channels + shift) * TAPS
                for tap in range(TAPS):
                    slot = tap * TILE + j
                    w0, w1, w2, w3 = floats[W0, slot], floats[W1, slot], floats[W2, slot], floats[W3, slot]
                    i0, i1 = shift + ints[I0, slot], shift + ints[I1, slot]
                    i2, i3 = shift + ints[I2, slot], shift + ints[I3, slot]
                    for c in range(0, deep - LANES + 1, LANES):
                        _blend8(columns, at + c, x, i0 + c, i1 + c, i2 + c, i3 + c, w0, w1, w2, w3)
                    for c in range(deep - deep % LANES, deep):
                        columns[at + c] = w0 * x[i0 + c] + w1 * x[i1 + c] + w2 * x[i2 + c] + w3 * x[i3 + c]
                    at += deep
        pixel += count


def scatter(
    x: Floats, offset: Floats, mask: Floats, flow: Floats, columns: Floats, floats: Floats, ints: Ints,
    d_x: Floats, d_offset: Floats, d_mask: Floats,
    channels: int, height: int, width: int, out_width: int, padding: int, groups: int, start: int, stop: int,
    group_start: int, group_stop: int,
) -> None:  # fmt: skip
    """The way back for the pixels `start` to `stop` and some groups; arguments as in `gather`.

    `columns` (from pixel `start` on) comes in as the gradient of the columns and leaves as the columns themselves,
    which the gradient of the weight needs. Groups touch disjoint memory, so that threads may share them out; the sums
    of one group run in pixel order. `d_x` is added to, or empty when it is not wanted; `d_offset`, `d_mask` are
    written.
    """
    deep = channels // groups
    wanted = d_x.size > 0
    pixel = start
    while pixel < stop:
        y = pixel // out_width
        x0 = pixel - y * out_width
        count = min(TILE, out_width - x0, stop - pixel)
        _load_flow(flow, y, x0, count, floats)
        for group in range(group_start, group_stop):
            _corners(offset, mask, floats, ints, group, y, x0, count, padding, height, width, channels)
            shift = group * deep
            for j in range(count):
                at = ((pixel - start + j) * channels + shift) * TAPS
                for tap in range(TAPS):
                    slot = tap * TILE + j
                    w0, w1, w2, w3 = floats[W0, slot], floats[W1, slot], floats[W2, slot], floats[W3, slot]
                    i0, i1 = shift + ints[I0, slot], shift + ints[I1, slot]
                    i2, i3 = shift + ints[I2, slot], shift + ints[I3, slot]
                    d0 = d1 = d2 = d3 = np.float32(0)
                    for c in range(0, deep - LANES + 1, LANES):
                        if wanted:
                            _spread8(d_x, i0 + c, i1 + c, i2 + c, i3 + c, w0, w1, w2, w3, columns, at + c)
                        e0, e1, e2, e3 = _dots8(columns, at + c, x, i0 + c, i1 + c, i2 + c, i3 + c)
                        d0, d1, d2, d3 = d0 + e0, d1 + e1, d2 + e2, d3 + e3
                        _blend8(columns, at + c, x, i0 + c, i1 + c, i2 + c, i3 + c, w0, w1, w2, w3)
                    for c in range(deep - deep % LANES, deep):
                        given, x0c, x1c, x2c, x3c = columns[at + c], x[i0 + c], x[i1 + c], x[i2 + c], x[i3 + c]
                        if wanted:
                            d_x[i0 + c] += w0 * given
                            d_x[i1 + c] += w1 * given
                            d_x[i2 + c] += w2 * given
                            d_x[i3 + c] += w3 * given
                        d0, d1, d2, d3 = d0 + given * x0c, d1 + given * x1c, d2 + given * x2c, d3 + given * x3c
                        columns[at + c] = w0 * x0c + w1 * x1c + w2 * x2c + w3 * x3c
                    floats[D0, slot], floats[D1, slot], floats[D2, slot], floats[D3, slot] = d0, d1, d2, d3
                    at += deep
            _slopes(floats)
            for tap in range(TAPS):
                sample, slots = group * TAPS + tap, slice(tap * TILE, tap * TILE + count)
                _copy(floats[SLOPE, slots], count, d_offset[2 * sample, y, x0 : x0 + count])
                _copy(floats[SLOPE + 1, slots], count, d_offset[2 * sample + 1, y, x0 : x0 + count])
                _copy(floats[SLOPE + 2, slots], count, d_mask[sample, y, x0 : x0 + count])
        pixel += count


@functools.cache
def gather_kernel() -> Kernel:
    """`gather`, compiled or loaded from numba's cache. It releases the GIL and starts no threads."""
    return _compile(gather, types.void(*SAMPLE, *[types.int64] * 9))


@functools.cache
def scatter_kernel() -> Kernel:
    """`scatter`, compiled or loaded from numba's cache. It releases the GIL and starts no threads."""
    return _compile(scatter, types.void(*SAMPLE, FLAT, STRIDED, STRIDED, *[types.int64] * 10))


def _compile(function: Kernel, signature: Any) -> Kernel:
    try:
        return cast(Kernel, numba.njit(signature, cache=True, **OPTIONS)(function))
    except (RuntimeError, OSError):  # no folder that can be written to: a read-only install with a read-only home
        return cast(Kernel, numba.njit(signature, **OPTIONS)(function))
