"""Messages come back as they were told; whatever is cut, forged or of others is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from gossamer.comm.codec import build_codec
from gossamer.comm.outer.message import (
    Message,
    Sent,
    pack_message,
    send_dense,
    send_sparse,
    unpack_message,
)
from gossamer.comm.run import WireError
from gossamer.comm.signing import SignatureError, Signer, Verifier
from gossamer.comm.wire import DIGEST_BYTES, HEADER, unpack_frame, unpack_head

SHAPES = {
    **{f"layers.{i}.experts.{e}.up": (128, 64) for i in range(2) for e in range(3)},
    "layers.0.odd": (70, 50),
    "norm": (300,),
    "bias": (5,),
    "scale": (),
    "dense": (40, 6),
    "half": (40, 6),
}


def sent_of(seed: int = 0) -> list[Sent]:
    seeded = torch.Generator().manual_seed(seed)

    def rows(name: str, *cut: slice) -> torch.Tensor:
        return 1e-3 * torch.randn(SHAPES[name], generator=seeded)[cut]

    sparse = [name for name in SHAPES if name not in ("dense", "half", "layers.0.odd")]
    sent = [send_sparse(name, SHAPES[name], 0, rows(name), 64) for name in sparse]
    upper, lower = rows("layers.0.odd", slice(0, 30)), rows("layers.0.odd", slice(30, 70))
    sent.append(send_sparse("layers.0.odd", SHAPES["layers.0.odd"], 30, lower, 200))
    sent.append(send_sparse("layers.0.odd", SHAPES["layers.0.odd"], 0, upper, 64))
    sent.append(send_dense("dense", SHAPES["dense"], 0, rows("dense")))
    sent.append(send_dense("half", SHAPES["half"], 8, rows("half", slice(8, 40)).bfloat16()))
    return [each for each in sent if each is not None]


MESSAGE = Message(
    run_id="run",
    round=7,
    replica="oslo",
    rank=1,
    num_ranks=3,
    incarnation=2,
    base_hash="00000000000000ab",
    inner_steps=210,
    tokens_before=2**40,
    tokens=12345,
    mask_version=6,
    sent=sent_of(),
)
DATA = pack_message(MESSAGE)


def keyed(message: Message) -> dict:
    return {(sent.run.name, sent.run.row_start): sent for sent in message.sent}


def assert_same(found: Message, told: Message) -> None:
    for field in dataclasses.fields(Message):
        if field.name != "sent":
            assert getattr(found, field.name) == getattr(told, field.name)
    assert keyed(found).keys() == keyed(told).keys()
    for key, sent in keyed(found).items():
        other = keyed(told)[key]
        assert (sent.k, sent.norm) == (other.k, other.norm)
        assert (sent.positions is None) == (other.positions is None)
        assert sent.positions is None or np.array_equal(sent.positions, other.positions)
        assert np.array_equal(sent.values, other.values) and sent.values.dtype == np.float32
        assert (sent.run.shape, sent.run.num_rows) == (other.run.shape, other.run.num_rows)


def test_a_message_comes_back():
    found = unpack_message(DATA, SHAPES)
    assert_same(found, MESSAGE)
    assert pack_message(found) == DATA


def test_an_empty_message_is_one():
    nothing = dataclasses.replace(MESSAGE, sent=[])
    assert_same(unpack_message(pack_message(nothing), {}), nothing)


def test_rows_without_a_change_send_nothing():
    assert send_sparse("norm", (300,), 0, torch.zeros(300), 64) is None


def test_the_norm_is_of_what_is_decoded():
    for sent in MESSAGE.sent:
        assert sent.norm == pytest.approx(np.linalg.norm(sent.values.astype(np.float64)), rel=1e-12)


@pytest.mark.parametrize(
    ("rows", "shape", "row_start", "message"),
    [
        (torch.zeros(4, 3), (4, 4), 0, r"w: \(4, 3\) from row 0 on are not rows of \(4, 4\)"),
        (torch.zeros(4, 4), (6, 4), 3, "w: .* from row 3 on"),
        (torch.zeros(3), (4,), 0, "w: "),
        (torch.zeros(8, 8).T[:4, :4], (4, 4), 0, "w: rows must lie on the CPU, contiguous"),
        (torch.zeros(4, 4).double(), (4, 4), 0, "w: .*float32"),
        (torch.full((4, 4), torch.nan), (4, 4), 0, "w: .*NaN and infinity cannot be sent"),
    ],
)
@pytest.mark.parametrize("send", [lambda *a: send_sparse(*a, 64), send_dense])
def test_rows_that_cannot_be_sent_are_refused(send, rows, shape, row_start, message):
    with pytest.raises(ValueError, match=message):
        send("w", shape, row_start, rows)


def test_what_is_sent_does_not_follow_the_rows():
    for rows in (torch.ones(40, 6), torch.ones(40, 6).bfloat16()):
        sent = send_dense("dense", (40, 6), 0, rows)
        rows.zero_()
        assert (sent.values == 1).all()


def test_a_row_is_sent_once():
    twice = [MESSAGE.sent[0], MESSAGE.sent[0]]
    with pytest.raises(ValueError, match="rows sent twice"):
        pack_message(dataclasses.replace(MESSAGE, sent=twice))


def test_the_log_takes_no_messages_for_versions():
    for unpack in (unpack_frame, unpack_head):
        with pytest.raises(WireError, match="of kind outer, not delta or anchor"):
            unpack(DATA)


def test_only_known_tensors_are_read():
    for shapes in ({}, SHAPES | {"norm": (301,)}):
        with pytest.raises(WireError, match="no tensor is called"):
            unpack_message(DATA, shapes)


def test_signatures():
    keys = [Ed25519PrivateKey.generate() for _ in range(2)]
    signed = pack_message(MESSAGE, Signer(keys[0]).sign)
    right, wrong = (Verifier(key.public_key(), "key") for key in keys)
    assert_same(unpack_message(signed, SHAPES, right), MESSAGE)
    for data, verifier in ((signed, wrong), (DATA, right), (DATA[:90], right)):
        with pytest.raises(SignatureError):
            unpack_message(data, SHAPES, verifier)


def forged(data: bytes) -> bytes:
    """The same with the digest that it should have."""
    body = data[:-DIGEST_BYTES]
    return body + hashlib.blake2b(body, digest_size=DIGEST_BYTES).digest()


def with_table(change) -> bytes:
    """DATA with another table."""
    fields = list(HEADER.unpack_from(DATA))
    end = HEADER.size + fields[15]
    table = json.loads(zstandard.decompress(DATA[HEADER.size : end]))
    change(table)
    raw = json.dumps(table).encode()
    packed = zstandard.compress(raw)
    fields[14], fields[15] = len(raw), len(packed)
    return forged(HEADER.pack(*fields) + packed + DATA[end:])


def experts_of(table: dict) -> dict:
    return next(family for family in table["families"] if len(family["counts"]) == 6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("about"), "about must be an object"),
        (lambda t: t.update(about=[]), "about must be an object"),
        (lambda t: t["about"].update(replica=""), "replica must be a name"),
        (lambda t: t["about"].update(tokens=[0, -1]), "tokens must be"),
        (lambda t: t["about"].update(masks=-1), "masks must be a version"),
        (lambda t: t["about"]["ks"].pop(), "ks and norms must have"),
        (lambda t: t["about"]["ks"].__setitem__(0, 4097), "ks must be"),
        (lambda t: t["about"]["ks"].__setitem__(0, True), "ks must be"),
        (lambda t: t["about"]["norms"].__setitem__(0, float("nan")), "norms must be finite"),
        (lambda t: t["about"]["norms"].__setitem__(0, 1e9), "the norm of"),
        (lambda t: t["about"]["norms"].__setitem__(2, 0.0), "the norm of"),
        (lambda t: experts_of(t).update(codecs=["dense"] * 6), "not topk of float32"),
        (lambda t: experts_of(t).update(dtype="int32"), "not topk of float32"),
        (lambda t: experts_of(t)["counts"].__setitem__(0, 99), "values where"),
    ],
)
def test_a_forged_table_is_refused(change, message):
    with pytest.raises(WireError, match=message):
        unpack_message(with_table(change), SHAPES)


def test_nan_in_dense_rows_is_refused():
    rows = torch.randn(40, 6)
    sent = send_dense("dense", (40, 6), 0, rows)
    rows[3, 3] = torch.nan
    bits = rows.numpy().reshape(-1).view(np.uint32)
    blocks = build_codec("dense").encode(sent.run, bits, None, bits)
    run = sent.run.coded("dense", 240, sent.run.block_rows, blocks, None)
    bad = dataclasses.replace(MESSAGE, sent=[dataclasses.replace(sent, run=run)])
    with pytest.raises(WireError, match="dense holds NaN or infinity"):
        unpack_message(pack_message(bad), SHAPES)


def mutant(rng: random.Random) -> bytes:
    """DATA with some bits or bytes of it changed, cut or repeated; half of them well digested."""
    data = bytearray(DATA)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data) - DIGEST_BYTES)
        kind = rng.randrange(4)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            size = rng.randrange(1, 40)
            data[at : at + size] = rng.randbytes(len(data[at : at + size]))
        elif kind == 2:
            data[at : at + rng.randrange(1, 40)] = b""
        else:
            data[at:at] = bytes(rng.choice((0, 255)) for _ in range(rng.randrange(1, 40)))
    return bytes(data) if rng.random() < 0.1 else forged(bytes(data))


def fuzz(number: int, seed: int) -> int:
    """Reads `number` mutants; returns how many were taken. Other errors come through."""
    rng, taken = random.Random(seed), 0
    for _ in range(number):
        data = mutant(rng)
        try:
            found = unpack_message(data, SHAPES)
        except WireError:
            continue
        taken += 1
        for sent in found.sent:
            assert np.isfinite(sent.values).all() and len(sent.values) == sent.run.count
            if sent.positions is not None:
                assert len(np.unique(sent.positions)) == len(sent.positions)
                assert sent.positions.max() < sent.run.num_elements
    return taken


def test_mutants_are_refused_or_sound():
    fuzz(2000, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["", "x86-64"])
def test_mutants_with_bounds_checked(processor, tmp_path):
    """In a fresh process, as numba must compile anew; once for a processor without wide vectors."""
    code = "import test_outer_message as t; print(t.fuzz(20000, seed=1), t.DATA.hex())"
    settings = {"NUMBA_BOUNDSCHECK": "1", "NUMBA_CACHE_DIR": str(tmp_path)}
    if processor:
        settings |= {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **settings, "PYTHONPATH": os.path.dirname(__file__)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # the same bytes, whatever the processor
    assert done.stdout.split()[1] == DATA.hex()
