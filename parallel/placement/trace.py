"""Routing traces: which experts each token went to, in every layer. Ours, Megatron's, FLAME-MoE's.

The one idea: a trace is whole or refused. Each token has a row in every layer, so co-activation and
flows between layers can be counted; a hole, an expert out of range or a broken line is an error
that names file, line and reason.

Shapes: L layers, T tokens, K slots (top-k), E experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LAYER_FILE = re.compile(r"layer_(\d+)\.parquet")
STEP_FOLDER = re.compile(r"iter_(\d+)")
FIELDS = ("step", "layer", "rank", "num_tokens", "topk", "top_indices")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trace:
    """Tokens in the order (step, rank, place in the rank's batch)."""

    expert_LTK: NDArray[np.int16]
    """-1 is a spare slot, as routers of fewer than K experts leave them."""
    step_T: NDArray[np.int64]
    """Optimizer step that routed the token."""
    rank_T: NDArray[np.int64]
    """Rank of the world that held the token."""
    layers: tuple[int, ...]
    num_experts: int

    @property
    def steps(self) -> list[int]:
        return np.unique(self.step_T).tolist()

    def between(self, first: int, stop: int) -> Trace:
        """The tokens of steps first <= step < stop. Raises ValueError when there are none."""
        keep_T = (self.step_T >= first) & (self.step_T < stop)
        if not keep_T.any():
            raise ValueError(f"the trace has no token of the steps {first} to {stop - 1}")
        return replace(
            self,
            expert_LTK=self.expert_LTK[:, keep_T],
            step_T=self.step_T[keep_T],
            rank_T=self.rank_T[keep_T],
        )


def load_trace(path: Path, num_experts: int | None = None, max_tokens: int = 65_536) -> Trace:
    """Reads a trace; whose it is, is seen from the files.

    `path`: a .jsonl file or a folder of them (router_trace_rank*.jsonl, as Megatron-Core and our
    trainer write), or a folder of FLAME-MoE's actives (iter_N/layer_NN.parquet, or one iter_N).
    `num_experts`: of a layer; None = one more than the largest index seen. `max_tokens`: of each
    FLAME-MoE iteration, the first are read. Raises ValueError, naming file, line and reason.
    """
    if path.is_file():
        return _from_blocks(_jsonl_blocks([path], num_experts), num_experts, path)
    lines, tables = sorted(path.glob("*.jsonl")), sorted(path.rglob("layer_*.parquet"))
    if lines:
        return _from_blocks(_jsonl_blocks(lines, num_experts), num_experts, path)
    if tables:
        return _from_blocks(_parquet_blocks(tables, num_experts, max_tokens), num_experts, path)
    raise ValueError(f"{path} holds no routing trace: expected *.jsonl or layer_NN.parquet")


@dataclass(slots=True)
class _Block:
    """What one rank routed in one micro-batch: [T, K] for each layer, and where it was read."""

    step: int
    rank: int
    where: str
    experts: dict[int, NDArray[np.int16]]


def _from_blocks(blocks: list[_Block], num_experts: int | None, path: Path) -> Trace:
    """Joins the blocks; refuses holes."""
    layers = tuple(sorted({layer for block in blocks for layer in block.experts}))
    ranks, steps = sorted({b.rank for b in blocks}), sorted({b.step for b in blocks})
    for block in blocks:
        if missing := set(layers) - set(block.experts):
            raise ValueError(
                f"{block.where}: step {block.step} of rank {block.rank} has no layer {min(missing)}"
            )
        sizes = {layer: len(block.experts[layer]) for layer in layers}
        if len(set(sizes.values())) > 1:
            raise ValueError(
                f"{block.where}: the layers of step {block.step}, rank {block.rank} have different"
                f" numbers of tokens: {sizes}"
            )
    seen = {(block.step, block.rank) for block in blocks}
    for rank in range(max(ranks, default=-1) + 1):
        for step in steps:
            if (step, rank) not in seen:
                raise ValueError(f"{path}: no line for step {step} of rank {rank}")
    if not sum(len(next(iter(b.experts.values()))) for b in blocks):
        raise ValueError(f"{path}: the trace has no token")
    blocks.sort(key=lambda block: (block.step, block.rank))
    slots = max(e.shape[1] for b in blocks for e in b.experts.values())
    expert_LTK = np.stack(
        [np.concatenate([_padded(b.experts[layer], slots) for b in blocks]) for layer in layers]
    )
    sizes_B = [len(block.experts[layers[0]]) for block in blocks]
    return Trace(
        expert_LTK=expert_LTK,
        step_T=np.repeat([block.step for block in blocks], sizes_B),
        rank_T=np.repeat([block.rank for block in blocks], sizes_B),
        layers=layers,
        num_experts=num_experts or int(expert_LTK.max()) + 1,
    )


def _padded(expert_TK: NDArray[np.int16], slots: int) -> NDArray[np.int16]:
    missing = slots - expert_TK.shape[1]
    return np.pad(expert_TK, ((0, 0), (0, missing)), constant_values=-1)


def _jsonl_blocks(paths: list[Path], num_experts: int | None) -> list[_Block]:
    return [block for path in paths for block in _file_blocks(path, num_experts)]


def _file_blocks(path: Path, num_experts: int | None) -> list[_Block]:
    """The file's blocks: a layer that comes again begins the next micro-batch.

    A step below one before it is a resumed run's: what the first attempt did from there on was
    done again, and is dropped.
    """
    blocks: list[_Block] = []
    last: dict[int, _Block] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            where = f"{path} line {number}"
            record = _record(line, where)
            if record is None:
                continue
            step, rank, layer = record["step"], record["rank"], record["layer"]
            block = last.get(rank)
            if block is None or block.step != step or layer in block.experts:
                if block is not None and step < block.step:
                    blocks = [b for b in blocks if b.rank != rank or b.step < step]
                block = last[rank] = _Block(step, rank, where, {})
                blocks.append(block)
            block.experts[layer] = _checked(record, num_experts, where)
    return blocks


def _record(line: str, where: str) -> dict | None:
    """A line's fields; None for those of other blocks and stages than the decoder's dispatch."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or any(name not in record for name in FIELDS):
        raise ValueError(f"{where} is no line of a router trace: expected {', '.join(FIELDS)}")
    if record.get("stage", "pre_dispatch") != "pre_dispatch":
        return None
    if record.get("block", "decoder") != "decoder":
        return None
    for name in FIELDS[:-1]:
        if type(record[name]) is not int or record[name] < 0:
            raise ValueError(f"{where}: {name} is {record[name]!r}; expected a number of 0 or more")
    return record


def _checked(record: dict, num_experts: int | None, where: str) -> NDArray[np.int16]:
    """top_indices as [T, K], in range."""
    shape = record["num_tokens"], record["topk"]
    try:
        expert_TK = np.array(record["top_indices"], dtype=np.int64).reshape(shape)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"{where}: top_indices is not {shape[0]} tokens of {shape[1]} whole numbers"
        ) from error
    return in_range(expert_TK, num_experts, where)


def in_range(expert_TK: NDArray, num_experts: int | None, where: str) -> NDArray[np.int16]:
    """The same, small. Raises ValueError for an expert out of range or twice in a token."""
    stop = num_experts or np.iinfo(np.int16).max
    wrong_TK = (expert_TK < -1) | (expert_TK >= stop)
    if wrong_TK.any():
        token = int(wrong_TK.any(1).argmax())
        expert = int(expert_TK[wrong_TK][0])
        raise ValueError(f"{where}: token {token} goes to expert {expert}, there are {stop}")
    sorted_TK = np.sort(expert_TK, axis=1)
    twice_TK = (sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] >= 0)
    if twice_TK.any():
        token = int(twice_TK.any(1).argmax())
        raise ValueError(f"{where}: token {token} goes to one expert twice")
    return expert_TK.astype(np.int16)


def _parquet_blocks(paths: list[Path], num_experts: int | None, max_tokens: int) -> list[_Block]:
    """FLAME-MoE's: a file a layer and iteration, rows aligned; the ranks are not in it."""
    blocks: dict[Path, _Block] = {}
    for path, layer in _layer_files(paths):
        folder = STEP_FOLDER.fullmatch(path.parent.name)
        step = int(folder[1]) if folder else 0
        block = blocks.setdefault(path.parent, _Block(step, 0, str(path.parent), {}))
        block.experts[layer] = in_range(_parquet_rows(path, max_tokens), num_experts, str(path))
    return list(blocks.values())


def _layer_files(paths: list[Path]) -> Iterator[tuple[Path, int]]:
    for path in paths:
        if name := LAYER_FILE.fullmatch(path.name):
            yield path, int(name[1])


def _parquet_rows(path: Path, max_tokens: int) -> NDArray[np.int64]:
    """The first rows of the column `indices`, [T, K]."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows: list[NDArray[np.int64]] = []
    left = max_tokens
    try:
        for batch in pq.ParquetFile(path).iter_batches(min(left, 65_536), columns=["indices"]):
            lists = batch.column(0)[:left]
            lengths = np.unique(lists.value_lengths().to_numpy(zero_copy_only=False))
            if lists.null_count or len(lengths) > 1 or lists.flatten().null_count:
                raise ValueError("rows of `indices` are missing or of different lengths")
            flat = lists.flatten().to_numpy(zero_copy_only=False)
            rows.append(flat.astype(np.int64).reshape(len(lists), -1))
            left -= len(lists)
            if left <= 0:
                break
        if not rows:
            raise ValueError("it has no row")
        return np.concatenate(rows)
    except (pa.ArrowException, AttributeError, IndexError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a table of FLAME-MoE's actives: {error}") from error
