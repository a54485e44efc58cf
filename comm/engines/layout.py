"""Where each element of a checkpoint lives in an engine's run-time tensors, learnt from its loader.

The one idea: hand the model's own load_weights tensors whose bits spell each element's address, and
read the addresses where the engine keeps its weights. Whatever the loader and the packing behind it
do by moving (fused projections, stacked experts, TP and EP slices, blocked orders for a kernel)
comes out as an offset for each row plus an offset for each column; random bits then prove the map.
No loader is read or traced, and each rank learns its own. What a loader computes, not moves, is no
map: such a tensor is handed to the loader again after each commit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from gossamer.comm.codec.bits import tensor_bits
from gossamer.comm.codec.kernels import compiled
from gossamer.comm.device import INTEGERS
from gossamer.comm.engines.pieces import LayoutError, Piece, Runtime, Spec
from torch import Tensor

CHUNK_ELEMENTS = 1 << 27
"""How many elements are learnt at once; bounds the memory that learning takes."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The map of one rank."""

    pieces: dict[str, list[Piece]]
    """By checkpoint name; empty for a tensor that this rank does not hold."""
    computed: dict[str, dict[str, Tensor]]
    """Tensors that the loader computes with: by run-time tensor, a mask of what it writes."""
    untouched: list[str]
    """Run-time tensors that no checkpoint tensor reaches."""


def learn(specs: dict[str, Spec], runtime: Runtime) -> Layout:
    """The map from the checkpoint `specs` to `runtime`, proven with random bits.

    Run-time tensors are as before afterwards. Layers are learnt one by one, which takes memory for
    the weights of one. Raises LayoutError.
    """
    layout = Layout({}, {}, [])
    tables: dict[bytes, np.ndarray] = {}
    held_by_layer = _by_layer(runtime.tensors)
    for layer, names in _by_layer(specs).items():
        held = held_by_layer.get(layer, [])
        for part in _chunks({name: specs[name] for name in names}):
            pieces = _prove(part, _read_addresses(part, runtime, held, tables), runtime, held)
            layout.pieces.update(pieces)
            rest = {name: spec for name, spec in part.items() if not pieces[name]}
            if rest:
                layout.computed.update(_computed(rest, runtime, held))
    reached = {piece.held_by for pieces in layout.pieces.values() for piece in pieces}
    reached.update(name for masks in layout.computed.values() for name in masks)
    layout.untouched.extend(sorted(runtime.tensors.keys() - reached))
    lost = sorted(reached & runtime.changed)
    if lost:
        raise LayoutError(f"{lost[0]} is changed after loading in a way that cannot be followed")
    return layout


def load_aside(tensors: dict[str, Tensor], runtime: Runtime, held: list[str]) -> dict[str, Tensor]:
    """What a load of `tensors` would leave in the run-time tensors `held`, 0 where nothing.

    Raises LayoutError where the loader fails, or writes into any other.
    """
    packed = [each for each in runtime.packed if each.load_shapes.keys() <= set(held)]
    shapes = {name: shape for each in packed for name, shape in each.load_shapes.items()}
    kept = {name: tensor.data for name, tensor in runtime.tensors.items()}
    fresh = {name: kept[name].new_zeros(shapes.get(name, kept[name].shape)) for name in held}
    try:
        for name, data in kept.items():
            # one element in the place of all: torch refuses to write there
            stand_in = fresh[name] if name in fresh else data.new_zeros(()).expand(data.shape)
            runtime.tensors[name].data = stand_in
        runtime.load(list(tensors.items()))
    except RuntimeError as error:
        raise LayoutError(
            f"addresses in the place of {min(tensors)} did not load: {error}"
        ) from error
    finally:
        for name, data in kept.items():
            runtime.tensors[name].data = data
    for each in packed:
        fresh.update(each.pack({name: fresh[name] for name in each.load_shapes}))
    return fresh


def _by_layer(names: Iterable[str]) -> dict[str | None, list[str]]:
    """Names by the first number in them: a layer's, whatever its loader calls the rest."""
    layers: dict[str | None, list[str]] = {}
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        layers.setdefault(number and number[1], []).append(name)
    return layers


def _chunks(specs: dict[str, Spec]) -> Iterator[dict[str, Spec]]:
    chunk: dict[str, Spec] = {}
    size = 0
    for name, spec in specs.items():
        if chunk and size + spec.size > CHUNK_ELEMENTS:
            yield chunk
            chunk, size = {}, 0
        chunk[name] = spec
        size += spec.size
    yield chunk


def _read_addresses(
    specs: dict[str, Spec], runtime: Runtime, held: list[str], tables: dict[bytes, np.ndarray]
) -> dict[str, list[Piece]]:
    """Pieces as the addresses tell them; none for a tensor that was not moved as a grid."""
    pieces: dict[str, list[Piece | None]] = {name: [] for name in specs}
    for dtype in {spec.dtype for spec in specs.values()}:
        names = [name for name in specs if specs[name].dtype == dtype]
        starts = np.cumsum([0, *(specs[name].size for name in names)])
        spans = list(zip(names, starts[:-1].tolist(), starts[1:].tolist(), strict=True))
        width = 8 * dtype.itemsize
        addresses: dict[str, np.ndarray] = {}
        for shift in range(0, int(starts[-1]).bit_length(), width):
            coded = {name: _digit(specs[name], start + 1, shift) for name, start, _ in spans}
            for held_by, loaded in load_aside(coded, runtime, held).items():
                if loaded.dtype == dtype:
                    digit = tensor_bits(loaded.cpu()).astype(np.int64)
                    digit <<= shift
                    addresses[held_by] = digit | addresses.get(held_by, digit)
        for held_by, address in addresses.items():
            first, stop = _range_of(address, starts[-1])
            places = np.full(max(stop - first, 0), -1, np.int64)
            twice = np.zeros(len(places), np.bool_)
            _invert(address, first, places, twice)
            for name, begin, end in spans:
                inside = slice(max(begin - first, 0), max(end - first, 0))
                if not (places[inside] >= 0).any():
                    continue
                grid = np.full(end - begin, -1, np.int64)
                grid[max(first - begin, 0) :][: len(places[inside])] = places[inside]
                grid = grid.reshape(specs[name].grid)
                pieces[name].append(
                    None if twice[inside].any() else _as_piece(held_by, grid, tables)
                )
    return {name: [p for p in found if p] if all(found) else [] for name, found in pieces.items()}


def _digit(spec: Spec, first: int, shift: int) -> Tensor:
    """The addresses first, first + 1, ..., shifted, as bits of the tensor's dtype."""
    address = torch.arange(first, first + spec.size) >> shift
    return address.to(INTEGERS[spec.dtype.itemsize]).view(spec.dtype).view(spec.shape)


def _as_piece(held_by: str, places: np.ndarray, tables: dict[bytes, np.ndarray]) -> Piece | None:
    """The piece with `places` [rows, columns] (-1: absent), None where two tables do not do."""
    rows, columns = (np.flatnonzero((places >= 0).any(axis)) for axis in (1, 0))
    inner = places[np.ix_(rows, columns)]
    offset = int(inner.min())
    down, across = inner[:, 0] - inner[:, 0].min(), inner[0] - inner[0].min()
    if offset < 0 or not np.array_equal(inner - offset, down[:, None] + across):
        return None
    whole = []
    for index, values, size in zip((rows, columns), (down, across), places.shape, strict=True):
        table = np.full(size, -1, np.int64)
        table[index] = values
        # a model has few shapes: equal tables are kept once
        whole.append(tables.setdefault(table.tobytes(), table))
    return Piece(held_by, offset, *whole)


def _prove(
    specs: dict[str, Spec],
    pieces: dict[str, list[Piece]],
    runtime: Runtime,
    held: list[str],
) -> dict[str, list[Piece]]:
    """The pieces, and none for a tensor whose random bits are not where its pieces say.

    Raises LayoutError where the loader writes more than its pieces say.
    """
    weights = {name: _random(spec, seed) for seed, (name, spec) in enumerate(specs.items())}
    loaded = _bits_loaded(weights, runtime, held)
    proven = {}
    for name, found in pieces.items():
        bits = tensor_bits(weights[name])
        strip = np.arange(len(bits), dtype=np.uint32)
        got = [bits.copy() for _ in found]
        for piece, into in zip(found, got, strict=True):
            piece.read(loaded[piece.held_by], strip, 0, into)
        proven[name] = found if all(np.array_equal(bits, each) for each in got) else []
    mapped = {name: weights[name] for name, found in proven.items() if found}
    if len(mapped) < len(weights):
        loaded = _bits_loaded(mapped, runtime, held)
    for name, found in proven.items():
        zeros = np.zeros_like(tensor_bits(weights[name]))
        for piece in found:
            piece.write(loaded[piece.held_by], np.arange(len(zeros), dtype=np.uint32), 0, zeros)
    more = sorted(held_by for held_by, bits in loaded.items() if bits.any())
    if more:
        raise LayoutError(f"the loader makes more of its tensors in {more[0]} than it moves there")
    return proven


def _random(spec: Spec, seed: int) -> Tensor:
    """A tensor of random bits."""
    data = np.random.default_rng(seed).bytes(spec.size * spec.dtype.itemsize)
    return torch.frombuffer(bytearray(data), dtype=spec.dtype).view(spec.shape)


def _bits_loaded(
    tensors: dict[str, Tensor], runtime: Runtime, held: list[str]
) -> dict[str, np.ndarray]:
    loaded = load_aside(tensors, runtime, held)
    return {name: tensor_bits(each.cpu()) for name, each in loaded.items() if each.numel()}


def _computed(
    specs: dict[str, Spec], runtime: Runtime, held: list[str]
) -> dict[str, dict[str, Tensor]]:
    """Those tensors that the loader uses although they have no map: what each of them writes."""
    weights = {
        name: torch.full(spec.shape, 0.75 if spec.dtype.is_floating_point else 1).to(spec.dtype)
        for name, spec in specs.items()
    }
    if not any(found.any() for found in load_aside(weights, runtime, held).values()):
        return {}
    packed = {name for each in runtime.packed for name in each.load_shapes}
    computed = {}
    for name in specs:
        loaded = load_aside({name: weights[name]}, runtime, held)
        masks = {held_by: found.cpu() != 0 for held_by, found in loaded.items() if found.any()}
        if masks.keys() & packed:
            raise LayoutError(f"{name} is changed and then packed: no map of it was found")
        if masks:
            computed[name] = masks
    return computed


@compiled
def _range_of(address, last):  # noqa: ANN001, ANN202
    """First and last (exclusive) of the addresses that are spelled, counted from 0."""
    first, stop = last, 0
    for each in address:
        if 0 < each <= last:
            first, stop = min(first, each - 1), max(stop, each)
    return first, stop


@compiled
def _invert(address, first, places, twice):  # noqa: ANN001, ANN202
    """Writes where each address is found; and which are found more than once."""
    for at in range(len(address)):
        index = address[at] - 1 - first
        if 0 <= index < len(places):
            twice[index] = places[index] >= 0
            places[index] = at
