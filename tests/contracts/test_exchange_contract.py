"""What every exchange owes: one answer for all, in one order, and for good."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
import torch.distributed as dist
from gloo_world import run_world
from gossamer.comm.outer.claim import join
from gossamer.comm.outer.exchange import EXCHANGES
from gossamer.comm.outer.replica import Replica, shapes_of
from gossamer.comm.store import open_store
from toy_replicas import CONFIG, TOKENS, identity_of, initial_rows, trained_rows

NAMES = ("a", "b", "c")
ROUNDS = 3
MEMBERS = 3
WAYS = tuple(EXCHANGES)


def build_exchange(way, folder, rank):
    module, attribute = EXCHANGES[way].split(":")
    cls = getattr(import_module(module), attribute)
    shapes = shapes_of(initial_rows())
    config = replace(CONFIG, replica=NAMES[rank], exchange=way, expected_replicas=MEMBERS)
    if way == "collective":
        return config, cls(dist.group.WORLD, identity_of(NAMES[rank]), shapes)
    store = open_store(folder, create=True)
    return config, cls(store, config, join(store, config, "toy"), shapes)


def take_part(folder):
    """Every exchange, in processes of its own: hashes after each round, who counted, the books."""
    rank = dist.get_rank()
    found = {}
    for way in WAYS:
        config, exchange = build_exchange(way, f"{folder}/{way}", rank)
        replica = Replica(config, exchange, initial_rows(), number=0)
        for number in range(ROUNDS):
            rows = list(trained_rows(replica, number * TOKENS))
            if rank == 1 and number == 1:  # one that sends nothing of its experts
                rows = [each for each in rows if "experts" not in each.name]
            settled = replica.round(rows, number * TOKENS, TOKENS, number)
            senders = " ".join(each[0].replica for each in settled.messages)
            found[f"{way} {number}"] = f"{replica.part_hash()} {senders} {exchange.next_round()}"
    config, exchange = build_exchange("collective", folder, rank)
    replica = Replica(replace(config, rule="dgc", inner_steps=1), exchange, [], number=0)
    for number in range(2):
        replica.round(initial_rows(seed=10 * number + rank), number * TOKENS, TOKENS, number)
        gradient = torch.cat([rows.values.view(-1) for rows in replica.rows.values()])
        found[f"gradient {number}"] = gradient
    return found


def test_all_members_get_one_answer_and_both_ways_the_same(tmp_path):
    results = run_world(take_part, MEMBERS, str(tmp_path))
    for number in range(2):
        first, *others = [result.pop(f"gradient {number}") for result in results]
        assert first.any() and all(torch.equal(first, other) for other in others)
    assert results[0] == results[1] == results[2]
    for number in range(ROUNDS):
        answers = {results[0][f"{way} {number}"] for way in WAYS}
        assert len(answers) == 1
        assert answers.pop().split()[1:] == ["a", "b", "c", str(number + 1)]
    assert len({value.split()[0] for value in results[0].values()}) == ROUNDS


def forged_member(folder):
    """One member sends bytes that are no message, and one a hash of other weights."""
    rank = dist.get_rank()
    config, exchange = build_exchange("collective", folder, rank)
    replica = Replica(config, exchange, initial_rows(), number=0)
    if rank == 2:
        replica.rows["model.norm.weight", 0].values[0] += 1
    if rank == 1:  # and knows nothing of it
        exchange.send = lambda message: setattr(exchange, "_frame", b"garbage")
    try:
        settled = replica.round(trained_rows(replica, 0), 0, TOKENS, 0)
        return {"counted": len(settled.counted), "refused": "; ".join(settled.refused)}
    except RuntimeError as error:
        return {"error": str(error)}


@pytest.mark.slow
def test_a_collective_refuses_what_a_log_would(tmp_path):
    honest, garbage, astray = run_world(forged_member, MEMBERS, str(tmp_path))
    assert honest["counted"] == garbage["counted"] == 1
    assert honest["refused"] == "member 1; c"
    assert "it began the round with weights" in astray["error"]
