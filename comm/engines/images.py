"""The tensors that LiveWeights writes for an engine: views on its own, or images with a mirror.

The one idea: where a checkpoint tensor lies whole and in order in a run-time tensor, a view is all;
elsewhere an image holds it in the checkpoint's order, and its mirror carries what changes to where
the engine reads it: by the learnt map, or by handing the image to the loader again.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from gossamer.comm.codec.bits import UNSIGNED, tensor_bits
from gossamer.comm.codec.kernels import exchange
from gossamer.comm.device import integer_view, is_on_device, write_on_device
from gossamer.comm.engines.layout import Layout
from gossamer.comm.engines.pieces import LayoutError, Piece, Runtime, Spec
from gossamer.comm.live import Mirror
from torch import Tensor

STRIP_ELEMENTS = 1 << 20
"""How much is written or read at once where indices have to be made."""


def bind(
    specs: dict[str, Spec], layout: Layout, runtime: Runtime
) -> tuple[dict[str, Tensor], dict[str, Mirror]]:
    """What LiveWeights takes: every checkpoint tensor, and mirrors for those that are images.

    Images begin with the engine's own bits. Raises LayoutError for a run-time tensor with gaps.
    """
    tensors: dict[str, Tensor] = {}
    mirrors: dict[str, Mirror] = {}
    for name, spec in specs.items():
        pieces = layout.pieces[name]
        for held_by in (piece.held_by for piece in pieces):
            if not runtime.tensors[held_by].is_contiguous():
                raise LayoutError(f"run-time tensor {held_by} has gaps, which no map covers")
        held = runtime.tensors[pieces[0].held_by].data if pieces else None
        if held is not None and not is_on_device(held) and pieces[0].is_whole():
            start = pieces[0].offset
            tensors[name] = held.view(-1)[start : start + spec.size].view(spec.shape)
            continue
        tensors[name] = image = torch.zeros(spec.shape, dtype=spec.dtype)
        if name in layout.computed:
            mirrors[name] = Reload(name, image, layout.computed[name], runtime)
        else:
            mirrors[name] = Scatter(image, pieces, runtime)
        tensor_bits(image)[:] = mirrors[name].read(0, spec.size)
    for size in {spec.dtype.itemsize for spec in specs.values()}:
        bits = np.zeros(0, UNSIGNED[size])
        exchange(bits, np.zeros(0, np.uint32), bits)  # compiles, before a pause needs it
    return tensors, mirrors


class Scatter:
    """Mirror of an image whose elements lie where its pieces say; what is in none stays here."""

    def __init__(self, image: Tensor, pieces: list[Piece], runtime: Runtime) -> None:
        self._image = tensor_bits(image)
        self._held: list[tuple[Piece, np.ndarray | Tensor]] = []
        for piece in pieces:
            held = runtime.tensors[piece.held_by]
            bits = integer_view(held) if is_on_device(held) else tensor_bits(held)
            self._held.append((piece, bits))
        self._write(np.zeros(0, np.uint32), 0, self._image[:0])  # compiles, before a pause needs it

    def write(self, positions: np.ndarray | None, start: int, patterns: np.ndarray) -> None:
        """Puts `patterns` where the engine reads elements start + `positions`."""
        if positions is not None:
            self._write(positions, start, patterns)
            return
        for at, strip in _strips(len(patterns)):
            self._write(strip, start + at, patterns[at : at + len(strip)])

    def settle(self) -> None:
        """Nothing is left to do."""

    def read(self, start: int, stop: int) -> np.ndarray:
        """The engine's own bits; the image's for elements that this rank does not hold."""
        found = self._image[start:stop].copy()
        for at, strip in _strips(stop - start):
            into = found[at : at + len(strip)]
            for piece, held in self._held:
                if isinstance(held, np.ndarray):
                    piece.read(held, strip, start + at, into)
                else:
                    here, places = piece.find(strip.astype(np.int64) + (start + at))
                    into[here] = held[torch.from_numpy(places)].cpu().numpy().view(into.dtype)
        return found

    def _write(self, positions: np.ndarray, start: int, patterns: np.ndarray) -> None:
        for piece, held in self._held:
            if isinstance(held, np.ndarray):
                piece.write(held, positions, start, patterns)
            else:
                here, places = piece.find(positions.astype(np.int64) + start)
                write_on_device(held, places, patterns[here])


class Reload:
    """Mirror of an image that only the engine's loader can apply: it loads it after each commit.

    What the loader makes of it is the engine's own affair; `read` proves it untouched since.
    """

    def __init__(
        self, name: str, image: Tensor, masks: dict[str, Tensor], runtime: Runtime
    ) -> None:
        self._name, self._image, self._masks, self._runtime = name, image, masks, runtime
        self._loaded = self._own()

    def write(self, positions: np.ndarray | None, start: int, patterns: np.ndarray) -> None:
        """Nothing: the image is written anyway."""

    def settle(self) -> None:
        """Loads the image."""
        self._runtime.load([(self._name, self._image)])
        self._loaded = self._own()

    def read(self, start: int, stop: int) -> np.ndarray:
        """The image's bits, each flipped when the engine's are no longer what the loader left."""
        bits = tensor_bits(self._image)[start:stop]
        same = all(map(torch.equal, self._own(), self._loaded))
        return bits.copy() if same else ~bits

    def _own(self) -> list[Tensor]:
        return [
            integer_view(self._runtime.tensors[held_by]).cpu()[mask.view(-1)]
            for held_by, mask in self._masks.items()
        ]


def _strips(size: int) -> Iterator[tuple[int, np.ndarray]]:
    """(first, indices from it on) that cover `size` elements."""
    for at in range(0, size, STRIP_ELEMENTS):
        yield at, np.arange(min(STRIP_ELEMENTS, size - at), dtype=np.uint32)
