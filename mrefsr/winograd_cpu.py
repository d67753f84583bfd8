"""The kernels of `mrefsr.winograd`, which calls them; nothing else does.

Compiled by numba. The transforms of one tile are written as LLVM vector instructions, straight down: numba's vectoriser
does not see through 36 arrays. The product of the transformed values is the one of `mrefsr.matching_cpu`.
"""

# mypy: allow-untyped-defs, allow-untyped-calls
# (numba infers the types of what it compiles, and LLVM builders have none.)

from typing import Any

import numpy as np
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.extending import intrinsic

from mrefsr.matching_cpu import LANES, _compiled, _row_product

P, Q = 0.75, 1.5  # the interpolation points besides 0 and infinity, each with both signs
WIDTH = 8  # channels that one vector instruction transforms
VECTOR = ir.VectorType(ir.FloatType(), WIDTH)
INT = ir.IntType(64)


def _splat(number: float) -> Any:
    return ir.Constant(VECTOR, [number] * WIDTH)


class _Vectors:
    """LLVM instructions on vectors, with fused multiply-add allowed."""

    def __init__(self, builder):
        self.builder = builder

    def add(self, a, b):
        return self.builder.fadd(a, b, flags=("contract",))

    def sub(self, a, b):
        return self.builder.fsub(a, b, flags=("contract",))

    def scaled(self, number, a):
        return self.builder.fmul(a, _splat(number), flags=("contract",))

    def pointer(self, array, offset):
        return self.builder.bitcast(self.builder.gep(array, [offset]), VECTOR.as_pointer())

    def load(self, array, offset):
        return self.builder.load(self.pointer(array, offset), align=4)

    def store(self, value, array, offset):
        self.builder.store(value, self.pointer(array, offset), align=4)

    def offset(self, base, *terms):
        """base + sum of count * stride; the counts are known now, the strides when the code runs."""
        for count, stride in terms:
            if count:
                base = self.builder.add(base, self.builder.mul(stride, ir.Constant(INT, count)))
        return base

    def input_line(self, d):
        """Six pixels -> their values at the six points."""
        even_p = self.sub(d[4], self.scaled(Q * Q, d[2]))
        odd_p = self.scaled(P, self.sub(d[3], self.scaled(Q * Q, d[1])))
        even_q = self.sub(d[4], self.scaled(P * P, d[2]))
        odd_q = self.scaled(Q, self.sub(d[3], self.scaled(P * P, d[1])))
        ends = [
            self.add(self.sub(d[n + 4], self.scaled(P * P + Q * Q, d[n + 2])), self.scaled(P * P * Q * Q, d[n]))
            for n in (0, 1)
        ]
        return [
            ends[0],
            self.add(even_p, odd_p),
            self.sub(even_p, odd_p),
            self.add(even_q, odd_q),
            self.sub(even_q, odd_q),
            ends[1],
        ]

    def gradient_line(self, g):
        """Four pixels -> six values: the transpose of `output_line`."""
        even_p, even_q = (self.add(g[0], self.scaled(x**2, g[2])) for x in (P, Q))
        odd_p, odd_q = (self.add(self.scaled(x, g[1]), self.scaled(x**3, g[3])) for x in (P, Q))
        return [
            g[0],
            self.add(even_p, odd_p),
            self.sub(even_p, odd_p),
            self.add(even_q, odd_q),
            self.sub(even_q, odd_q),
            g[3],
        ]

    def output_line(self, m):
        """Values at the six points -> four pixels."""
        even_p, odd_p = self.add(m[1], m[2]), self.sub(m[1], m[2])
        even_q, odd_q = self.add(m[3], m[4]), self.sub(m[3], m[4])
        return [
            self.add(m[0], self.add(even_p, even_q)),
            self.add(self.scaled(P, odd_p), self.scaled(Q, odd_q)),
            self.add(self.scaled(P**2, even_p), self.scaled(Q**2, even_q)),
            self.add(m[5], self.add(self.scaled(P**3, odd_p), self.scaled(Q**3, odd_q))),
        ]


def _data(context, builder, signature, args, n):
    return context.make_array(signature.args[n])(context, builder, args[n]).data


def _transpose(lines):
    return [list(column) for column in zip(*lines, strict=True)]


def _make_input_tile(side: int) -> Any:
    def input_tile(typingctx, x, start, line, pixel, v, place, plane):
        """v[place + n * plane] for n < 36 from the pixels x[start + i * line + j * pixel], i, j < side, WIDTH channels
        at once: 6x6 pixels of an input, or 4x4 of a gradient."""

        def codegen(context, builder, signature, args):
            do = _Vectors(builder)
            along = do.input_line if side == 6 else do.gradient_line
            x_data, v_data = (_data(context, builder, signature, args, n) for n in (0, 4))
            _, start, line, pixel, _, place, plane = args
            columns = [
                along([do.load(x_data, do.offset(start, (i, line), (j, pixel))) for i in range(side)])
                for j in range(side)
            ]
            for i, row in enumerate(_transpose(columns)):
                for j, value in enumerate(along(row)):
                    do.store(value, v_data, do.offset(place, (6 * i + j, plane)))
            return context.get_dummy_value()

        return types.void(x, types.int64, types.int64, types.int64, v, types.int64, types.int64), codegen

    return intrinsic(input_tile)


def _make_output_tile(with_addend: bool) -> Any:
    def output_tile(typingctx, m, place, plane, bias, channel, addend, slope, y, start, line, pixel):
        """y[start + i * line + j * pixel] for i, j < 4 from m[place + n * plane], n < 36, WIDTH channels at once.

        bias[channel...] is added, and with `with_addend` what `addend` holds at the places of y; then comes the leaky
        ReLU of `slope`.
        """

        def codegen(context, builder, signature, args):
            do = _Vectors(builder)
            m_data, bias_data, add_data, y_data = (_data(context, builder, signature, args, n) for n in (0, 3, 5, 7))
            _, place, plane, _, channel, _, slope, _, start, line, pixel = args
            undefined = ir.Constant(VECTOR, ir.Undefined)
            spread = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
            slope = builder.insert_element(undefined, slope, ir.Constant(ir.IntType(32), 0))
            slope = builder.shuffle_vector(slope, undefined, spread)
            biases = do.load(bias_data, channel)
            columns = [
                do.output_line([do.load(m_data, do.offset(place, (6 * i + j, plane))) for i in range(6)])
                for j in range(6)
            ]
            for i, row in enumerate(_transpose(columns)):
                for j, value in enumerate(do.output_line(row)):
                    at = do.offset(start, (i, line), (j, pixel))
                    value = do.add(value, biases)
                    if with_addend:
                        value = do.add(value, do.load(add_data, at))
                    positive = builder.fcmp_ordered(">", value, _splat(0.0))
                    do.store(builder.select(positive, value, builder.fmul(value, slope)), y_data, at)
            return context.get_dummy_value()

        integer = types.int64
        arguments = (m, integer, integer, bias, integer, addend, types.float32, y, integer, integer, integer)
        return types.void(*arguments), codegen

    return intrinsic(output_tile)


_input_tile = _make_input_tile(6)
_gradient_tile = _make_input_tile(4)
_output_tile = _make_output_tile(False)
_output_tile_plus = _make_output_tile(True)


@_compiled
def transform_tiles(x, height, width, depth, side, first, last, window, v, plane):
    """Tiles first..last (over all images) of x, flat BHWC, into v, flat 36 planes of (tile, channel).

    `side` 6: x is an input, whose tiles overlap by two pixels. `side` 4: x is the gradient at an output.
    """
    tiles_y, tiles_x = (height + 3) // 4, (width + 3) // 4
    for tile in range(first, last):
        image, rest = divmod(tile, tiles_y * tiles_x)
        before = (side - 4) // 2
        top, left = rest // tiles_x * 4 - before, rest % tiles_x * 4 - before
        place = (tile - first) * depth
        if top >= 0 and left >= 0 and top + side <= height and left + side <= width:
            pixels, start, line = x, ((image * height + top) * width + left) * depth, width * depth
        else:
            window[:] = 0
            for y in range(max(top, 0), min(top + side, height)):
                a, b = max(left, 0), min(left + side, width)
                from_ = ((image * height + y) * width + a) * depth
                to = ((y - top) * side + a - left) * depth
                for n in range((b - a) * depth):  # assigning slices would compile five seconds longer
                    window[to + n] = x[from_ + n]
            pixels, start, line = window, 0, side * depth
        if side == 6:
            for c in range(0, depth, WIDTH):
                _input_tile(pixels, start + c, line, depth, v, place + c, plane)
        else:
            for c in range(0, depth, WIDTH):
                _gradient_tile(pixels, start + c, line, depth, v, place + c, plane)


@_compiled
def _transform_back(m, plane, line, height, width, depth, first, last, window, bias, addend, slope, y):
    """The reverse of `transform_tiles`: y, flat BHWC, gets the convolution, bias, addend and leaky ReLU."""
    tiles_y, tiles_x = (height + 3) // 4, (width + 3) // 4
    for tile in range(first, last):
        image, rest = divmod(tile, tiles_y * tiles_x)
        top, left = rest // tiles_x * 4, rest % tiles_x * 4
        place = (tile - first) * line
        start = ((image * height + top) * width + left) * depth
        inside = top + 4 <= height and left + 4 <= width
        if inside and addend.size:
            for c in range(0, depth, WIDTH):
                _output_tile_plus(m, place + c, plane, bias, c, addend, slope, y, start + c, width * depth, depth)
            continue
        target, at, step = (y, start, width * depth) if inside else (window, 0, 4 * depth)
        first_slope = np.float32(1) if addend.size else slope  # what is added comes before the activation
        for c in range(0, depth, WIDTH):
            _output_tile(m, place + c, plane, bias, c, addend, first_slope, target, at + c, step, depth)
        if inside:
            continue
        for i in range(min(4, height - top)):
            at, length = start + i * width * depth, min(4, width - left) * depth
            row = window[i * 4 * depth : i * 4 * depth + length]
            for n in range(length):
                value = row[n]
                if addend.size:
                    value += addend[at + n]
                    value = value if value > 0 else value * slope
                y[at + n] = value


@_compiled
def convolve(x, height, width, depth, weight, units, bias, addend, slope, y, depth_out, block, first, last):
    """Tiles first..last of the output, `block` of them at a time (a multiple of ROWS)."""
    line = units * LANES
    v_plane, m_plane = block * depth, block * line
    v, m = np.zeros(36 * v_plane, np.float32), np.zeros(36 * m_plane, np.float32)
    window = np.zeros(36 * max(depth, depth_out), np.float32)
    size = units * depth * LANES
    for start in range(first, last, block):
        end = min(start + block, last)
        transform_tiles(x, height, width, depth, 6, start, end, window, v, v_plane)
        for n in range(36):
            _row_product(
                v[n * v_plane :], weight[n * size : (n + 1) * size], depth, end - start, m[n * m_plane :]
            )  # fmt: skip
        _transform_back(m, m_plane, line, height, width, depth_out, start, end, window, bias, addend, slope, y)
