"""Replicas that sign: what one that joins is told, what it takes, and what lies in the store."""

import json
from dataclasses import replace

import pytest
from gossamer.comm.signing import SignatureError, write_keys
from gossamer.comm.store import open_store
from gossamer.launch.config import RunConfig
from gossamer.launch.recipe import build_config, load_recipe
from gossamer.launch.replicas_members import RECIPE_FILE, joining, prepare_member, readers
from tiny_run import SETTINGS

TRAIN = {**SETTINGS, "phases": SETTINGS["phases"][:1]}


def config_of(tmp_path, key: str | None, replica: str = "replica-0", index: int = 0) -> RunConfig:
    outer = {"url": str(tmp_path / "rounds"), "inner_steps": 2, "replica": replica}
    outer |= {"signing_key_path": str(tmp_path / key)} if key else {}
    data = {**SETTINGS["data"], "num_replicas": 4, "replica_index": index}
    return build_config(
        RunConfig, {"name": "tiny", "train": {**TRAIN, "outer": outer, "data": data}}, ""
    )


@pytest.fixture
def rounds(tmp_path) -> str:
    """Where the first replica, which signs, has left its recipe."""
    for name in ("ours", "theirs"):
        write_keys(tmp_path / name)
    (tmp_path / "first").mkdir()
    prepare_member(config_of(tmp_path, "ours"), tmp_path / "first")
    return str(tmp_path / "rounds")


def override(tmp_path, key: str) -> list[str]:
    return [f"train.outer.signing_key_path={tmp_path / key}"]


def test_one_that_joins_with_the_key_takes_what_was_prepared(tmp_path, rounds):
    config, name, _ = joining(rounds, override(tmp_path, "ours"), None)
    assert (name, config.train.outer.signing_key_path) == ("replica-1", str(tmp_path / "ours"))
    (tmp_path / "second").mkdir()
    prepare_member(config, tmp_path / "second")
    for file in ("tokenizer.json", "problems.json"):
        assert (tmp_path / "second" / file).read_bytes() == (tmp_path / "first" / file).read_bytes()


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (None, "^recipe.json is signed; expected a key that the members trust"),
        ("theirs", "^recipe.json is forged: its signature is not by a key that the members trust"),
    ],
)
def test_one_without_the_key_is_told_and_takes_nothing(tmp_path, rounds, key, words):
    with pytest.raises(SignatureError, match=words):
        joining(rounds, override(tmp_path, key) if key else [], None)
    (tmp_path / "second").mkdir()
    with pytest.raises(SignatureError, match=words):
        prepare_member(config_of(tmp_path, key, "replica-1", 1), tmp_path / "second")
    assert readers(open_store(rounds)) == {0: "replica-0"}
    assert list((tmp_path / "second").iterdir()) == []


def test_no_path_of_a_key_is_left_for_the_others(tmp_path, rounds):
    store = open_store(rounds)
    for name in [*store.list(""), *store.list("recipe/"), *store.list("members/")]:
        assert str(tmp_path / "ours").encode() not in store.get(name), name


@pytest.mark.parametrize("name", [RECIPE_FILE, "recipe/tokenizer.json"])
def test_a_recipe_that_was_changed_in_the_store_is_refused(tmp_path, rounds, name):
    store = open_store(rounds)
    if name == RECIPE_FILE:
        entry = json.loads(store.get(name))
        entry["recipe"]["train"]["rl"]["reward"] = "os:system"
        changed, words = json.dumps(entry).encode(), "recipe.json is forged"
    else:
        changed, words = store.get(name) + b" ", "tokenizer.json is not the file that recipe.json"
    store.put(name, changed, overwrite=True)
    (tmp_path / "second").mkdir()
    with pytest.raises(ValueError, match=words):
        prepare_member(config_of(tmp_path, "ours", "replica-1", 1), tmp_path / "second")


def test_a_key_that_is_missing_is_told_before_anything_starts(tmp_path):
    write_keys(tmp_path / "ours")
    config = config_of(tmp_path, "nowhere")
    with pytest.raises(ValueError, match=r"outer.signing_key_path: .*nowhere is missing; `goss"):
        prepare_member(config, tmp_path / "first")
    outer = replace(
        config.train.outer,
        signing_key_path=str(tmp_path / "ours"),
        public_keys_path=str(tmp_path / "none.pub"),
    )
    config = replace(config, train=replace(config.train, outer=outer))
    with pytest.raises(ValueError, match=r"outer.public_keys_path: .*none.pub is missing"):
        prepare_member(config, tmp_path / "first")


def test_the_shipped_recipe_for_two_sites_signs(monkeypatch):
    for name in ("GOSSAMER_SIGNING_KEY", "GOSSAMER_MEMBER_KEYS"):
        monkeypatch.delenv(name, raising=False)
    outer = load_recipe("replicas_two_sites", []).train.outer
    assert (outer.signing_key_path, outer.public_keys_path) == ("signing.key", "members.pub")
    monkeypatch.setenv("GOSSAMER_SIGNING_KEY", "/keys/oslo")
    assert load_recipe("replicas_two_sites", []).train.outer.signing_key_path == "/keys/oslo"
