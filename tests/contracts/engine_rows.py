"""Rows that ranks own, as the engine contract looks at them: kept, shared, compared, whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from gossamer.parallel.engine import Owned
from safetensors.torch import load_file, save_file
from torch import Tensor

if TYPE_CHECKING:
    from test_engine_contract import World

Snapshot = dict[str, Tensor]
"""Owned rows by kind|name|row_start."""


def different(before: Snapshot, after: Snapshot) -> list[str]:
    """Keys that are not in both with the same bits."""
    same = [k for k in before.keys() & after.keys() if torch.equal(bits(before[k]), bits(after[k]))]
    return sorted((before.keys() | after.keys()) - set(same))


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.element_size()])


def share_rows(folder: Path, rank: int, snapshot: Snapshot) -> None:
    folder.mkdir(exist_ok=True)
    save_file(snapshot, folder / f"{rank}.safetensors")
    dist.barrier()


def rows_in(folder: Path) -> Callable[[str, int, int], Owned]:
    """Reads rows that all ranks of some world have shared in a folder."""
    pieces: dict[tuple[str, str], dict[int, Tensor]] = {}
    for path in folder.iterdir():
        for key, values in load_file(path).items():
            kind, name, start = key.split("|")
            pieces.setdefault((name, kind), {})[int(start)] = values
    whole = {key: torch.cat([rows[s] for s in sorted(rows)]) for key, rows in pieces.items()}

    def read(name: str, start: int, stop: int) -> Owned:
        kinds = {kind: t[start:stop] for (n, kind), t in whole.items() if n == name}
        shape = tuple(whole[name, "master"].shape)
        return Owned(name, shape, start, stop, kinds.pop("master"), kinds)

    return read


def by_owners(world: World, is_replicated: bool) -> dict:
    """Owners write their rows halved, without moments; and, in stage 0, double the gradient."""
    engine, before, weights = world.engine, world.snapshot(), world.weights()
    halves = {(o.name, o.row_start): o.master / 2 for o in engine.owned(with_moments=False)}
    engine.write(lambda name, *rows: Owned(name, (), *rows, halves[name, rows[0]], {}), None)
    expected = {k: v / 2 if k.startswith("master") else v for k, v in before.items()}
    seen = {
        "changed_otherwise": different(expected, world.snapshot())
        + different({n: w / 2 for n, w in weights.items()}, world.weights()),
        "updates_after": engine.num_updates,
    }
    if not is_replicated:
        return seen
    world.losses(1)
    plain, doubled = world.norm, []
    engine.write(lambda name, *rows: Owned(name, (), *rows, halves[name, rows[0]], {}), None)

    def double(owned: list[Owned]) -> None:
        doubled.extend((rows.name, rows.row_start) for rows in owned)
        for rows in owned:
            rows.master.mul_(2)

    engine.on_gradient = double
    world.losses(1)
    engine.on_gradient = None
    return seen | {"times": world.norm / plain, "all": set(doubled) == set(halves)}


def whole(ranks: list[dict], when: str) -> dict[str, Tensor]:
    """Whole tensors of a snapshot, by kind|name, from the rows of all ranks."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for rank in ranks:
        for key, values in rank[when].items():
            stem, _, start = key.rpartition("|")
            pieces.setdefault(stem, {})[int(start)] = values
    return {stem: torch.cat([rows[s] for s in sorted(rows)]) for stem, rows in pieces.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert (found[key] - tensor).norm() <= bound * tensor.norm(), key
