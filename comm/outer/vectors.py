"""Sixteen magnitudes at once: the two passes over every element of a block, as LLVM vectors.

The one idea: a float's pattern without its sign is ordered as its magnitude is, so magnitudes are
compared as integers, and a comparison of sixteen is one word of bits. Plain LLVM, nothing of one
processor; arrays are padded to whole strides by whoever calls.
"""

from __future__ import annotations

from gossamer.comm.codec.kernels import compiled
from llvmlite import ir
from numba import types
from numba import uint64 as u64
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 16
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_V32, _F32 = ir.VectorType(_I32, LANES), ir.VectorType(ir.FloatType(), LANES)


@intrinsic
def take_magnitudes(context, source, begin, block, at, count):
    """Writes the patterns source [begin, begin + count) without signs to `block` from `at` on;
    returns (the greatest of them, their sum as floats). `count` is a multiple of LANES."""

    def generate(context, builder, signature, arguments):
        greatest = cgutils.alloca_once_value(builder, _V32([0] * LANES))
        total = cgutils.alloca_once_value(builder, _F32([0.0] * LANES))
        pairs = zip(signature.args[:4:2], arguments[:4:2], arguments[1:4:2], strict=True)
        source, block = (_place(context, builder, *each) for each in pairs)
        umax = _function(builder, "llvm.umax.v16i32", _V32, [_V32, _V32])
        with cgutils.for_range(builder, builder.udiv(arguments[4], _I64(LANES))) as loop:
            values = builder.load(builder.gep(source, [loop.index]), align=4)
            values = builder.and_(values, _V32([0x7FFFFFFF] * LANES))
            builder.store(values, builder.gep(block, [loop.index]), align=4)
            builder.store(builder.call(umax, [builder.load(greatest), values]), greatest)
            sums = builder.fadd(builder.load(total), builder.bitcast(values, _F32))
            builder.store(sums, total)
        reduce_max = _function(builder, "llvm.vector.reduce.umax.v16i32", _I32, [_V32])
        highest = builder.zext(builder.call(reduce_max, [builder.load(greatest)]), _I64)
        total = builder.load(total)
        lanes = [builder.extract_element(total, _I32(lane)) for lane in range(LANES)]
        while len(lanes) > 1:
            lanes = [builder.fadd(a, b) for a, b in zip(lanes[::2], lanes[1::2], strict=True)]
        return context.make_tuple(builder, signature.return_type, [highest, lanes[0]])

    returned = types.Tuple([types.uint64, types.float32])
    return returned(source, types.uint64, block, types.uint64, types.uint64), generate


@intrinsic
def count_from(context, block, count, least):
    """How many of block [0, count) are `least` or more. `count` is a multiple of LANES."""

    def generate(context, builder, signature, arguments):
        block = _place(context, builder, signature.args[0], arguments[0], _I64(0))
        bound = _spread(builder, arguments[2])
        total = cgutils.alloca_once_value(builder, _I64(0))
        with cgutils.for_range(builder, builder.udiv(arguments[1], _I64(LANES))) as loop:
            word = _reach(builder, builder.gep(block, [loop.index]), bound)
            builder.store(builder.add(builder.load(total), builder.ctpop(word)), total)
        return builder.load(total)

    return types.uint64(block, types.uint64, types.uint64), generate


@intrinsic
def reach(context, block, at, least):
    """Bit i is set where block[at + i] is `least` or more, over LANES elements."""

    def generate(context, builder, signature, arguments):
        place = _place(context, builder, signature.args[0], arguments[0], arguments[1])
        return _reach(builder, place, _spread(builder, arguments[2]))

    return types.uint64(block, types.uint64, types.uint64), generate


@intrinsic
def trailing_zeros(context, word):
    """Zeros below the lowest bit that is set; 64 for 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], ir.IntType(1)(False))

    return types.uint64(types.uint64), generate


@intrinsic
def as_float(context, pattern):
    """The float32 of a pattern, the low 32 bits of `pattern`."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.trunc(arguments[0], _I32), ir.FloatType())

    return types.float32(types.uint64), generate


@intrinsic
def as_pattern(context, value):
    """The pattern of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.zext(builder.bitcast(arguments[0], _I32), _I64)

    return types.uint64(types.float32), generate


@compiled
def list_from(block, count, least, values, places):
    """Writes what of block [0, count) is `least` or more, and where; returns how many."""
    found = u64(0)
    for at in range(u64(0), u64(count), u64(LANES)):
        word = reach(block, at, least)
        while word:
            place = at + trailing_zeros(word)
            word &= word - u64(1)
            values[found] = block[place]
            places[found] = place
            found += u64(1)
    return found


def _reach(builder, place, bound):
    values = builder.load(place, align=4)
    word = builder.bitcast(builder.icmp_unsigned(">=", values, bound), _I16)
    return builder.zext(word, _I64)


def _place(context, builder, kind, array, at):
    """Pointer to the vector at element `at` of an array."""
    begin = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(begin, [at]), _V32.as_pointer())


def _spread(builder, value):
    """The low 32 bits of an integer in all lanes."""
    one = builder.insert_element(_V32(ir.Undefined), builder.trunc(value, _I32), _I32(0))
    return builder.shuffle_vector(one, _V32(ir.Undefined), _V32([0] * LANES))


def _function(builder, name, returned, arguments):
    kind = ir.FunctionType(returned, arguments)
    return cgutils.get_or_insert_function(builder.module, kind, name)
