"""Rounds of members that sign: nobody without a key is counted, believed, or can move a file."""

import json
from dataclasses import asdict, replace

import pytest
from gossamer.comm.manifest import LogError
from gossamer.comm.outer.anchor import Anchors
from gossamer.comm.outer.claim import AGREED_FILE, join
from gossamer.comm.outer.config import OuterConfig
from gossamer.comm.outer.message import Message
from gossamer.comm.outer.record import anchor_name, message_name, record_name, unpack_record
from gossamer.comm.outer.replica import Replica, shapes_of
from gossamer.comm.outer.round_log import LogExchange
from gossamer.comm.outer.seal import NO_SEAL, Seal
from gossamer.comm.signing import SignatureError, write_keys
from gossamer.comm.store import open_store
from toy_replicas import (
    CONFIG,
    TOKENS,
    identity_of,
    initial_rows,
    open_replica,
    run_round,
    trained_rows,
)

THREE_ROUNDS = range(3)


def config_of(name: str, **options: object) -> OuterConfig:
    return replace(CONFIG, replica=name, **options)


@pytest.fixture
def seals(tmp_path) -> dict[str, Seal]:
    """Of two members with keys of their own, and of a stranger."""
    public = {}
    for name in "abx":
        public[name] = write_keys(tmp_path / name)
    trusted = tmp_path / "members.pub"
    trusted.write_bytes(public["a"].read_bytes() + public["b"].read_bytes())
    both = {
        name: Seal.of(
            config_of(name, signing_key_path=str(tmp_path / name), public_keys_path=str(trusted))
        )
        for name in "ab"
    }
    return both | {"x": Seal.of(config_of("x", signing_key_path=str(tmp_path / "x")))}


@pytest.fixture
def log(tmp_path, seals) -> str:
    """Three rounds of a, alone, with anchors before rounds 0 and 3."""
    folder = tmp_path / "log"
    replica = open_replica(folder, config_of("a"), seal=seals["a"])
    for number in THREE_ROUNDS:
        run_round(replica, number * TOKENS)
    return str(folder)


def intruder(log: str, name: str, seal: Seal, number: int) -> Replica:
    """One that passes over what `join` says, and stands where the others do."""
    store, rows = open_store(log), initial_rows()
    store.put(f"replicas/{name}-e0001.json", b"{}")
    exchange = LogExchange(store, config_of(name), identity_of(name), shapes_of(rows), seal)
    rows = list(member(log, NO_SEAL).rows.values())
    return Replica(config_of(name), exchange, rows, number=number)


def member(log: str, seal: Seal) -> Replica:
    """A reader: the state of today, from the newest anchor and what came after it."""
    store, rows, me = open_store(log), initial_rows(), identity_of("reader")
    exchange = LogExchange(store, CONFIG, me, shapes_of(rows), seal)
    replica = Replica(CONFIG, exchange, rows, Anchors(store, me, shapes_of(rows), seal))
    replica.catch_up()
    return replica


def test_members_with_keys_of_their_own_hold_the_same_bits(log, seals):
    late = open_replica(log, config_of("b", grace_s=0.0), seal=seals["b"])
    back = open_replica(log, config_of("a"), takeover=True, seal=seals["a"])
    run_round(late, 0)
    back.catch_up()
    assert late.number == back.number == 4 and late.part_hash() == back.part_hash()
    for name in (AGREED_FILE, record_name(3), anchor_name(0), anchor_name(3)):
        assert len(json.loads(open_store(log).get(name))["signature"]) == 128
    assert unpack_record(open_store(log).get(record_name(3)), record_name(3)).round == 3


def test_without_keys_nothing_is_signed(tmp_path):
    run_round(open_replica(tmp_path, config_of("a")), 0)
    store = open_store(tmp_path)
    for name in (AGREED_FILE, record_name(0), anchor_name(0)):
        assert "signature" not in json.loads(store.get(name))


@pytest.mark.parametrize(
    ("who", "words"),
    [
        (None, "^outer.json is signed; expected a key that the members trust"),
        ("x", "^outer.json is forged: its signature is not by a key that the members trust"),
    ],
)
def test_one_without_a_key_or_with_another_is_told_when_it_joins(log, seals, who, words):
    seal = seals[who] if who else NO_SEAL
    with pytest.raises(SignatureError, match=words):
        join(open_store(log), config_of("c"), "toy", seal=seal)
    assert open_store(log).list("replicas/c") == []


def test_a_member_with_more_keys_lets_another_in(log, seals, tmp_path):
    both = tmp_path / "members.pub"
    both.write_bytes(both.read_bytes() + (tmp_path / "x.pub").read_bytes())
    newer = {
        name: Seal.of(
            config_of(name, signing_key_path=str(tmp_path / name), public_keys_path=str(both))
        )
        for name in "ax"
    }
    with pytest.raises(SignatureError, match="outer.json does not name this replica's key"):
        join(open_store(log), config_of("x"), "toy", seal=newer["x"])
    join(open_store(log), config_of("a"), "toy", takeover=True, seal=newer["a"])
    assert join(open_store(log), config_of("x"), "toy", seal=newer["x"]).replica == "x"
    # and one that was not told of it changes nothing
    join(open_store(log), config_of("b"), "toy", seal=seals["b"])
    assert len(json.loads(open_store(log).get(AGREED_FILE))["keys"]) == 3


def test_a_key_of_its_own_that_a_member_does_not_trust_is_told(tmp_path, seals):
    paths = {"signing_key_path": tmp_path / "x", "public_keys_path": tmp_path / "members.pub"}
    with pytest.raises(ValueError, match="members.pub lacks the public key of outer.signing_key_p"):
        Seal.of(config_of("x", **{name: str(path) for name, path in paths.items()}))


def test_a_member_that_signs_believes_no_log_that_is_not_signed(tmp_path, seals):
    open_replica(tmp_path / "bare", config_of("a"))
    with pytest.raises(SignatureError, match="^outer.json is not signed; expected a signature by"):
        open_replica(tmp_path / "bare", config_of("b"), seal=seals["b"])


@pytest.mark.parametrize(("who", "fault"), [(None, "is not signed"), ("x", "is forged")])
def test_one_that_joins_all_the_same_is_refused_by_all(log, seals, who, fault):
    stranger = intruder(log, "c", seals[who] if who else NO_SEAL, number=3)
    honest = open_replica(log, config_of("a"), takeover=True, seal=seals["a"])
    stranger._exchange.send(message_of(stranger))
    settled = run_round(honest, 3 * TOKENS)
    assert settled.refused == {"c": settled.refused["c"]} and fault in settled.refused["c"]
    assert {each[0] for each in settled.counted} == {"a"}
    if who is None:  # it reads in the record what is wrong with it
        assert fault in stranger._exchange.settle(3).refused["c"]
    else:
        with pytest.raises(SignatureError, match=r"^round-0000000\d.json is forged"):
            stranger._exchange.settle(3)


def message_of(replica: Replica) -> Message:
    """For the replica's next round."""
    sent = [replica._send(rows) for rows in trained_rows(replica, 0)]
    return Message(
        **asdict(replica._exchange.identity),
        round=replica.number,
        base_hash=replica.part_hash(),
        inner_steps=1,
        tokens=TOKENS,
        sent=[each for each in sent if each is not None],
    )


def forge(log: str, name: str, **fields: object) -> None:
    store = open_store(log)
    store.put(name, json.dumps(json.loads(store.get(name)) | fields).encode(), overwrite=True)


def move(log: str, source: str, target: str) -> None:
    store = open_store(log)
    store.put(target, store.get(source), overwrite=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda log: forge(log, anchor_name(3), parts=[]), "anchor-00000003.json is forged"),
        (lambda log: move(log, anchor_name(0), anchor_name(3)), "anchor-00000003.json is forged"),
        (lambda log: move(log, record_name(0), record_name(3)), "round-00000003.json is forged"),
        (
            lambda log: open_store(log).put(
                record_name(3), json.dumps(read_record(log, 2) | {"round": 3}).encode()
            ),
            "round-00000003.json is not signed",
        ),
    ],
)
def test_a_file_that_was_made_up_changed_or_moved_is_refused(log, seals, change, words):
    assert member(log, seals["b"]).number == 3
    change(log)
    with pytest.raises(LogError, match=words):
        member(log, seals["b"])


def read_record(log: str, number: int) -> dict:
    entry = json.loads(open_store(log).get(record_name(number)))
    return {key: value for key, value in entry.items() if key != "signature"}


def test_an_old_message_under_a_new_name_does_not_count(log, seals):
    store = open_store(log)
    store.put("replicas/b-e0001.json", b"{}")
    store.put(message_name(3, "b", 1, 0, 1), store.get(message_name(2, "a", 1, 0, 1)))
    honest = open_replica(log, config_of("a"), takeover=True, seal=seals["a"])
    settled = run_round(honest, 3 * TOKENS)
    assert list(settled.refused) == ["b"] and settled.counted == {("a", 3)}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"public_keys_path": "members.pub"}, "public_keys_path needs a signing_key_path"),
        (
            {"signing_key_path": "key", "exchange": "collective"},
            "signing_key_path must be null with exchange collective",
        ),
    ],
)
def test_keys_that_would_do_nothing_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        OuterConfig(**fields)
