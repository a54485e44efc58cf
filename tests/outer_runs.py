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
from dataclasses import dataclass, field
from pathlib import Path

from tiny_run import SETTINGS, events

PRELOAD = ["outer_runs", "gossamer.trainer.session", "gossamer.trainer.loop", "gloo_world"]
STEPS, INNER_STEPS = 8, 2


def settings(replica: str, index: int, num_replicas: int, rounds: Path | str, **outer) -> dict:
    """Text alone, a checkpoint after every third step: in the middle of rounds of two."""
    config = deepcopy(SETTINGS)
    config["phases"] = [{"name": "text", "kind": "next_token", "max_steps": STEPS, "lr": 0.01}]
    config["parallel"] = {"expert": 1, "zero_stage": 0}
    config["checkpoint"]["every_steps"] = 3
    config["data"] |= {"replica_index": index, "num_replicas": num_replicas}
    config["outer"] = {
        "url": str(rounds),
        "replica": replica,
        "inner_steps": INNER_STEPS,
        "expected_replicas": num_replicas,
        "sparseloco": {"density": 0.0625},
        "grace_s": 60.0,
        "deadline_s": 100.0,
        "poll_s": 0.02,
        "anchor_every_rounds": 2,
        "keep_anchors": 0,
        **outer,
    }
    return config


@dataclass
class Fault:
    """SIGKILL (or what `act` names) around a put to the store whose name `pattern` fits, or after
    an update."""

    pattern: str = ""
    when: str = "before"
    """before, after"""
    after_update: int = 0
    poison: str = ""
    """nan, garbage or norm: what is sent instead of a message that `pattern` fits."""
    sleep_s: float = field(default=0.0)


def _arm(store: object, fault: Fault) -> None:
    put = store.put  # type: ignore[attr-defined]

    def faulty(name: str, data: bytes, overwrite: bool = False) -> bool:
        hit = re.fullmatch(fault.pattern, name)
        if hit and fault.poison:
            data = b"garbage" * 100
        elif hit and fault.sleep_s:
            time.sleep(fault.sleep_s)
        elif hit and fault.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        created = put(name, data, overwrite)
        if hit and fault.when == "after" and not fault.poison:
            os.kill(os.getpid(), signal.SIGKILL)
        return created

    store.put = faulty  # type: ignore[attr-defined]


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
    session = Session(built, place, None, on_checkpoint=lambda step: None)
    if fault is not None and fault.pattern:
        _arm(session._outer._link.meter, fault)
    if fault is not None and fault.after_update:
        update = session.update

        def update_and_die(phase):
            result = update(phase)
            if session.progress.step == fault.after_update:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        session.update = update_and_die
    train(session)


def _rank(run_dir: str, config: dict, attempt: int, fault: Fault | None, rank: int, meet: str):
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    size = config["parallel"].get("data", 1) * config["parallel"].get("expert", 1)
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
        self, run_dir: Path, config: dict, attempt: int = 1, fault: Fault | None = None
    ) -> None:
        from gossamer.launch.recipe import build_config
        from gossamer.trainer.config import TrainConfig
        from gossamer.trainer.prepare import prepare_run

        prepare_run(build_config(TrainConfig, config, "train"), run_dir, "test")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.run_dir, self.attempt = run_dir, attempt
        size = config["parallel"].get("data", 1) * config["parallel"].get("expert", 1)
        meet = tempfile.mktemp(prefix="meet", dir=run_dir)
        self._ranks = [
            context.Process(target=_rank, args=(str(run_dir), config, attempt, fault, r, meet))
            for r in range(size)
        ]
        for process in self._ranks:
            process.start()

    def ended(self, timeout_s: float = 120.0) -> list[int | None]:
        """Exit codes of all ranks; once one has failed the others are killed."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            codes = [process.exitcode for process in self._ranks]
            if None not in codes or any(codes):
                break
            time.sleep(0.02)
        for process in self._ranks:
            if process.exitcode is None:
                process.kill()
            process.join()
        return codes

    def error(self) -> str:
        """What ended it."""
        found = sorted(self.run_dir.glob(f"error-{self.attempt}-*"))
        return "\n".join(path.read_text() for path in found)


def finish(*running: Running) -> None:
    """All end well."""
    for each in running:
        assert set(each.ended()) == {0}, each.error()


def hashes(run_dir: Path) -> dict[int, str]:
    """State hash after each round that a run says it took part in."""
    return {e["round"]: e["state_hash"] for e in events(run_dir, "outer_round")}


def records(rounds: Path) -> list[dict]:
    """The settled rounds, in order."""
    return [json.loads(path.read_text()) for path in sorted(rounds.glob("round-*.json"))]
