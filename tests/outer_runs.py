"""Replicas of a tiny run as processes of their own, with faults at named points.

Processes are forked from a server that has imported everything, so a rank starts in a second.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import tempfile
import time
import traceback
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tiny_run import SETTINGS, events

PRELOAD = ["outer_runs", "gossamer.trainer.session", "gossamer.trainer.loop", "gloo_world"]
STEPS, INNER_STEPS = 8, 2


def settings(replica: str, index: int, num_replicas: int, rounds: Path | str, **outer) -> dict:
    """Text alone, a checkpoint after every third step: in the middle of rounds of two."""
    config = deepcopy(SETTINGS)
    config["phases"] = [{"name": "text", "kind": "next_token", "max_steps": STEPS, "lr": 0.01}]
    config["parallel"] = {"expert": 1, "zero_stage": 0}
    del config["task"], config["rl"]
    config["checkpoint"]["every_steps"] = 3
    config["data"] |= {"task_share": 0.0, "replica_index": index, "num_replicas": num_replicas}
    config["outer"] = {
        "url": str(rounds),
        "replica": replica,
        "inner_steps": INNER_STEPS,
        "expected_replicas": num_replicas,
        "sparseloco": {"density": 0.0625},
        "grace_s": 300.0,
        "deadline_s": 300.0,
        "poll_s": 0.02,
        "anchor_every_rounds": 2,
        "keep_anchors": 0,
        **outer,
    }
    return config


@dataclass
class Fault:
    """What a rank does to itself, or to what it sends; without more, SIGKILL."""

    pattern: str = ""
    """Of a file that it puts."""
    when: str = "before"
    """before or after that."""
    after_update: int = 0
    after_settle: int = -1
    """The round that is settled, and not applied yet."""
    garbage: bool = False
    """That file is garbage instead."""
    wait_for: str = ""
    """It puts that file once this one exists."""
    at_round: int = -1
    scale: float = 1.0
    """What it trained in that round is so many times as much, or NaN."""
    patient_until: str = ""
    """It gives nobody up until this file exists."""


class PatientUntil:
    """An OuterConfig whose grace is endless until a file exists: before the fault of a test nobody
    is given up because the machine is slow."""

    def __init__(self, config: Any, path: Path | str) -> None:  # noqa: ANN401
        self._config, self._path = config, Path(path)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name == "grace_s" and not self._path.exists():
            return float("inf")
        return getattr(self._config, name)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _arm(session: Any, fault: Fault) -> None:  # noqa: ANN401
    """Makes it happen."""
    outer = session._outer
    store, exchange, update = outer._link.meter, outer._link.exchange, session.update
    put = getattr(store, "put", None)  # a group has none
    settle, rows = exchange.settle, outer._rows

    def faulty_put(name: str, data: bytes, overwrite: bool = False) -> bool:
        hit = bool(fault.pattern and re.fullmatch(fault.pattern, name))
        if hit and fault.wait_for:
            while not Path(fault.wait_for).exists():
                time.sleep(0.02)
        elif hit and not fault.garbage and fault.when == "before":
            _die()
        created = put(name, b"garbage" * 100 if hit and fault.garbage else data, overwrite)
        if hit and not fault.garbage and fault.when == "after":
            _die()
        return created

    def faulty_settle(number: int) -> Any:  # noqa: ANN401
        settled = settle(number)
        if 0 <= fault.after_settle <= number:
            _die()
        return settled

    def faulty_update(phase: Any) -> Any:  # noqa: ANN401
        result = update(phase)
        if 0 < fault.after_update <= session.progress.step:
            _die()
        return result

    def faulty_rows() -> Any:  # noqa: ANN401
        for each in rows():
            if outer.replica.number == fault.at_round:
                shared = outer.replica.rows[each.name, each.row_start].values
                moved = shared + fault.scale * (each.values - shared)
                each = replace(each, values=moved)  # noqa: PLW2901
            yield each

    store.put, exchange.settle, session.update = faulty_put, faulty_settle, faulty_update
    outer._rows = faulty_rows
    if fault.patient_until:
        inner = exchange._exchange
        inner._config = PatientUntil(inner._config, fault.patient_until)


def _rollouts(config: Any, run_dir: Path) -> Any:  # noqa: ANN401
    """Engines in rank 0's process, where a phase wants them."""
    from gossamer.trainer.model import hf_config
    from gossamer.trainer.prepare import load_run_tokenizer
    from local_rollouts import LocalRollouts
    from torch.distributed import get_rank

    if get_rank() or all(phase.kind != "grpo" for phase in config.phases):
        return None
    fields = load_run_tokenizer(run_dir).hf_fields()
    return LocalRollouts(run_dir, hf_config(config.model, fields).to_dict(), 1)


def run_replica(run_dir: str, config: dict, attempt: int, fault: Fault | None) -> None:
    """One rank of one attempt, in a world that is there already."""
    from gossamer.launch.controller import newest_checkpoint
    from gossamer.launch.recipe import build_config
    from gossamer.trainer.config import TrainConfig
    from gossamer.trainer.loop import train
    from gossamer.trainer.session import RunPlace, Session

    built, folder = build_config(TrainConfig, config, "train"), Path(run_dir)
    newest = newest_checkpoint(folder, built.checkpoint.url)
    place = RunPlace(run_dir=folder, name="test", attempt=attempt, resume_from=newest)
    session = Session(built, place, _rollouts(built, folder), on_checkpoint=lambda step: None)
    if fault is not None:
        _arm(session, fault)
    train(session)


def _rank(
    run_dir: str,
    config: dict,
    attempt: int,
    fault: Fault | None,
    rank: int,
    meet: str,
    environment: dict[str, str],
) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    size = config["parallel"].get("data", 1) * config["parallel"].get("expert", 1)
    os.environ.update(environment)
    os.environ.update(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(size))
    try:
        dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size)
        run_replica(run_dir, config, attempt, fault)
    except BaseException:
        Path(run_dir, f"error-{attempt}-{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


class Running:
    """A replica's ranks."""

    def __init__(
        self,
        run_dir: Path,
        config: dict,
        attempt: int = 1,
        fault: Fault | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        from gossamer.launch.recipe import build_config
        from gossamer.trainer.config import TrainConfig
        from gossamer.trainer.prepare import prepare_run

        prepare_run(build_config(TrainConfig, config, "train"), run_dir, "test")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.run_dir, self.attempt, self._is_late = run_dir, attempt, False
        size = config["parallel"].get("data", 1) * config["parallel"].get("expert", 1)
        meet = tempfile.mktemp(prefix="meet", dir=run_dir)
        self._ranks = [
            context.Process(
                target=_rank,
                args=(str(run_dir), config, attempt, fault, r, meet, environment or {}),
            )
            for r in range(size)
        ]
        for process in self._ranks:
            process.start()

    def ended(self, timeout_s: float = 300.0) -> list[int | None]:
        """Exit codes of all ranks; once one has failed the others are killed.

        The first that starts waits for the server's imports: 30 s at a load of 20.
        """
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            codes = [process.exitcode for process in self._ranks]
            if None not in codes or any(codes):
                break
            time.sleep(0.02)
        self._is_late = None in codes and not any(codes)
        for process in self._ranks:
            if process.exitcode is None:
                process.kill()
            process.join()
        return codes

    def error(self) -> str:
        """What ended it."""
        found = sorted(self.run_dir.glob(f"error-{self.attempt}-*"))
        told = ["killed: it did not end in time"] if self._is_late else []
        return "\n".join(told + [path.read_text() for path in found])


def finish(*running: Running) -> None:
    """All end well."""
    for each in running:
        assert set(each.ended()) == {0}, each.error()


def hashes(run_dir: Path) -> dict[int, str]:
    """State hash before each round that a run went on to."""
    return {e["next_round"]: e["state_hash"] for e in events(run_dir, "outer_round")}


def records(rounds: Path) -> list[dict]:
    """The settled rounds, in order."""
    return [json.loads(path.read_text()) for path in sorted(rounds.glob("round-*.json"))]
