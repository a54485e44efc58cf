"""What the coder knows of a dtype: its classes and the order of its values.

The one idea: small weights have a finer grid, so how often an element changes is a function of the
old value's exponent, which both sides know. A class is an exponent (for integers the top bits); a
pattern's class is found by one shift and one look into a table.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from gossamer.comm.codec.kernels import FLOAT, SIGNED, UNSIGNED

# shift to the class prefix, kind of order, sign bit
ELEMENTS = {
    "bfloat16": (7, FLOAT, 1 << 15),
    "float16": (10, FLOAT, 1 << 15),
    "float32": (23, FLOAT, 1 << 31),
    "float8_e4m3fn": (3, FLOAT, 1 << 7),
    "float8_e5m2": (2, FLOAT, 1 << 7),
    "int8": (4, SIGNED, 1 << 7),
    "uint8": (4, UNSIGNED, 1 << 7),
    "int16": (8, SIGNED, 1 << 15),
    "int32": (24, SIGNED, 1 << 31),
}


def element_shape(dtype: str) -> tuple[int, int, int]:
    """(shift, sign bit, kind) as the kernels take them."""
    shift, kind, sign = ELEMENTS[dtype]
    return shift, sign, kind


@lru_cache
def class_of_prefix(dtype: str) -> np.ndarray:
    """Class (int64) of each prefix; the sign of a float is no part of it."""
    shift, kind, sign = ELEMENTS[dtype]
    prefixes = np.arange(2 * sign >> shift)
    classes = prefixes & ((sign >> shift) - 1) if kind == FLOAT else prefixes
    classes.flags.writeable = False
    return classes


def num_classes(dtype: str) -> int:
    """Classes of a dtype."""
    return int(class_of_prefix(dtype).max()) + 1
