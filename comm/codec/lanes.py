"""Many elements at once: LLVM's vectors behind numba, for the passes over every weight.

The one idea: two things that LLVM does not find in plain loops are written out as vectors. 64 bytes
are compared into one word of bits; and lengths on the line of hazard (hazard.py) are looked up 32
at a time in a table that lies in two registers (AVX-512's vpermi2d, which two to a lane share). On
processors without it, and for models of more classes than registers hold, callers take the plain
loop, which adds up the same.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from gossamer.comm.codec.elements import class_of_prefix, element_shape
from gossamer.comm.codec.kernels import compiled
from llvmlite import binding, ir
from numba import types
from numba import uint64 as u64
from numba.core import cgutils, config
from numba.extending import intrinsic

# what numba compiles for, which settings of its own can hold back
HAS_LOOKUP = (
    bool(binding.get_host_cpu_features().get("avx512bw", False))
    and config.CPU_NAME is None
    and config.CPU_FEATURES is None
    and bool(config.ENABLE_AVX)
)
STRIDE = 32
"""Elements that are added up at once, and lengths that a table holds."""
AHEAD_BYTES = 2048
"""How far ahead of a pass its bytes are asked for: the processor itself looks less far."""
_LANES = STRIDE // 2
_I1, _I32, _I64 = ir.IntType(1), ir.IntType(32), ir.IntType(64)
_V32 = ir.VectorType(_I32, _LANES)
_V16 = ir.VectorType(ir.IntType(16), STRIDE)


class Line(NamedTuple):
    """The lengths of elements, as the loops take them."""

    lengths: np.ndarray
    """By class prefix, int64."""
    table: np.ndarray
    """By class from the first on, int32 [STRIDE]."""
    shape: tuple[int, int, int, int]
    """(shift from a pattern to its prefix, mask from there to its class, first class, the entry of
    `table` from which on all are 0); the last is negative where `table` is not to be used."""


def build_line(dtype: str, first: int, lengths: np.ndarray, use_table: bool = HAS_LOOKUP) -> Line:
    """The line of a model whose classes have `lengths` (int64) from `first` on."""
    classes = class_of_prefix(dtype)
    index = np.clip(classes - first, 0, len(lengths))
    table = np.zeros(STRIDE, np.int32)
    last = len(lengths) if use_table and len(lengths) < STRIDE else -1
    table[: max(last, 0)] = lengths[: max(last, 0)]
    shape = element_shape(dtype)[0], int(classes.max()), first, last
    return Line(np.append(lengths, 0)[index], table, shape)


@intrinsic
def differing(context, old, new, at):
    """Bit i is set where old[at + i] != new[at + i], over 64 bytes."""

    def generate(context, builder, signature, arguments):
        lanes = 512 // old.dtype.bitwidth
        vector = ir.VectorType(ir.IntType(old.dtype.bitwidth), lanes)
        pair = []
        for kind, array in zip(signature.args[:2], arguments[:2], strict=True):
            place = place_at(context, builder, kind, array, arguments[2], vector)
            fetch_ahead(context, builder, kind, array, arguments[2])
            pair.append(builder.load(place, align=old.dtype.bitwidth // 8))
        bits = builder.bitcast(builder.icmp_unsigned("!=", *pair), ir.IntType(lanes))
        return bits if lanes == 64 else builder.zext(bits, _I64)

    return types.uint64(old, new, types.uint64), generate


@intrinsic
def trailing_zeros(context, word):
    """Zeros below the lowest bit that is set in `word`; 64 for 0."""

    def generate(context, builder, signature, arguments):
        return builder.cttz(arguments[0], _I1(False))

    return types.uint64(types.uint64), generate


@intrinsic
def sum_stride(context, old, at, count, table, shape):
    """Lengths of old [at, at + count) by `line.table`, count at most STRIDE."""

    def generate(context, builder, signature, arguments):
        if not HAS_LOOKUP:
            return _I64(0)
        array, at, count, held, shape = arguments
        place = place_at(context, builder, table, held, _I64(0), _V32)
        halves = [builder.load(builder.gep(place, [_I32(half)]), align=4) for half in range(2)]
        numbers = cgutils.unpack_tuple(builder, shape)
        elements = ir.VectorType(ir.IntType(old.dtype.bitwidth), STRIDE)
        mask = ir.VectorType(_I1, STRIDE)
        load = f"llvm.masked.load.v{STRIDE}i{old.dtype.bitwidth}.p0"
        load = llvm_function(builder, load, elements, [elements.as_pointer(), _I32, mask, elements])
        is_in = builder.icmp_signed("<", _V16(list(range(STRIDE))), spread(builder, count, _V16))
        place = place_at(context, builder, old, array, at, elements)
        fetch_ahead(context, builder, old, array, at)
        align, none = _I32(old.dtype.bitwidth // 8), elements([0] * STRIDE)
        index = _index(builder, builder.call(load, [place, align, is_in, none]), numbers)
        index = builder.select(is_in, index, spread(builder, numbers[3], _V16))
        look_up = llvm_function(builder, "llvm.x86.avx512.vpermi2var.d.512", _V32, [_V32] * 3)
        even = builder.bitcast(index, _V32)  # of an index the lookup sees five bits
        odd = builder.lshr(even, _V32([16] * _LANES))
        found = [builder.call(look_up, [halves[0], each, halves[1]]) for each in (even, odd)]
        add_up = llvm_function(builder, "llvm.vector.reduce.add.v16i32", _I32, [_V32])
        return builder.zext(builder.call(add_up, [builder.add(*found)]), _I64)

    return types.int64(old, types.uint64, types.int64, table, shape), generate


def _index(builder, values, numbers):
    """[STRIDE] of 16 bits: where the table holds the lengths of `values`."""
    shift, mask, first, last = numbers
    width = values.type.element.width
    if width == 8:
        values = builder.zext(values, _V16)
    values = builder.lshr(values, spread(builder, shift, values.type))
    if width == 32:
        values = builder.trunc(values, _V16)
    classes = builder.and_(values, spread(builder, mask, _V16))
    less = llvm_function(builder, "llvm.usub.sat.v32i16", _V16, [_V16, _V16])
    smallest = llvm_function(builder, "llvm.umin.v32i16", _V16, [_V16, _V16])
    index = builder.call(less, [classes, spread(builder, first, _V16)])
    return builder.call(smallest, [index, spread(builder, last, _V16)])


@compiled
def find_changes(old, new, begin, found):
    """Writes where flat `old` and `new` differ from `begin` on, and both values there, into `found`
    (positions, before, after), arrays of at least 64; returns how many, and where it stopped for
    want of room, or the end."""
    positions, before, after = found
    count, at, lanes = u64(0), u64(begin), u64(64 // old.itemsize)
    room, stop = u64(len(positions)), u64(len(old))
    while at < stop and count + lanes <= room:
        if at + lanes <= stop:
            differ = differing(old, new, at)
        else:
            differ = u64(0)
            for lane in range(stop - at):
                differ |= u64(old[at + lane] != new[at + lane]) << lane
        while differ:
            place = at + trailing_zeros(differ)
            differ &= differ - u64(1)
            positions[count] = place
            before[count] = old[place]
            after[count] = new[place]
            count += u64(1)
        at = min(at + lanes, stop)
    return count, at


def place_at(context, builder, kind, array, at, vector):
    """Pointer to the vector at element `at` of an array."""
    begin = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(begin, [at]), vector.as_pointer())


def fetch_ahead(context, builder, kind, array, at):
    """Asks for what lies AHEAD_BYTES behind the element `at` of an array, or behind its end."""
    vector = ir.VectorType(ir.IntType(8), 1)
    ahead = builder.add(at, _I64(8 * AHEAD_BYTES // kind.dtype.bitwidth))
    place = place_at(context, builder, kind, array, ahead, vector)
    arguments = [vector.as_pointer(), _I32, _I32, _I32]
    fetch = ir.FunctionType(ir.VoidType(), arguments)
    fetch = cgutils.get_or_insert_function(builder.module, fetch, "llvm.prefetch.p0")
    is_write, locality, is_data = _I32(0), _I32(3), _I32(1)
    builder.call(fetch, [place, is_write, locality, is_data])


def spread(builder, value, vector):
    """The low bits of an integer in all lanes of a vector of narrower ones."""
    lane = builder.trunc(value, vector.element)
    one = builder.insert_element(vector(ir.Undefined), lane, _I32(0))
    lanes = ir.VectorType(_I32, vector.count)([0] * vector.count)
    return builder.shuffle_vector(one, vector(ir.Undefined), lanes)


def llvm_function(builder, name, returned, arguments):
    """A function of LLVM's, declared where it is not yet."""
    kind = ir.FunctionType(returned, arguments)
    return cgutils.get_or_insert_function(builder.module, kind, name)
