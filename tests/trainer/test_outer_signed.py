"""Replicas in training, each with a key of its own: one dies and comes back, strangers are told."""

import json
import signal

import pytest
from gossamer.comm.signing import write_keys
from outer_runs import Fault, Running, finish, hashes, records, settings

ROUNDS = 4


@pytest.mark.slow
def test_members_that_sign_go_on_and_strangers_do_not_come_in(tmp_path):
    public = {name: write_keys(tmp_path / f"{name}.key") for name in "abx"}
    trusted = tmp_path / "members.pub"
    trusted.write_bytes(public["a"].read_bytes() + public["b"].read_bytes())
    more = tmp_path / "more.pub"  # the stranger trusts the members, and they know nothing of it
    more.write_bytes(trusted.read_bytes() + public["x"].read_bytes())

    def live(name: str, key: str | None, attempt: int = 1, fault: Fault | None = None) -> Running:
        keys = {"signing_key_path": str(tmp_path / f"{key}.key")} if key else {}
        keys |= {"public_keys_path": str(more if key == "x" else trusted)} if key else {}
        config = settings(name, "abcd".index(name), 4, tmp_path / "rounds", inner_steps=1, **keys)
        config["outer"]["expected_replicas"] = config["outer"]["quorum"] = 2
        config["phases"][0]["max_steps"] = ROUNDS
        return Running(tmp_path / name, config, attempt, fault)

    a, doomed = live("a", "a"), live("b", "b", fault=Fault(after_update=3))
    assert doomed.ended() == [-signal.SIGKILL]
    for name, key, words in (
        ("c", None, "SignatureError: outer.json is signed; expected a key that the members trust"),
        ("d", "x", "SignatureError: outer.json does not name this replica's key; expected its pub"),
    ):
        stranger = live(name, key)
        assert stranger.ended() == [1] and words in stranger.error(), stranger.error()
    back = live("b", "b", attempt=2)
    finish(a, back)
    assert hashes(tmp_path / "a")[ROUNDS] == hashes(tmp_path / "b")[ROUNDS]
    found = records(tmp_path / "rounds")
    assert [sorted(e["replica"] for e in each["counted"]) for each in found] == [
        ["a", "b"]
    ] * ROUNDS
    lists = sorted((tmp_path / "rounds").glob("anchor-*.json"))
    assert lists and all(json.loads(path.read_text())["signature"] for path in lists)
    assert all(each["signature"] and not each["refused"] for each in found)
    assert {path.name[0] for path in (tmp_path / "rounds/replicas").iterdir()} == {"a", "b"}
