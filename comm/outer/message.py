"""What one rank of a replica says of a round: one frame (wire.py), with runs of its own codec.

The one idea: a message holds what every receiver will add, exactly: dequantised values, and the
norms that the sender found once in float64; so all who read it do the same sums.

Of a frame's header `version` is the round, `base_version` the same with the hash of the weights
that the round began with, `step` the sender's inner steps so far, `writer_epoch` its incarnation,
`part` and `num_parts` its rank and the ranks of its replica, `num_changed` all values sent. The
table's "about" holds `replica`, `tokens` (of its stream: before the round, and in it), `masks`
(their version, where there are any) and one entry a run of `ks` (0: dense) and `norms`. Runs are
coded by `topk` (sparse.py) or whole by `dense`, in float32 or bfloat16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gossamer.comm.codec import build_codec
from gossamer.comm.codec.bits import UNSIGNED, dtype_name, tensor_bits
from gossamer.comm.outer.sparse import BLOCK, compress, decompress, norm_of
from gossamer.comm.run import BLOCK_ROWS, DTYPE_BYTES, Run, WireError, overlap
from gossamer.comm.table import in_families
from gossamer.comm.wire import Frame, frame_digest, frame_signature, pack_frame, unpack_frame

if TYPE_CHECKING:
    from gossamer.comm.signing import Verifier

DENSE_BLOCK_ELEMENTS = 1 << 20
DENSE_DTYPES = ("float32", "bfloat16")
# sums in another order differ by less
NORM_TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Sent:
    """What a message holds of rows [row_start, row_start + num_rows) of a tensor."""

    run: Run
    """Name, shape, rows, and the code."""
    k: int
    """Kept of every 4096 elements; 0 where all are sent."""
    positions: np.ndarray | None
    """Flat in the rows, uint32, each once; None where all are sent."""
    values: np.ndarray
    """Dequantised, fp32, flat."""
    norm: float
    """Euclidean norm of the values, as the sender found it in float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One rank's part of what a replica sends after a round."""

    run_id: str
    round: int
    replica: str
    rank: int = 0
    num_ranks: int = 1
    incarnation: int = 0
    """Counts the starts of a replica of that name."""
    base_hash: str
    """Hash of the weights that the round began with, 16 hex digits."""
    inner_steps: int
    """Of the sender so far."""
    tokens_before: int = 0
    """Of the sender's stream, trained before this round."""
    tokens: int
    """Trained by the sender in this round."""
    mask_version: int = 0
    """The round before which the masks that it began with last changed; 0 where none did."""
    sent: list[Sent]


def send_sparse(
    name: str, shape: tuple[int, ...], row_start: int, rows: torch.Tensor, k: int
) -> Sent | None:
    """The greatest k of every 4096 elements of `rows`, fp32 [n, *shape[1:]]; None where all are 0.

    Raises ValueError, naming the tensor, for rows that do not fit or are not finite.
    """
    run = _run_of(name, shape, row_start, rows)
    try:
        sparse = compress(rows.detach(), k)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if len(sparse.positions) == 0:
        return None
    run = run.coded("topk", len(sparse.values), _bands(run), [sparse.payload], None)
    return Sent(run, k, sparse.positions, sparse.values, norm_of(sparse.values))


def send_dense(name: str, shape: tuple[int, ...], row_start: int, rows: torch.Tensor) -> Sent:
    """All of `rows`, [n, *shape[1:]], fp32 or bf16. Raises as `send_sparse`."""
    run = _run_of(name, shape, row_start, rows)
    if run.dtype not in DENSE_DTYPES:
        raise ValueError(f"{name}: dtype must be {' or '.join(DENSE_DTYPES)}, not {run.dtype}")
    values = rows.detach().to(torch.float32, copy=True).reshape(-1).numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: NaN and infinity cannot be sent")
    block_rows = max(1, DENSE_BLOCK_ELEMENTS // (run.row_elements * BLOCK_ROWS)) * BLOCK_ROWS
    run = run.coded("dense", len(values), min(block_rows, _bands(run)), [], None)
    bits = tensor_bits(rows)
    blocks = build_codec("dense").encode(run, bits, None, bits)
    run = run.coded("dense", len(values), run.block_rows, blocks, None)
    return Sent(run, 0, None, values, norm_of(values))


def pack_message(message: Message, sign: Callable[[bytes], bytes] | None = None) -> bytes:
    """The frame's bytes, signed by `sign(digest)` where it is given.

    Raises ValueError where a row is sent twice.
    """
    by_run = {id(sent.run): sent for sent in message.sent}
    runs = in_families([sent.run for sent in message.sent])
    twice = overlap(runs)
    if twice:
        raise ValueError(f"rows sent twice: {twice}")
    frame = Frame(
        kind="outer",
        run_id=message.run_id,
        version=message.round,
        base_version=message.round,
        base_state_hash=message.base_hash,
        step=message.inner_steps,
        writer_epoch=message.incarnation,
        part=message.rank,
        num_parts=message.num_ranks,
        num_changed=sum(run.count for run in runs),
        hash_gain=0,
        runs=runs,
        about={
            "replica": message.replica,
            "tokens": [message.tokens_before, message.tokens],
            "ks": [by_run[id(run)].k for run in runs],
            "norms": [by_run[id(run)].norm for run in runs],
        }
        | ({"masks": message.mask_version} if message.mask_version else {}),
    )
    return pack_frame(frame, sign)


def unpack_message(
    data: bytes,
    shapes: Mapping[str, tuple[int, ...]],
    verifier: Verifier | None = None,
) -> Message:
    """Reads and checks a message: digest, every run, every norm, and that no row is told twice.

    Tensors that `shapes` lacks are refused before anything is decoded, and with `verifier` what it
    did not sign. Raises WireError, SignatureError.
    """
    if verifier is not None:
        verifier.check(bytes.fromhex(frame_digest(data)), frame_signature(data), "a message")
    frame = unpack_frame(data, kinds=("outer",))
    replica, tokens, ks, norms = _read_about(frame.about, len(frame.runs))
    _expect(frame.base_version == frame.version, "it goes on another round")
    for run in frame.runs:
        is_known = shapes.get(run.name) == run.shape
        _expect(is_known, f"no tensor is called {run.name} and has shape {run.shape}")
    twice = overlap(frame.runs)
    _expect(twice is None, f"rows are told twice: {twice}")
    counted = sum(run.count for run in frame.runs)
    _expect(counted == frame.num_changed, f"{counted} values where {frame.num_changed} are told of")
    return Message(
        run_id=frame.run_id,
        round=frame.version,
        replica=replica,
        rank=frame.part,
        num_ranks=frame.num_parts,
        incarnation=frame.writer_epoch,
        base_hash=frame.base_state_hash or "",
        inner_steps=frame.step,
        tokens_before=tokens[0],
        tokens=tokens[1],
        mask_version=_read_mask_version(frame.about),
        sent=[_read_sent(*each) for each in zip(frame.runs, ks, norms, strict=True)],
    )


def _read_sent(run: Run, k: int, norm: float) -> Sent:
    _expect(run.model is None, f"{run.name} has a model")
    if k:
        coded_as = (run.codec, run.dtype)
        _expect(coded_as == ("topk", "float32"), f"{run.name} is {coded_as}, not topk of float32")
        _expect(run.num_blocks == 1, f"{run.name} has {run.num_blocks} blocks, not 1")
        sparse = decompress(run.payload, k, run.count, run.num_rows, run.row_elements)
        positions, values = sparse.positions, sparse.values
    else:
        _expect(run.codec == "dense", f"codec of {run.name} is {run.codec}, not dense")
        _expect(run.dtype in DENSE_DTYPES, f"dtype of {run.name} is {run.dtype}")
        empty = np.empty(run.num_elements, UNSIGNED[DTYPE_BYTES[run.dtype]])
        _, bits = build_codec("dense").decode(run, empty)
        if run.dtype == "bfloat16":
            bits = bits.astype(np.uint32) << 16
        positions, values = None, bits.view(np.float32)
        _expect(bool(np.isfinite(values).all()), f"{run.name} holds NaN or infinity")
    found = norm_of(values)
    is_near = math.isclose(found, norm, rel_tol=NORM_TOLERANCE)
    _expect(is_near, f"the norm of {run.name} is told as {norm}, its values have {found}")
    return Sent(run, k, positions, values, norm)


def _read_about(about: Any, num_runs: int) -> tuple[str, list[int], list[int], list[float]]:  # noqa: ANN401
    _expect(isinstance(about, dict), "about must be an object")
    replica, tokens, ks, norms = (about.get(key) for key in ("replica", "tokens", "ks", "norms"))
    _expect(isinstance(replica, str) and bool(replica), "replica must be a name")
    are_counts = isinstance(tokens, list) and len(tokens) == 2
    are_counts = are_counts and all(type(each) is int and 0 <= each < 2**61 for each in tokens)
    _expect(are_counts, "tokens must be two counts")
    are_lists = isinstance(ks, list) and isinstance(norms, list)
    _expect(are_lists and len(ks) == len(norms) == num_runs, "ks and norms must have one each run")
    _expect(all(type(k) is int and 0 <= k <= BLOCK for k in ks), f"ks must be from 0 to {BLOCK}")
    are_norms = all(type(norm) is float and 0 <= norm < math.inf for norm in norms)
    _expect(are_norms, "norms must be finite")
    return replica, tokens, ks, norms


def _read_mask_version(about: dict[str, Any] | None) -> int:
    version = (about or {}).get("masks", 0)
    _expect(type(version) is int and 0 <= version < 2**61, "masks must be a version")
    return version


def _run_of(name: str, shape: tuple[int, ...], row_start: int, rows: torch.Tensor) -> Run:
    """The run of these rows, not coded yet."""
    shape = tuple(shape)
    is_vector = len(shape) < 2
    num_rows = 1 if is_vector else len(rows)
    if is_vector:
        fits = rows.shape == shape and row_start == 0
    else:
        fits = rows.shape[1:] == shape[1:] and 0 <= row_start <= shape[0] - num_rows
    if not fits or rows.numel() == 0:
        raise ValueError(
            f"{name}: {tuple(rows.shape)} from row {row_start} on are not rows of {shape}"
        )
    if rows.device.type != "cpu" or not rows.is_contiguous():
        raise ValueError(f"{name}: rows must lie on the CPU, contiguous")
    return Run(name, dtype_name(rows.dtype), shape, row_start, num_rows)


def _bands(run: Run) -> int:
    """The run's rows as whole bands."""
    return -(-run.num_rows // BLOCK_ROWS) * BLOCK_ROWS


def _expect(good: bool, what: str) -> None:
    if not good:
        raise WireError(f"not a sound message: {what}")
