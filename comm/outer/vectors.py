"""Sixty-four magnitudes at once: the passes over all elements of a block, as LLVM vectors.

The one idea: a float's pattern without its sign is ordered as its magnitude is, so magnitudes are
compared as integers. Plain LLVM, nothing of one processor: it makes of a vector whatever the
processor has. Arrays are padded to whole vectors by whoever calls.
"""

from __future__ import annotations

from gossamer.comm.codec.kernels import compiled
from gossamer.comm.codec.lanes import llvm_function, place_at, spread, trailing_zeros
from llvmlite import ir
from numba import types
from numba import uint64 as u64
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 64
_F32, _I32, _I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_V32, _VF = ir.VectorType(_I32, LANES), ir.VectorType(_F32, LANES)


@intrinsic
def take_magnitudes(context, source, begin, stride, block, count):
    """Copies `count` times LANES patterns, those of source [begin, begin + LANES) and on from
    `stride` later each time, without signs to `block`; returns (the greatest, their sum)."""

    def generate(context, builder, signature, arguments):
        source, begin, stride, block, count = arguments
        greatest = cgutils.alloca_once_value(builder, _V32([0] * LANES))
        total = cgutils.alloca_once_value(builder, _VF([0.0] * LANES))
        target = place_at(context, builder, signature.args[3], block, _I64(0), _V32)
        umax = llvm_function(builder, f"llvm.umax.v{LANES}i32", _V32, [_V32, _V32])
        with cgutils.for_range(builder, count) as loop:
            at = builder.add(begin, builder.mul(loop.index, stride))
            place = place_at(context, builder, signature.args[0], source, at, _V32)
            values = builder.and_(builder.load(place, align=4), _V32([0x7FFFFFFF] * LANES))
            builder.store(values, builder.gep(target, [loop.index]), align=4)
            builder.store(builder.call(umax, [builder.load(greatest), values]), greatest)
            sums = builder.fadd(builder.load(total), builder.bitcast(values, _VF))
            builder.store(sums, total)
        reduce_max = llvm_function(builder, f"llvm.vector.reduce.umax.v{LANES}i32", _I32, [_V32])
        highest = builder.zext(builder.call(reduce_max, [builder.load(greatest)]), _I64)
        pair = [highest, _sum(builder, builder.load(total))]
        return context.make_tuple(builder, signature.return_type, pair)

    returned = types.Tuple([types.uint64, types.float32])
    return returned(source, types.uint64, types.uint64, block, types.uint64), generate


@intrinsic
def sum_from(context, block, count, least):
    """How many of block [0, count) are `least` or more, and their sum as floats."""

    def generate(context, builder, signature, arguments):
        place = place_at(context, builder, signature.args[0], arguments[0], _I64(0), _V32)
        bound = spread(builder, arguments[2], _V32)
        number = cgutils.alloca_once_value(builder, _V32([0] * LANES))
        total = cgutils.alloca_once_value(builder, _VF([0.0] * LANES))
        with cgutils.for_range(builder, _vectors(builder, arguments[1])) as loop:
            values = builder.load(builder.gep(place, [loop.index]), align=4)
            reach = builder.icmp_unsigned(">=", values, bound)
            more = builder.add(builder.load(number), builder.zext(reach, _V32))
            builder.store(more, number)
            kept = builder.select(reach, values, _V32([0] * LANES))
            kept = builder.fadd(builder.load(total), builder.bitcast(kept, _VF))
            builder.store(kept, total)
        add_up = llvm_function(builder, f"llvm.vector.reduce.add.v{LANES}i32", _I32, [_V32])
        number = builder.zext(builder.call(add_up, [builder.load(number)]), _I64)
        pair = [number, _sum(builder, builder.load(total))]
        return context.make_tuple(builder, signature.return_type, pair)

    returned = types.Tuple([types.uint64, types.float32])
    return returned(block, types.uint64, types.uint64), generate


@intrinsic
def reach(context, block, at, least):
    """Bit i is set where block[at + i] is `least` or more, over LANES elements."""

    def generate(context, builder, signature, arguments):
        place = place_at(context, builder, signature.args[0], arguments[0], arguments[1], _V32)
        values, bound = builder.load(place, align=4), spread(builder, arguments[2], _V32)
        return builder.bitcast(builder.icmp_unsigned(">=", values, bound), _I64)

    return types.uint64(block, types.uint64, types.uint64), generate


@intrinsic
def count_bits(context, word):
    """Bits that are set."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


@intrinsic
def as_float(context, pattern):
    """The float32 of a pattern, the low 32 bits of `pattern`."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(builder.trunc(arguments[0], _I32), _F32)

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
        stop = found + count_bits(word)
        slot = found
        while slot < stop:
            # four at a time, so that the processor can guess how often it goes round
            for _ in range(4):
                places[slot] = at + trailing_zeros(word)
                word &= word - u64(1)
                slot += u64(1)
        found = stop
    for i in range(found):
        values[i] = block[u64(places[i])]
    return found


def _vectors(builder, count):
    return builder.udiv(count, _I64(LANES))


def _sum(builder, lanes):
    add_up = llvm_function(builder, f"llvm.vector.reduce.fadd.v{LANES}f32", _F32, [_F32, _VF])
    return builder.call(add_up, [_F32(0.0), lanes], fastmath=("reassoc",))
