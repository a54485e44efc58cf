"""Trains the arms of `gossamer bench replicas`, and times their exchanges over shaped links.

The one idea: what a link changes are seconds, not bits. So each arm is trained once, by threads of
one process that take turns; over each link some real rounds are timed, by processes in hosts of
their own. Both run `train`.

    python -m gossamer.launch.bench.replicas_train threads
    python -m gossamer.launch.bench.replicas_train link RANK SIZE ADDRESS FIRST_ADDRESS PORT

Each takes JSON lines from stdin, {"sizes": ..., "training": ...}, of `link` with "rounds" and
"waits", and answers with one line each.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gossamer.comm.outer.anchor import Anchors
from gossamer.comm.outer.exchange import Identity
from gossamer.comm.outer.replica import Replica, shapes_of
from gossamer.comm.store import open_store
from gossamer.launch.bench.replicas_arms import Arm, Sizes, Training
from gossamer.launch.bench.replicas_meeting import Hall, Meeting, Network
from gossamer.launch.bench.replicas_member import Clock, Log, Member, is_present

SENT = Path("/sys/class/net/eth0/statistics/tx_bytes")
Answer = dict[str, Any]


def train(
    training: Training, sizes: Sizes, number: int, meeting: Meeting, rounds: int, folder: Path
) -> tuple[Log, str]:
    """`rounds` rounds of replica `number`; what it measured, and the hash of its weights."""
    arm, model, seed = training.arm, training.model, training.seed
    with meeting.turn:
        member = Member(arm, sizes, model, seed, number)
    identity = Identity(run_id="bench", replica=f"replica-{number}")
    shapes = shapes_of(member.rows())
    exchange = meeting.exchange(identity, shapes)
    # anchors are where one that leaves leaves its buffers
    anchors = Anchors(open_store(folder, create=True), identity, shapes) if arm.leaves else None
    replica = Replica(arm.outer(number, sizes), exchange, member.rows(), anchors)
    for at in range(rounds):
        is_there = is_present(arm, sizes, seed, at, number)
        if arm.leaves and not is_there:
            replica.leave()
            break
        with Clock() as clock:
            if arm.every_step:
                _steps_together(member, meeting, replica, at)
            elif is_there:
                _round(member, meeting, replica, at)
                member.take(replica)
            else:
                replica.catch_up(at + 1)
                member.take(replica)
        member.log.round_s.append(clock.wall_s)
        if number == 0:
            with meeting.turn:
                tokens = (at + 1) * sizes.inner_steps * sizes.step_tokens
                member.log.curve.append((tokens, member.evaluate()))
    own = Replica(arm.outer(number, sizes), exchange, member.rows(), number=rounds)
    return member.log, "" if arm.every_step else own.part_hash()


def _round(member: Member, meeting: Meeting, replica: Replica, at: int) -> None:
    """Inner steps, then one exchange."""
    sizes, log = member.sizes, member.log
    with meeting.turn, Clock() as inner:
        for i in range(sizes.inner_steps):
            with Clock() as step:
                member.backward()
                member.step(at * sizes.inner_steps + i)
            log.step_s.append(step.cpu_s)
    log.compute_s.append(inner.wall_s)
    trained, scale = member.rows(), member.arm.scale if member.number == 0 else 1.0
    if scale != 1.0:
        shared = [replica.rows[each.name, 0].values for each in trained]
        trained = [
            replace(each, values=old - scale * (old - each.values))
            for each, old in zip(trained, shared, strict=True)
        ]
    tokens = sizes.inner_steps * sizes.rows * sizes.seq_len
    before, idle = (len(log.compute_s) - 1) * tokens, member.idle()
    meeting.ready()
    with Clock() as exchange:
        replica.round(trained, before, tokens, len(log.step_s), idle)
    log.exchange_s.append(exchange.wall_s)


def _steps_together(member: Member, meeting: Meeting, replica: Replica, at: int) -> None:
    """As many steps as a round has, each on gradients that are shared before it."""
    sizes, log = member.sizes, member.log
    tokens = sizes.rows * sizes.seq_len
    for i in range(sizes.inner_steps):
        done = at * sizes.inner_steps + i
        with meeting.turn, Clock() as backward:
            member.backward()
        gradients = member.gradients()
        meeting.ready()
        with Clock() as exchange:
            if member.arm.rule == "ddp":
                flat = torch.cat([each.values.flatten() for each in gradients])
                meeting.mean(flat, done)
                parts = flat.split([each.values.numel() for each in gradients])
                for each, mean in zip(gradients, parts, strict=True):
                    each.values.copy_(mean.view_as(each.values))
            else:
                replica.round(gradients, done * tokens, tokens, done)
        with meeting.turn, Clock() as step:
            member.step(done)
        log.step_s.append(backward.cpu_s + step.cpu_s)
        log.compute_s.append(backward.wall_s + step.wall_s)
        log.exchange_s.append(exchange.wall_s)


def train_in_threads(training: Training, sizes: Sizes) -> Answer:
    """The whole training, all replicas in this process. Raises RuntimeError if one fails, or two
    that should end with the same weights do not."""
    arm, seed = training.arm, training.seed
    sizes = replace(sizes, rounds=sizes.rounds * arm.longer)

    def expected(number: int) -> int:
        everyone = range(sizes.replicas)
        if arm.every_step:
            return sizes.replicas
        return sum(is_present(arm, sizes, seed, number, each) for each in everyone)

    hall = Hall(sizes.replicas, expected)
    found: dict[int, tuple[Log, str]] = {}

    def run(number: int, folder: str) -> None:
        try:
            found[number] = train(training, sizes, number, hall, sizes.rounds, Path(folder))
        except BaseException:
            hall.fail()
            raise

    with tempfile.TemporaryDirectory() as folder:
        threads = [
            threading.Thread(target=run, args=(number, folder), name=f"replica-{number}")
            for number in range(sizes.replicas)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if len(found) < sizes.replicas:
        raise RuntimeError(f"a replica of {training} failed; see above")
    staying = [digest for n, (_, digest) in found.items() if n < sizes.replicas - arm.leaves]
    if len(set(staying)) > 1:
        raise RuntimeError(f"the replicas of {training} end with other weights: {staying}")
    log, sent = found[0][0], hall.sent_bytes
    return {
        "curve": log.curve,
        "hash": staying[0],
        "wire_bytes": round(sum(sent.values()) / sizes.replicas),
        "step_s": median(log.step_s),
    }


def train_over_link(
    training: Training, sizes: Sizes, number: int, network: Network, rounds: int
) -> Answer:
    """`rounds` rounds of this rank, and what left its host in them."""
    sent_before = int(SENT.read_text()) if SENT.exists() else 0
    network.ready()
    with tempfile.TemporaryDirectory() as folder:
        log, digest = train(training, sizes, number, network, rounds, Path(folder))
    sent = int(SENT.read_text()) - sent_before if SENT.exists() else None
    return asdict(log) | {"hash": digest, "link_bytes": sent}


def read_training(given: Answer) -> Training:
    """The inverse of `asdict`."""
    return Training(**{**given, "arm": Arm(**given["arm"])})


def answer(line: str, run: Callable[[Training, Sizes, Answer], Answer]) -> None:
    """One line in, one line out."""
    task = json.loads(line)
    result = run(read_training(task["training"]), Sizes(**task["sizes"]), task)
    print(json.dumps(result), flush=True)


def main(words: list[str]) -> None:
    torch.set_num_threads(1)
    if words[0] == "threads":
        for line in sys.stdin:
            answer(line, lambda training, sizes, _: train_in_threads(training, sizes))
        return
    rank, size, own, first, port = int(words[1]), int(words[2]), *words[3:5], int(words[5])
    network = Network(rank, size, own, first, port)

    def over_link(training: Training, sizes: Sizes, task: Answer) -> Answer:
        network.waits = task["waits"]
        return train_over_link(training, sizes, rank, network, task["rounds"])

    for line in sys.stdin:
        answer(line, over_link)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # gloo's threads would go on
