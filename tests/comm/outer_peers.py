"""The same kept values as others put them on the wire: what our bytes are measured against.

Both pack for real. `paper_packing` is Covenant-72B's (arXiv 2603.08163): 12 bits of index and 2 of
value. `public_packing` is templar's code: the same indices, and values as one byte each. Both send,
a tensor, a shift and a table of four fp32 means (SparseLoCo's quantiser).
"""

from __future__ import annotations

import numpy as np


def published_codes(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(codes 0 to 3, the four values that they decode to) of SparseLoCo's quantiser: 4 bins over
    six deviations of the whole tensor, each decoded as its mean."""
    centred = values - values.mean()
    scale = max(6 * values.std(ddof=1) / 4, 1e-12) if len(values) > 1 else 1.0
    codes = np.clip(np.round(centred / scale) + 2, 0, 3).astype(np.uint8)
    table = [values[codes == code].mean() if (codes == code).any() else 0.0 for code in range(4)]
    return codes, np.array(table, np.float32)


def paper_packing(places: np.ndarray, values: np.ndarray) -> bytes:
    """`places` in their blocks, below 4096, and `values` of one tensor."""
    codes, table = published_codes(values)
    codes = np.pad(codes, (0, -len(codes) % 4)).reshape(-1, 4)
    packed = (codes << np.array([0, 2, 4, 6], np.uint8)).sum(axis=1).astype(np.uint8)
    return _packed_indices(places) + packed.tobytes() + _side_data(values, table)


def public_packing(places: np.ndarray, values: np.ndarray) -> bytes:
    """As `paper_packing`."""
    codes, table = published_codes(values)
    return _packed_indices(places) + codes.tobytes() + _side_data(values, table)


def _packed_indices(places: np.ndarray) -> bytes:
    first, second = np.pad(places, (0, len(places) % 2)).astype(np.uint16).reshape(-1, 2).T
    columns = [first & 255, first >> 8 | (second & 15) << 4, second >> 4]
    return np.stack(columns, axis=1).astype(np.uint8).tobytes()


def _side_data(values: np.ndarray, table: np.ndarray) -> bytes:
    return np.float32(values.mean()).tobytes() + table.tobytes()
