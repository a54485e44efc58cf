import json
import re
from dataclasses import replace

import pytest
from gossamer.comm.fold import fold
from gossamer.comm.live import ApplyError, LiveWeights
from gossamer.comm.log import LogError, WeightLog
from gossamer.comm.manifest import PartRef, manifest_name, pack_manifest
from gossamer.comm.publisher import Publisher
from gossamer.comm.reader import read_state
from gossamer.comm.signing import SignatureError, Signer, Verifier, write_keys
from gossamer.comm.subscriber import Subscriber
from gossamer.comm.verify import verify
from gossamer.comm.wire import frame_digest, pack_frame, unpack_frame
from toy_weights import CONFIG, moved, rows_of, same_bits, toy_state, zeros


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """(signer, path of its public key), and the same of a stranger."""
    folder = tmp_path_factory.mktemp("keys")
    public = [write_keys(folder / name) for name in ("trainer", "stranger")]
    return [(Signer.from_file(path.with_suffix("")), path) for path in public]


@pytest.fixture
def written(tmp_path, keys):
    log = WeightLog.open(tmp_path / "log", create=True)
    writer = Publisher(log, config=CONFIG, signer=keys[0][0])
    states = [toy_state()]
    for step in range(5):
        writer.publish(rows_of(states[-1]), step)
        states.append(moved(states[-1], 0.05, step))
    return log, states


def follow(folder, public_key=None):
    live = LiveWeights(zeros())
    Subscriber(WeightLog.open(folder, public_key=public_key), live).catch_up()
    return live


def rewrite(log, number, signer=None, **fields):
    """Writes a version's manifest anew, with other fields, signed by `signer`."""
    manifest = replace(log.manifest(number), **fields)  # as it was: `log` has read it
    (log.store.root / manifest_name(number)).write_bytes(pack_manifest(manifest, signer))


def test_keys_are_pem_files_and_the_private_one_is_private(tmp_path):
    public = write_keys(tmp_path / "key")
    assert public == tmp_path / "key.pub"
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    for taken in ("key", "key.pub"):
        with pytest.raises(FileExistsError, match="key"):
            write_keys(tmp_path / taken.removesuffix(".pub"))
        (tmp_path / "key").unlink(missing_ok=True)
    assert not (tmp_path / "key").exists()
    for cls, kind in [(Signer, "private"), (Verifier, "public")]:
        (tmp_path / "other").write_text("no key")
        with pytest.raises(ValueError, match=f"other: expected an Ed25519 {kind} key, PEM"):
            cls.from_file(tmp_path / "other")
    with pytest.raises(ValueError, match="key.pub: expected an Ed25519 private key"):
        Signer.from_file(public)


def test_a_signature_is_over_these_bytes_by_this_key(keys):
    (signer, public), (stranger, _) = keys
    verifier = Verifier.from_file(public)
    assert len(signer.sign(b"data")) == 64
    verifier.check(b"data", signer.sign(b"data"), "it")
    for data, signature in [
        (b"date", signer.sign(b"data")),
        (b"data", stranger.sign(b"data")),
        (b"data", bytes(64)),
        (b"data", b"short"),
    ]:
        with pytest.raises(SignatureError, match="^it is forged: its signature is not by .*pub$"):
            verifier.check(data, signature, "it")
    with pytest.raises(SignatureError, match="^it is not signed; expected a signature by .*pub$"):
        verifier.check(b"data", None, "it")


def test_a_signed_log_is_followed_with_the_key_or_without(tmp_path, written, keys):
    _, states = written
    for public_key in (keys[0][1], None):
        assert same_bits(follow(tmp_path / "log", public_key).tensors, states[4])
        log = WeightLog.open(tmp_path / "log", public_key=public_key)
        assert same_bits(read_state(log, 3), states[3])
        assert verify(log, replay=True).faults == []


def test_another_key_refuses_everything(tmp_path, written, keys):
    with pytest.raises(SignatureError, match="manifest-00000004.json is forged: its signature"):
        follow(tmp_path / "log", keys[1][1])
    faults = verify(WeightLog.open(tmp_path / "log", public_key=keys[1][1])).faults
    assert len(faults) == 5 and all("is forged" in fault for fault in faults)


def test_an_unsigned_log_is_refused(tmp_path, keys):
    log = WeightLog.open(tmp_path, create=True)
    Publisher(log, config=CONFIG).publish(rows_of(toy_state()), 0)
    with pytest.raises(SignatureError, match="^manifest-00000000.json is not signed; expected"):
        follow(tmp_path, keys[0][1])


def test_whoever_can_write_to_the_store_can_make_up_nothing(tmp_path, written, keys):
    log, states = written
    (signer, public), (stranger, _) = keys
    older = log.manifest(3)
    for sign, fields, message in [
        (None, {}, "is not signed"),
        (stranger, {}, "is forged"),
        (stranger, {"delta": older.delta}, "is forged"),
        (signer, {"version": 3}, "is of run .* version 3; expected"),  # replayed under a new name
        (signer, {"run_id": "another"}, "is of run another"),
    ]:
        rewrite(log, 4, sign, **fields)
        with pytest.raises(LogError, match=f"manifest-00000004.json {message}"):
            follow(log.store.root, public)
    rewrite(log, 4, signer)
    path = log.store.root / manifest_name(4)
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"state_hash": "0" * 16}))
    with pytest.raises(SignatureError, match="manifest-00000004.json is forged"):
        follow(log.store.root, public)
    rewrite(log, 4, signer)
    assert same_bits(follow(log.store.root, public).tensors, states[4])


def test_a_frame_must_be_signed_as_well(tmp_path, written, keys):
    """Even a manifest by the right key cannot bring in a frame by another."""
    log, _ = written
    (signer, public), (stranger, _) = keys
    ref = log.manifest(4).delta[0]
    path = log.store.root / ref.name
    frame = unpack_frame(path.read_bytes())
    live = LiveWeights(zeros())
    reader = Subscriber(WeightLog.open(log.store.root, public_key=public), live)
    for version in range(4):
        reader.commit(reader.fetch_and_stage(version))
    for sign, message in [(None, "is not signed"), (stranger.sign, "is forged")]:
        data = pack_frame(frame, sign)
        path.write_bytes(data)
        rewrite(log, 4, signer, delta=[PartRef(ref.name, len(data), frame_digest(data))], anchor=[])
        with pytest.raises(SignatureError, match=f"^{re.escape(ref.name)} {message}"):
            Subscriber(WeightLog.open(log.store.root, public_key=public), live).catch_up()
    data = bytearray(pack_frame(frame, signer.sign))
    data[-1] ^= 1
    path.write_bytes(data)
    rewrite(log, 4, signer, delta=[PartRef(ref.name, len(data), frame_digest(data))], anchor=[])
    with pytest.raises(SignatureError, match="is forged"):
        Subscriber(WeightLog.open(log.store.root, public_key=public), live).catch_up()
    data[-1] ^= 1
    data[200] ^= 1  # the signed digest is there, but of other bytes
    path.write_bytes(data)
    with pytest.raises(ApplyError, match="do not match its digest"):
        Subscriber(WeightLog.open(log.store.root, public_key=public), live).catch_up()
    assert live.version == 3


def test_a_fold_is_taken_only_if_signed(tmp_path, written, keys):
    log, states = written
    (signer, public), _ = keys
    fold(log, 0, 3)
    fold(log, 0, 2, signer)
    for public_key, stop in [(None, 3), (public, 2)]:
        reader = WeightLog.open(log.store.root, public_key=public_key)
        live = LiveWeights(zeros())
        subscriber = Subscriber(reader, live)
        subscriber.commit(subscriber.fetch_and_stage(0))
        hops = [reader.hop(0, version) for version in (2, 3)]
        assert [hop is not None for hop in hops] == [True, stop == 3]
        assert subscriber.catch_up() == 4
        assert same_bits(live.tensors, states[4])
