"""`gossamer bench replicas`: what each outer rule costs and brings, over links of three speeds.

The one idea: nothing is measured twice. Losses do not depend on the link while all replicas are
there, so each (rule, model, seed) is trained once, exchanges are timed over each shaped link by
real processes, and seconds are composed: steps x CPU seconds of a step + exchanges x seconds of
one. Two arms run whole over a link as a check. All that was measured stays in the JSON; a grid that
was cut off goes on from it.

Columns of a row: `tokens` all replicas trained; `loss` held-out, nats a token, at the end;
`wire_bytes` that one replica gave the exchange in all (frames; for ddp fp32 gradients);
`link_bytes` that left its host, copies to each other replica and TCP counted; `exchange_s` least
seconds of an exchange, from sending to new weights; `wall_s` composed; `utilisation` the share of
it that is inner steps (`median_utilisation`: with the median exchange); `tokens_to_target` and
`wall_to_target_s` until the held-out loss was first at most `target_loss`, null if it never was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import mean

from gossamer.launch.bench.replicas_arms import (
    LINKS_MBIT,
    MODELS,
    QUICK,
    Arm,
    Sizes,
    Training,
    grid,
    questions,
    sparseloco,
    tuning,
)
from gossamer.launch.bench.replicas_record import Record, Row
from gossamer.launch.testbed import Host, hosts, unusable

COMMAND = "gossamer bench replicas"
WORKER = "gossamer.launch.bench.replicas_train"
WORKERS = min(2, os.cpu_count() or 1)
TIMED_ROUNDS = 6
"""Over each link, the first not counted; rules that share every step take one round of steps."""
CHECKED = (("sparseloco", 10), ("ddp", 100))
"""(rule, link) run whole, dense model, first seed."""
PORT = 29_500
LinkTask = tuple[Training, float]


def bench_replicas(json_path: Path, quick: bool) -> None:
    """Measures what the JSON lacks, and writes it after each measurement. Raises ValueError for a
    JSON of other measurements."""
    command = " ".join([COMMAND, *["--quick"] * quick])
    record = Record(json_path, QUICK if quick else Sizes(), command)
    if quick:
        arms = (Arm(rule="ddp"), Arm(rule="averaging"), sparseloco())
        train(
            record, [Training(purpose="grid", model=m, seed=1, arm=a) for m in MODELS for a in arms]
        )
        time_links(record, LINKS_MBIT[1:2])
    else:
        train(record, tuning())
        train(record, grid(record.best))
        train(record, questions(record.best))
        time_links(record, LINKS_MBIT)
        check(record)
    record.finish()


def train(record: Record, trainings: Iterable[Training]) -> None:
    """Those that were not trained yet, some at a time, each in a process of its own."""
    todo = deque(each for each in trainings if not record.is_trained(each))

    def work(_: int) -> None:
        with _worker("threads") as worker:
            while todo:
                training = todo.popleft()
                answer = _ask([worker], training, record.sizes)[0]
                record.add("trainings", {"training": asdict(training), **answer})
                how = f"{training.purpose}, {training.model}, seed {training.seed}"
                loss = answer["curve"][-1][1]
                _say(f"{len(todo)} to go; {how}, {training.arm.rule}: loss {loss:.4f}")

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, range(min(WORKERS, len(todo)))))


def time_links(record: Record, links: Iterable[float]) -> None:
    """Exchanges of every rule and density of the grid, over each link."""
    todo = [
        (Training(purpose="link", model=model, seed=1, arm=arm), mbit)
        for mbit in links
        for model, arm in record.models_and_arms()
        if record.link(model, arm, mbit) is None
    ]
    for training, mbit, answers in _over_links(todo, record.sizes, is_timed=True):
        taken_s = [max(each) for each in zip(*(a["exchange_s"] for a in answers), strict=True)]
        found = {
            "exchange_s": taken_s if training.arm.every_step else taken_s[1:],
            "exchanges": len(taken_s),
            "link_bytes": round(mean(answer["link_bytes"] for answer in answers)),
        }
        record.add("links", {"training": asdict(training), "link_mbit": mbit, **found})


def check(record: Record) -> None:
    """Whole trainings over a link, to be compared with what is composed."""
    todo = [
        (Training(purpose="check", model="dense", seed=1, arm=record.best(rule)), mbit)
        for rule, mbit in CHECKED
        if not record.is_checked(record.best(rule), mbit)
    ]
    for training, mbit, answers in _over_links(todo, record.sizes, is_timed=False):
        # a round waits for its slowest replica, and all of them share these cores
        slowest_s = [max(each) for each in zip(*(a["compute_s"] for a in answers), strict=True)]
        found = {
            "loss": answers[0]["curve"][-1][1],
            "hashes": [answer["hash"] for answer in answers],
            "wall_s": sum(answers[0]["round_s"]),
            "compute_s": sum(slowest_s),
        }
        record.add("checks", {"training": asdict(training), "link_mbit": mbit, **found})


def _over_links(
    todo: Sequence[LinkTask], sizes: Sizes, is_timed: bool
) -> Iterator[tuple[Training, float, list[Row]]]:
    """(training, link, what each replica says) of each task: timed rounds, or whole trainings."""
    if not todo:
        return
    if reason := unusable():
        _say(f"no link is measured: {reason}")
        return
    with hosts(sizes.replicas) as ends, ExitStack() as stack:
        # ranks, their own addresses, and where the first one listens
        places = [(str(rank), str(len(ends)), end.address) for rank, end in enumerate(ends)]
        words = [("link", *place, ends[0].address, str(PORT)) for place in places]
        workers = [
            stack.enter_context(_worker(*each, host=end))
            for each, end in zip(words, ends, strict=True)
        ]
        for training, mbit in todo:
            for end in ends:
                end.set_rate(mbit)
            rounds = sizes.rounds
            if is_timed:
                rounds = 1 if training.arm.every_step else TIMED_ROUNDS
            answers = _ask(workers, training, sizes, rounds=rounds, waits=is_timed)
            _say(f"{mbit:g} Mbit/s, {training.model}, {training.arm.rule}")
            yield training, mbit, answers


@contextmanager
def _worker(*words: str, host: Host | None = None) -> Iterator[subprocess.Popen]:
    argv = ["env", "OMP_NUM_THREADS=1", sys.executable, "-m", WORKER, *words]
    start = host.popen if host else subprocess.Popen
    process = start(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _ask(
    workers: list[subprocess.Popen], training: Training, sizes: Sizes, **more: float
) -> list[Row]:
    """The answer of each worker to one task. Raises RuntimeError if one died."""
    task = {"training": asdict(training), "sizes": asdict(sizes), **more}
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write(json.dumps(task).encode() + b"\n")
        worker.stdin.flush()
    lines = [worker.stdout.readline() for worker in workers if worker.stdout is not None]
    if not all(lines):
        raise RuntimeError(f"a process of the benchmark died in {training}; its error is above")
    return [json.loads(line) for line in lines]


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
