"""Judges a finished RL run of tiny_run's by its books: samples, versions, engines, final weights.

The one idea: the final history of a run that was rewound is what is left of its events when each
attempt drops the steps after the one it goes on from; that history must be the undisturbed one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from gossamer.comm.log import WeightLog
from gossamer.comm.reader import read_state
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.prepare import load_problems
from gossamer.trainer.rl.prompts import prompt_batch

SAME = ("phase", "loss", "grad_norm", "reward_mean", "samples_learned")
"""Of a step, whoever made it."""
NEW = ("start", "replaced", "reseeded")
"""What an engine is said to do when it begins anew."""


def all_events(run_dir: Path) -> list[dict]:
    """Whole lines; a full disk tears some until a driver takes them out."""
    found = []
    for line in (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True):
        try:
            event = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            continue
        found += [event] if isinstance(event, dict) else []
    return found


def final_history(run_dir: Path) -> tuple[list[dict], int, int]:
    """(the steps that count, how many were made again, how many a dead attempt told of later)."""
    history: list[dict] = []
    attempt = dropped = late = 0
    for event in all_events(run_dir):
        if event["event"] == "run_start":
            attempt = event["attempt"]
            dropped += len(history) - event["step"]
            del history[event["step"] :]
        elif event["event"] == "train_step" and event["attempt"] == attempt:
            history.append(event)
        elif event["event"] == "train_step":
            late += 1
    return history, dropped, late


def faults_of_samples(run_dir: Path) -> list[str]:
    """What is lost or trained twice; every sample of every prompt is to be trained."""
    config = json.loads((run_dir / "config.json").read_text())["train"]
    rl, phases = config["rl"], {phase["name"]: phase for phase in config["phases"]}
    numbered = [problem.problem_id for problem in load_problems(run_dir).train]
    history, found, seen = final_history(run_dir)[0], [], set()
    steps = [event["step"] for event in history]
    if steps != list(range(1, sum(phase["max_steps"] for phase in phases.values()) + 1)):
        found.append(f"the final history has {len(steps)} steps, and not each one once, in order")
    for event in history:
        if phases[event["phase"]]["kind"] != "grpo":
            continue
        step = event["phase_step"] - 1
        asked = prompt_batch(config["seed"], step, rl["prompts_per_step"], len(numbered))
        wanted = {
            (numbered[number], g) for number in asked for g in range(rl["samples_per_prompt"])
        }
        if event["staleness_max"] > rl["max_staleness"]:
            found.append(f"step {event['step']} learned from {event['staleness_max']} versions ago")
        learned = [(int(p), g) for p, gs in event["samples_learned"].items() for g in gs]
        if set(learned) != wanted or len(learned) != len(wanted):
            found.append(f"step {event['step']} learned from {sorted(learned)}, not what was asked")
        epoch = step // (len(numbered) // rl["prompts_per_step"])
        again = seen.intersection((epoch, *sample) for sample in learned)
        found += [f"sample {sample} was trained twice" for sample in again]
        seen |= {(epoch, *sample) for sample in learned}
    return found


def faults_of_versions(run_dir: Path) -> list[str]:
    """Of the log, of what engines were told, and of the last audit."""
    log, found = WeightLog.open(run_dir / "log"), []
    manifests = [log.manifest(version) for version in range(log.head() + 1)]
    epochs = [manifest.writer_epoch for manifest in manifests]
    if [manifest.version for manifest in manifests] != list(range(len(manifests))):
        found.append("the log's versions are not 0, 1, 2, ...")
    if epochs != sorted(epochs):
        found.append(f"writer epochs go back: {epochs}")
    commits: dict[str, list[int]] = {}
    for event in all_events(run_dir):
        if event["event"] != "engine":
            continue
        earlier = commits.setdefault(event["engine"], [])
        if event["what"] in NEW:
            earlier.clear()
        elif event["what"] == "commit":
            if earlier and event["version"] <= earlier[-1]:
                found.append(f"{event['engine']} went from {earlier[-1]} to {event['version']}")
            earlier.append(event["version"])
    audits = [event for event in all_events(run_dir) if event["event"] == "audit"]
    last = [event for event in audits if event["version"] == len(manifests) - 1]
    if not last or not all(event["equal"] for event in last):
        found.append(f"engines do not equal the trainer at the end: {last}")
    words = ["gossamer.launch.cli", "log", "verify", str(run_dir / "log"), "--replay"]
    said = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
    if said.returncode:
        found.append(f"gossamer log verify --replay: {said.stderr.strip() or said.stdout.strip()}")
    return found


def faults_beside(run_dir: Path, whole_dir: Path) -> list[str]:
    """Where the final history and state are not those of the undisturbed run, bit for bit."""
    ours, whole = final_history(run_dir)[0], final_history(whole_dir)[0]
    found = [] if len(ours) == len(whole) else [f"{len(ours)} steps beside {len(whole)}"]
    for one, other in zip(ours, whole, strict=False):
        if differing := [name for name in SAME if one.get(name) != other.get(name)]:
            found.append(f"step {one['step']} differs in {', '.join(differing)}")
    states = [read_state(WeightLog.open(folder / "log")) for folder in (run_dir, whole_dir)]
    found += [
        f"published {name} differs"
        for name, tensor in states[0].items()
        if not torch.equal(tensor, states[1][name])
    ]
    ends = [Checkpoint(list_checkpoints(d / "checkpoints")[-1]) for d in (run_dir, whole_dir)]
    for name, shape in ends[0].shapes.items():
        one, other = (end.read(name, 0, shape[0]) for end in ends)
        held = [(one.master, other.master)]
        held += [(one.moments[kind], other.moments[kind]) for kind in one.moments]
        if not all(torch.equal(a, b) for a, b in held):
            found.append(f"the last checkpoint's {name} or its moments differ")
    return found
