"""Weights on a GPU: changes are found there and written there; only they cross the bus.

The one idea: the entropy coder walks over old values, which the host keeps in any case (publisher's
base, receiver's image); a device holds the same bits, so a compare or a scatter by torch is all it
has to do. Run on CPU tensors by the tests; it has not been run on a GPU.
"""

from __future__ import annotations

import numpy as np
import torch

# torch compares and scatters signed integers on every device
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32}


def integer_view(tensor: torch.Tensor) -> torch.Tensor:
    """Flat signed view on the bits of a contiguous tensor of 1-, 2- or 4-byte elements.

    Raises ValueError when the tensor is none of these.
    """
    if not tensor.is_contiguous() or tensor.element_size() not in INTEGERS:
        raise ValueError(
            f"expected a contiguous tensor of elements of 1, 2 or 4 bytes, got {tensor.dtype}"
        )
    return tensor.detach().reshape(-1).view(INTEGERS[tensor.element_size()])


def find_changed_on_device(
    old: torch.Tensor, new: torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where `integer_view`s differ (uint32, ascending), old and new patterns there, on the host."""
    positions = (old != new).nonzero().squeeze(1)
    unsigned = np.dtype(f"u{old.element_size()}")
    before, after = (bits[positions].cpu().numpy().view(unsigned) for bits in (old, new))
    return positions.cpu().numpy().astype(np.uint32), before, after


def write_on_device(
    bits: torch.Tensor, positions: np.ndarray | None, patterns: np.ndarray, start: int = 0
) -> None:
    """Writes host `patterns` into an `integer_view` at `start + positions` (None: from `start`)."""
    signed = patterns.view(np.dtype(f"i{patterns.itemsize}"))
    values = torch.from_numpy(signed).to(bits.device)
    if positions is None:
        bits[start : start + len(values)] = values
    else:
        where = torch.from_numpy(positions.astype(np.int64)).to(bits.device)
        bits[start:].index_copy_(0, where, values)


def is_on_device(tensor: torch.Tensor) -> bool:
    """True unless the tensor lies in host memory."""
    return tensor.device.type != "cpu"


class DeviceMirror:
    """Mirror (live.py) of a contiguous tensor on a device; its image lies in host memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._bits = integer_view(tensor)

    def write(self, positions: np.ndarray | None, start: int, patterns: np.ndarray) -> None:
        """See Mirror.write; as many bytes cross the bus as there are changes."""
        write_on_device(self._bits, positions, patterns, start)

    def settle(self) -> None:
        """See Mirror.settle: waits for the device."""
        if self._bits.is_cuda:
            torch.cuda.synchronize(self._bits.device)

    def read(self, start: int, stop: int) -> np.ndarray:
        """See Mirror.read."""
        bits = self._bits[start:stop].cpu().numpy()
        return bits.view(np.dtype(f"u{bits.itemsize}"))
