"""`gossamer bench sync`: what a weight update costs, ours beside what others send, in one run.

The one idea: all contestants bring the same live weights from the same old bits to the same new
ones, take turns so that noise hits all of them, run on one thread, and are checked bit for bit.
Times are the best of several turns. Bytes really cross a TCP connection, over links that are
really shaped where the machine allows it.

Columns of a row: `encode_s` old and new weights to bytes; `wire_s` their transfer; `decode_s` bytes
to changes in memory; `stage_s` decoding and all that is proven before the engine must stop;
`commit_s` the write into the live weights; `pause_s` the part of it in which an engine stands
still. `memcpy_s` is a copy of the same weights, in turn with the contestants. `bound_bytes` is the
entropy bound of comm/codec/bound.py. `link_mbit` is null for loopback.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from gossamer.comm.codec.bits import dtype_name, tensor_bits
from gossamer.comm.codec.bound import bound_bytes
from gossamer.launch.bench.ours import Ours
from gossamer.launch.bench.peers import OURS, PEERS, Peer, Weights
from gossamer.launch.bench.traces import Trace, load_trace, simulate_trace
from gossamer.launch.bench.wire import open_wire
from gossamer.launch.testbed import unusable
from torch import Tensor

LINKS_MBIT = (100, 1000)
DENSITIES, QUICK_DENSITIES = (0.0002, 0.002, 0.01, 0.1, 0.5, 1.0), (0.002, 1.0)
TURNS, QUICK_TURNS = 5, 2
COLUMNS = ("encode_s", "decode_s", "stage_s", "commit_s", "pause_s")

Send = Callable[[bytes], float]


def bench_sync(json_path: Path, traces_folder: Path | None, quick: bool) -> None:
    """Records the traces that are missing in the folder, measures, and writes the JSON.

    Without a folder the traces are recorded anew and dropped. Without root, namespaces or
    iproute2 only loopback is measured, and stderr says so.
    """
    torch.set_num_threads(1)
    links: list[float | None] = [None]
    if reason := unusable():
        print(f"only loopback is measured: {reason}", file=sys.stderr)
    else:
        links += LINKS_MBIT
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        wires = {mbit: stack.enter_context(open_wire(mbit)) for mbit in links}
        for trace in _traces(traces_folder or temporary, quick):
            print(f"{trace.name}: {trace.how}", file=sys.stderr, flush=True)
            rows += measure(trace, wires, QUICK_TURNS if quick else TURNS)
    command = " ".join(["gossamer bench sync", *["--quick"] * quick])
    result = {"machine": machine(), "command": command, "rows": rows}
    partial = json_path.with_name(f".{json_path.name}")
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(json_path)


def measure(trace: Trace, wires: dict[float | None, Send], turns: int) -> list[dict[str, Any]]:
    """The rows of one trace: its last step, by each contestant over each wire."""
    before, after = trace.snapshots[-2:]
    old, new = _bits(before), _bits(after)
    full_bytes = sum(array.nbytes for array in new.values())
    num_changed = sum(int(np.count_nonzero(old[name] != new[name])) for name in new)
    bound = sum(bound_bytes(old[name], new[name], dtype_name(after[name].dtype)) for name in new)
    shared = {
        "density": num_changed / sum(map(len, new.values())),
        "full_bytes": full_bytes,
        "bound_bytes": round(bound),
    }
    memcpy_s, frames, best = _take_turns(trace, old, new, turns)
    return [
        {"trace": trace.name, "codec": codec, **shared, "bytes": len(frames[codec])}
        | {"link_mbit": mbit, "memcpy_s": memcpy_s, "wire_s": _wire_s(send, frames[codec])}
        | best[codec]
        for codec in frames
        for mbit, send in wires.items()
    ]


def _take_turns(
    trace: Trace, old: Weights, new: Weights, turns: int
) -> tuple[float, dict[str, bytes], dict[str, dict[str, float]]]:
    """Best seconds of a copy; each contestant's bytes, and its best seconds by column."""
    before, after = trace.snapshots[-2:]
    frames: dict[str, bytes] = {}
    taken: dict[str, list[dict[str, float]]] = {}
    memcpy_s = []
    live = {name: array.copy() for name, array in old.items()}
    with tempfile.TemporaryDirectory() as folder:
        ours = Ours(Path(folder), before)
        for _ in range(turns):
            started_s = perf_counter()
            for name, array in old.items():
                np.copyto(live[name], array)
            memcpy_s.append(perf_counter() - started_s)
            for peer in PEERS:
                frames[peer.name], seconds = _peer_step(peer, old, new, live)
                taken.setdefault(peer.name, []).append(seconds)
                _check_equal(peer.name, live, new)
                for name, array in old.items():
                    np.copyto(live[name], array)
            frames[OURS], seconds = ours.step(after)
            taken.setdefault(OURS, []).append(seconds)
            _check_equal(OURS, ours.live, new)
            ours.step(before)
    best = {
        codec: {column: min(turn[column] for turn in all_turns) for column in COLUMNS}
        for codec, all_turns in taken.items()
    }
    return min(memcpy_s), frames, best


def _peer_step(
    peer: Peer, old: Weights, new: Weights, live: Weights
) -> tuple[bytes, dict[str, float]]:
    """Brings `live` from old to new; the bytes, and seconds by column."""
    started_s = perf_counter()
    data = peer.encode(old, new)
    encoded_s = perf_counter()
    staged = peer.decode(data, live)
    decoded_s = perf_counter()
    peer.commit(staged, live)
    commit_s = perf_counter() - decoded_s
    decode_s = decoded_s - encoded_s
    # a peer proves nothing before it writes, and stands still while it does
    return data, {
        "encode_s": encoded_s - started_s,
        "decode_s": decode_s,
        "stage_s": decode_s,
        "commit_s": commit_s,
        "pause_s": commit_s,
    }


def _check_equal(codec: str, live: Weights, new: Weights) -> None:
    wrong = [name for name in new if not np.array_equal(live[name], new[name])]
    if wrong:
        raise RuntimeError(f"{codec} left other bits than the new ones in {', '.join(wrong)}")


def _wire_s(send: Send, data: bytes) -> float:
    """Best seconds of a few transfers; one is enough of a long one."""
    best_s = send(data)
    for _ in range(4):
        if best_s < 0.25:
            best_s = min(best_s, send(data))
    return best_s


def _traces(folder: Path, quick: bool) -> Iterable[Trace]:
    """Those recorded from training, then those simulated, one at a time."""
    from gossamer.launch.bench import record

    rates = record.QUICK_LEARNING_RATES if quick else record.LEARNING_RATES
    for model in record.MODELS:
        name = f"{model}-quick" if quick else model
        paths = [folder / f"{record.trace_name(name, lr)}.safetensors" for lr in rates]
        if not all(path.is_file() for path in paths):
            # in a process of its own: the threads of a trainer would disturb what is measured
            command = [sys.executable, "-m", record.__name__, name, str(folder)]
            subprocess.run(command, check=True)
        for path in paths:
            yield load_trace(path)
    for density in QUICK_DENSITIES if quick else DENSITIES:
        yield simulate_trace(density, *((4, 256) if quick else (16, 1024)))


def _bits(tensors: dict[str, Tensor]) -> Weights:
    return {name: tensor_bits(tensor) for name, tensor in tensors.items()}


def machine() -> str:
    """The processor, its cores and the system, in one line."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    name = models[0] if models else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores, {platform.system()} {platform.release()}"
