"""A mutated frame gives an error or the exact state: never a crash, a hang or a wrong tensor.

Half of the mutants get a right digest, a right signature and a manifest that names them, as a
forger with the key would make them, so that the decoder and the state hash are what is tested.
The everyday run takes a few thousand; `slow` takes a million, in two processes.
"""

import dataclasses
import hashlib
import os
import random
import subprocess
import sys
import time
from unittest import mock

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gossamer.comm.codec import CODECS
from gossamer.comm.codec.ladder import Choice
from gossamer.comm.codec.part import PartEncoder, Rows
from gossamer.comm.live import ApplyError, LiveWeights
from gossamer.comm.log import Manifest, PartRef
from gossamer.comm.signing import SignatureError, Signer, Verifier
from gossamer.comm.state_hash import format_hash
from gossamer.comm.wire import (
    DIGEST_BYTES,
    HEADER,
    SIGNATURE_BYTES,
    Frame,
    frame_digest,
    frame_signature,
    pack_frame,
)

SHAPES = {
    "layers.0.up": ("bfloat16", (70, 12)),
    "layers.1.up": ("bfloat16", (70, 12)),
    "layers.0.scale": ("float32", (64,)),
    "layers.0.q": ("int8", (66, 8)),
    "norm": ("bfloat16", (40,)),
}
MANIFEST = {
    "run_id": "fuzz", "version": 1, "step": 1, "writer_epoch": 1, "parent_version": 0,
    "parent_state_hash": None, "parent_hash": None, "base_version": 0, "rewind_to_step": None,
    "anchor": [], "num_tensors": len(SHAPES), "num_changed": 0, "num_elements": 0, "full_bytes": 0,
    "created_s": 0.0, "signature": None,
}  # fmt: skip


def tensor_of(bits, dtype, shape):
    raw = torch.from_numpy(bits.view(np.uint8).copy())
    return raw.view(getattr(torch, dtype)).reshape(shape)


def encoded(kind, seed):
    """(tensors at the base, at the version, manifest, frame) of a delta of one kind of change."""
    rng = np.random.default_rng(seed)
    states = [{}, {}]
    for name, (dtype, shape) in SHAPES.items():
        width = getattr(torch, dtype).itemsize
        bits = {1: np.uint8, 2: np.uint16, 4: np.uint32}[width]
        old = rng.integers(0, 2 ** (8 * width), int(np.prod(shape)), bits)
        if kind == "entropy":
            new = old + (rng.random(len(old)) < 0.2) * rng.integers(1, 9, len(old))
        else:
            new = np.where(rng.random(len(old)) < 0.95, rng.permutation(old), old)
        for state, values in zip(states, (old, new.astype(bits)), strict=True):
            state[name] = tensor_of(values, dtype, shape)
    rows = [[Rows(n, SHAPES[n][1], 0, v) for n, v in state.items()] for state in states]
    encoder = PartEncoder()
    first = encoder.encode(rows[0], with_delta=False, with_anchor=True)
    encoder.move_base(first)
    choice = Choice(kind, {"entropy": 0, "planes": 0, "dense": 2**40}, "for the test")
    with mock.patch("gossamer.comm.codec.part.choose", lambda *_: choice):
        part = encoder.encode(rows[1], with_delta=True, with_anchor=False)
    base_hash = format_hash(first.anchor_gain)
    state_hash = format_hash(first.anchor_gain + part.delta_gain)
    frame = pack_frame(
        Frame("delta", "fuzz", 1, 0, base_hash, 1, 1, 0, 1, part.num_changed, part.delta_gain,
              part.delta),
        lambda digest: bytes(SIGNATURE_BYTES),
    )  # fmt: skip
    known = {field.name for field in dataclasses.fields(Manifest)}
    entries = MANIFEST | {
        "base_state_hash": base_hash,
        "state_hash": state_hash,
        "delta": [PartRef("part", len(frame), frame_digest(frame))],
    }
    return (
        *states,
        Manifest(**{key: value for key, value in entries.items() if key in known}),
        frame,
    )


def live_on(state, manifest):
    """Live weights that hold the base."""
    live = LiveWeights({name: values.clone() for name, values in state.items()})
    live.version, live._run_id, live._state_hash = 0, "fuzz", manifest.base_state_hash
    live._sums = {name: live._hash_live(name) for name in state}
    assert live.audit() == manifest.base_state_hash
    return live


def mutated(frame, other, random_):
    """A frame with some bytes changed, cut, doubled, moved or taken from another frame."""
    data = bytearray(frame)
    for _ in range(random_.choice([1, 1, 1, 2, 5])):
        at = random_.randrange(len(data))
        how = random_.randrange(6)
        if how <= 2:
            data[at] ^= 1 << random_.randrange(8)
        elif how == 3:
            data[at : at + random_.randrange(1, 9)] = random_.randbytes(random_.randrange(9))
        elif how == 4:
            end = min(len(data), at + random_.randrange(1, 40))
            data[at:end] = bytes(reversed(data[at:end]))
        else:
            data[at : at + 16] = other[at : at + 16]
    return bytes(data[: random_.randrange(len(data))] if random_.random() < 0.05 else data)


def forged(data, frame, signer):
    """`data` with lengths, digest and signature made right."""
    if len(data) < HEADER.size + DIGEST_BYTES + SIGNATURE_BYTES:
        return data
    body = data[: -DIGEST_BYTES - SIGNATURE_BYTES]
    if len(data) != len(frame) and len(body) > HEADER.size:
        fields = list(HEADER.unpack_from(body))
        fields[16] = max(0, len(body) - HEADER.size - fields[15])
        body = HEADER.pack(*fields) + body[HEADER.size :]
    digest = hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()
    return body + digest + signer.sign(digest)


def fuzz(count, seed):
    """Applies `count` mutants; returns how many were refused, and how many left the exact state."""
    random_ = random.Random(seed)
    key = Ed25519PrivateKey.generate()
    signer, verifier = Signer(key), Verifier(key.public_key(), "the key")
    cases = [encoded(kind, seed) for kind in CODECS]
    lives = [live_on(case[0], case[2]) for case in cases]
    refused = exact = 0
    for turn in range(count):
        which = turn % 3
        _, after, manifest, frame = cases[which]
        data = mutated(frame, cases[(which + 1) % 3][3], random_)
        live = lives[which]
        try:
            if turn % 2:
                data = forged(data, frame, signer)
                verifier.check(bytes.fromhex(frame_digest(data)), frame_signature(data), "part")
                ref = PartRef("part", len(data), frame_digest(data))
                manifest = dataclasses.replace(manifest, delta=[ref])
            staged = live.stage(manifest, [data])
        except (ApplyError, SignatureError):
            refused += 1
            assert live.version == 0
            continue
        exact += 1
        live.commit(staged)
        for name, values in after.items():
            assert torch.equal(live.tensors[name].view(torch.uint8), values.view(torch.uint8))
        assert live.audit() == manifest.state_hash
        live.rollback()
    for live, case in zip(lives, cases, strict=True):
        assert live.audit() == case[2].base_state_hash
    return refused, exact


def test_thousands_of_mutants_are_refused_or_exact():
    refused, exact = fuzz(3000, 0)
    assert refused + exact == 3000 and refused > 2500


def run_apart(count, seeds, **env):
    """`fuzz` in a process of its own for each seed."""
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(count), str(seed)],
            env=os.environ | {"OMP_NUM_THREADS": "1"} | env,
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in seeds
    ]
    try:
        for worker in workers:
            out, _ = worker.communicate()
            assert worker.returncode == 0
            print(out)
    finally:
        for worker in workers:
            worker.kill()  # nothing happens to one that is over
            worker.wait()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_mutants_are_refused_or_exact():
    run_apart(500_000, (1, 2))


@pytest.mark.slow
def test_no_mutant_reads_or_writes_outside_of_an_array(tmp_path):
    """The same with numba's bounds checks on."""
    run_apart(50_000, [3], NUMBA_BOUNDSCHECK="1", NUMBA_CACHE_DIR=str(tmp_path))


if __name__ == "__main__":
    started_s = time.monotonic()
    refused, exact = fuzz(int(sys.argv[1]), int(sys.argv[2]))
    print(f"{refused} refused, {exact} exact, {time.monotonic() - started_s:.0f} s")
