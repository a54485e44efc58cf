"""Old rounds go; whoever comes, returns or lags still finds what it needs."""

import json
import time
from dataclasses import replace

import pytest
import torch
from gossamer.comm.manifest import LogError
from gossamer.comm.outer import retention
from gossamer.comm.outer.retention import clear, sweep
from gossamer.comm.store import open_store
from toy_replicas import CONFIG, TOKENS, open_replica, run_round, state_of

ALONE = replace(CONFIG, replica="a", expected_for_rounds=1, grace_s=0.0)


def run_rounds(folder, rounds, config=ALONE):
    replica = open_replica(folder, config)
    for number in range(rounds):
        run_round(replica, number * TOKENS)
    return replica


def rounds_there(store, rounds):
    return [n for n in range(rounds) if store.list(f"rounds/{n:08d}/")]


def test_a_newcomer_and_one_that_lags_find_what_they_need(tmp_path):
    run_rounds(tmp_path, 11)  # anchors before rounds 0, 3, 6, 9
    store = open_store(tmp_path)
    lagging = open_replica(tmp_path, replace(ALONE, replica="lags"))
    assert sweep(store, keep_anchors=2, grace_s=0) == 2 * 2 + 5
    # round 5 too: a late message of it would count in round 6
    assert rounds_there(store, 11) == [5, 6, 7, 8, 9, 10]
    assert store.list("anchor-") == ["anchor-00000006.json", "anchor-00000009.json"]
    assert len(store.list("round-")) == 11
    assert sweep(store, keep_anchors=2, grace_s=0) == 0
    new = open_replica(tmp_path, replace(ALONE, replica="new"))
    assert new.number == 11
    for name, values in state_of(new).items():
        assert torch.equal(values, state_of(lagging)[name])


def test_one_that_is_too_far_behind_is_told(tmp_path):
    ahead = open_replica(tmp_path, ALONE)
    behind = open_replica(tmp_path, replace(ALONE, replica="behind"))
    for number in range(11):
        run_round(ahead, number * TOKENS)
    sweep(open_store(tmp_path), keep_anchors=2, grace_s=0)
    with pytest.raises(LogError, match="rounds/00000000/.* is missing"):
        behind.catch_up()


def test_nothing_goes_before_its_grace_or_with_too_few_anchors(tmp_path):
    run_rounds(tmp_path, 8)  # anchors before rounds 0, 3, 6
    store = open_store(tmp_path)
    assert sweep(store, keep_anchors=3, grace_s=0) == 0
    assert sweep(store, keep_anchors=1, grace_s=60) == 0
    told = json.loads(store.get("gc.json"))
    assert [at for at, _ in told["floors"]] == [0, 6]
    assert rounds_there(store, 8) == list(range(8))
    # an hour later; a file that promises more than is kept is not believed
    told["floors"] = [[6, told["floors"][1][1] - 3600], [7, 0.0]]
    store.put("gc.json", json.dumps(told).encode(), overwrite=True)
    assert sweep(store, keep_anchors=1, grace_s=60) > 0
    assert rounds_there(store, 8) == [5, 6, 7]


def test_a_pass_that_is_killed_leaves_no_anchor_without_its_parts(tmp_path):
    run_rounds(tmp_path, 11)
    store, deletes = open_store(tmp_path), 0
    while True:

        def delete_and_die(name, budget=deletes):
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            type(store).delete(store, name)

        left, store.delete = deletes, delete_and_die
        try:
            sweep(store, keep_anchors=1, grace_s=0)
            break
        except KeyboardInterrupt:
            deletes = 1
        for name in store.list("anchor-"):
            for part in json.loads(store.get(name))["parts"]:
                assert store.size(part["name"]) is not None
    assert rounds_there(open_store(tmp_path), 11) == [8, 9, 10]


def test_a_cleared_log_is_a_new_one(tmp_path):
    run_rounds(tmp_path, 4)
    store = open_store(tmp_path)
    clear(store)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert open_replica(tmp_path, ALONE).number == 0


def test_the_writer_of_an_anchor_deletes_in_passing_where_the_config_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(retention, "GRACE_S", 0.0)
    for folder, keep in (("swept", 2), ("kept", 0)):
        run_rounds(tmp_path / folder, 11, replace(ALONE, keep_anchors=keep))
    deadline_s = time.monotonic() + 10
    store = open_store(tmp_path / "swept")
    while rounds_there(store, 11) != [5, 6, 7, 8, 9, 10]:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert rounds_there(open_store(tmp_path / "kept"), 11) == list(range(11))
