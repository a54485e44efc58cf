"""What a run came to: metrics.jsonl in, summary.json out.

The one idea: the events are the only source. Nothing here asks the trainer, the log or an engine,
so the summary of a run that was killed is made exactly like that of one that ended well.

A resumed run does steps again. `settle` keeps the later line: the first train step of an attempt
takes back every train step of earlier attempts from that step on (with what they measured of
changes, and the evals after it), and an eval repeated at the same step replaces the earlier one.
Published versions are never taken back: they crossed the wire, even when a takeover rewound them.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from statistics import median
from typing import Any

from gossamer.trainer.event_store import StoreTail
from gossamer.trainer.run_folder import inside, put_beside, url_of

Event = dict[str, Any]

FIELDS = {
    "run_start": ("name", "seed"),
    "phase": ("phase",),
    "train_step": ("phase", "step", "loss"),
    "publish": ("version", "kind", "frame_bytes", "full_bytes", "density"),
    "engine": ("engine", "what"),
    "eval": ("name", "step"),
    "checkpoint": ("step",),
    "lifecycle": ("part", "state", "why"),
    "checkpoint_torn": ("reason",),
    "audit": ("engine", "version", "equal"),
}
"""What a line of each kind must hold to be counted; other kinds pass through unread."""

NOT_THERE = frozenset({"dead", "lost", "left", "drained", "waits", "unaudited"})
"""What is said of an engine that holds no weights that count."""

COPIED = (
    *("name", "seed", "params", "active_params", "world_size", "ep_size", "zero_stage"),
    *("peak_flops", "peak_source"),
)
"""What the summary takes from the last run_start as it is."""

LOSS_STEPS = 10
"""loss_first and loss_last are means over this many steps."""


def parse_event(line: bytes, where: str) -> Event:
    """One line of metrics.jsonl. Raises ValueError that names `where` and what is missing."""
    try:
        event = json.loads(line)
    except ValueError:
        raise ValueError(f"{where}: expected one JSON object, found {line[:60]!r}") from None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError(f"{where}: expected a JSON object with a field 'event'")
    for field in ("time_s", *FIELDS.get(event["event"], ())):
        if field not in event:
            raise ValueError(f"{where}: a {event['event']} event needs the field {field!r}")
    return event


def read_events(run_dir: Path) -> list[Event]:
    """All events of a run, in the order they were written; of one at a URL, by their time.

    A last line without its newline was torn by a kill and is left out unless it is whole. Raises
    ValueError, naming file and line, for any other line that is no event.
    """
    if (url := url_of(Path(run_dir))) is not None:
        tail = StoreTail(url)
        lines = tail.read(is_last=True)
        if not tail.has_writers:
            raise ValueError(f"{url} holds no metrics; expected the folder of a run")
        return [parse_event(line, f"{url}/metrics") for line in lines]
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected the metrics of a run")
    *lines, torn = path.read_bytes().split(b"\n")
    events = [parse_event(line, f"{path}:{i}") for i, line in enumerate(lines, 1) if line.strip()]
    if torn:
        try:
            events.append(parse_event(torn, str(path)))
        except ValueError:
            pass
    return events


def settle(events: list[Event]) -> list[Event]:
    """The events without the train steps, changes and evals that a later attempt did again."""
    order: dict[str, int] = {}
    kept: list[tuple[int, tuple[int, int], Event]] = []
    attempt, phase, resumed = 0, "", False
    for event in events:
        kind = event["event"]
        if kind == "run_start":
            attempt, resumed = attempt + 1, attempt > 0
        elif kind == "train_step":
            phase = event["phase"]
            order.setdefault(phase, len(order))
        place = (order.get(phase, -1), event.get("step", -1))
        if kind == "train_step" and resumed:
            kept, resumed = [k for k in kept if not _is_undone(k[2], k[1], place)], False
        kept.append((attempt, place, event))
    newest = {_eval_key(e): attempt for attempt, _, e in kept if e["event"] == "eval"}
    return [e for attempt, _, e in kept if attempt >= newest.get(_eval_key(e), 0)]


def _eval_key(event: Event) -> tuple[str, int] | None:
    return (event["name"], event["step"]) if event["event"] == "eval" else None


def _is_undone(event: Event, place: tuple[int, int], resumed_at: tuple[int, int]) -> bool:
    # an eval at the step we resume from tells of the weights before that step: it still holds
    if event["event"] in ("train_step", "change"):
        return place >= resumed_at
    return event["event"] == "eval" and place > resumed_at


def of_kind(events: list[Event], kind: str, /, **fields: object) -> list[Event]:
    """The events of one kind whose named fields have the given values."""
    wanted = {"event": kind, **fields}
    return [e for e in events if all(e.get(k) == v for k, v in wanted.items())]


def rl_phases(events: list[Event]) -> set[str]:
    """Names of the phases whose kind, by run_start, is grpo; a phase named rl is one anyway."""
    told = [p for e in of_kind(events, "run_start") for p in e.get("phases") or []]
    return {"rl", *(p["name"] for p in told if isinstance(p, dict) and p.get("kind") == "grpo")}


def rl_evals(events: list[Event], name: str) -> list[Event]:
    """The evals of the RL phase: those after the last train step of any other phase, the one
    before the first RL step included. Empty while there is no RL step. `events` are settled."""
    steps = [i for i, e in enumerate(events) if e["event"] == "train_step"]
    rl = rl_phases(events)
    if not steps or events[steps[-1]]["phase"] not in rl:
        return []
    start = max((i for i in steps if events[i]["phase"] not in rl), default=0)
    return of_kind(events[start:], "eval", name=name)


def attempt_starts(events: list[Event]) -> list[int]:
    """Index of the first event of each attempt: its run_start, or the engines started for it."""
    starts = []
    for index in (i for i, e in enumerate(events) if e["event"] == "run_start"):
        while index and _is_of_a_start(events[index - 1]):
            index -= 1
        starts.append(index)
    return starts


def _is_of_a_start(event: Event) -> bool:
    is_engine = event["event"] == "engine" and event["what"] in ("start", "waits", "ready")
    return is_engine or event["event"] in ("pools", "lifecycle")


def living_engines(events: list[Event]) -> set[str]:
    """Engines of the last attempt that were alive when last heard of."""
    ours = events[attempt_starts(events)[-1] :]
    said = {e["engine"]: e.get("what") for e in ours if e["event"] in ("engine", "audit")}
    return {engine for engine, what in said.items() if what not in NOT_THERE}


def _is_bit_exact(events: list[Event], last_version: int | None) -> bool | None:
    if last_version is None:
        return None
    audits = {e["engine"]: e for e in of_kind(events, "audit")}
    last = [audits.get(engine) for engine in living_engines(events)]
    return bool(last) and all(a and a["equal"] and a["version"] == last_version for a in last)


def mean(values: list[float]) -> float | None:
    """None for no values, and for a sum that is not finite: JSON has no word for it."""
    total = math.fsum(values) if all(map(math.isfinite, values)) else math.nan
    return total / len(values) if values and math.isfinite(total) else None


def summarise(run_dir: Path) -> Event:
    """summary.json's content. None means there was nothing to measure (or it was not finite).

    name, seed, params, active_params, world_size, ep_size, zero_stage: from the last run_start.
    engines: rollout engines alive at the end.
    attempts: how often the run was started; more than 1 says it was killed and resumed.
    end_reason: of the last run_end, None for a run that runs still or was killed.
    reward_first, reward_last: exact_match of the first and last "heldout" eval of the RL phase;
        heldout_problems: how many problems the last one held.
    loss_first, loss_last: mean loss of the first and last 10 steps outside the RL phase, skipped
        ones left out; skips: updates skipped because the gradient was not finite.
    heldout_loss_first, heldout_loss_last: of the first and last "text" eval.
    mfu_mean: model FLOPs over peak_flops (of all ranks), over the time of all steps; peak_source:
        measured (a matrix product at the start of the last attempt) or config.
    steps: train steps of every phase, each counted once; tokens: those they trained on.
    versions: published versions, once each; version_last: the newest.
    wire_bytes: their frames' bytes as written; full_bytes: the same versions as full copies in
        the publish dtype. A version whose line a kill swallowed is in neither.
    change_density_mean: mean over delta versions of changed elements / elements.
    engines_bit_exact: every such engine's last audit was equal and at the newest version, and
        there is at least one; None when nothing was published.
    saving_slowdown: median time of steps while a checkpoint was written over that of the others,
        outside RL; None with fewer than 3 of either.
    engines_dead: how often an engine was found dead.
    wall_s: from the first run_start to the last event, pauses between attempts included.
    """
    raw = read_events(run_dir)
    events = settle(raw)
    starts = of_kind(raw, "run_start")
    if not starts:
        raise ValueError(f"{inside(Path(run_dir), 'metrics.jsonl')}: holds no run_start event")
    ends = of_kind(raw[raw.index(starts[-1]) :], "run_end")
    steps = of_kind(events, "train_step")
    versions = {e["version"]: e for e in of_kind(raw, "publish")}
    version_last = max(versions, default=None)
    return {
        **{field: starts[-1].get(field) for field in COPIED},
        "engines": len(living_engines(raw)),
        "attempts": len(starts),
        "end_reason": ends[-1].get("reason") if ends else None,
        **_learned(raw, events),
        "steps": len(steps),
        "tokens": sum(e.get("tokens", 0) for e in steps),
        "versions": len(versions),
        "version_last": version_last,
        "wire_bytes": sum(e["frame_bytes"] for e in versions.values()),
        "full_bytes": sum(e["full_bytes"] for e in versions.values()),
        "change_density_mean": mean(
            [e["density"] for e in versions.values() if e["kind"] == "delta"]
        ),
        "engines_bit_exact": _is_bit_exact(raw, version_last),
        "saving_slowdown": saving_slowdown(steps),
        "engines_dead": len(of_kind(raw, "engine", what="dead")),
        "wall_s": raw[-1]["time_s"] - starts[0]["time_s"],
    }


def saving_slowdown(steps: list[Event]) -> float | None:
    """How much slower text steps are while a checkpoint is written, as a ratio of medians."""
    alike = [e for e in steps if "reward_mean" not in e and "saving" in e]
    with_write, without = (
        [e["step_s"] for e in alike if e["saving"] is saving] for saving in (True, False)
    )
    if min(len(with_write), len(without)) < 3:
        return None
    return median(with_write) / median(without)


def _learned(raw: list[Event], events: list[Event]) -> Event:
    """The part of the summary that tells what came of training; `events` are settled."""
    steps, rl = of_kind(events, "train_step"), rl_phases(raw)
    losses = [e["loss"] for e in steps if e["phase"] not in rl and not e.get("skipped")]
    heldout, text = rl_evals(events, "heldout"), of_kind(events, "eval", name="text")
    timed = [e for e in steps if e.get("mfu") is not None]
    return {
        "reward_first": heldout[0]["exact_match"] if heldout else None,
        "reward_last": heldout[-1]["exact_match"] if heldout else None,
        "heldout_problems": heldout[-1]["problems"] if heldout else None,
        "loss_first": mean(losses[:LOSS_STEPS]),
        "loss_last": mean(losses[-LOSS_STEPS:]),
        "heldout_loss_first": mean([e["loss"] for e in text[:1]]),
        "heldout_loss_last": mean([e["loss"] for e in text[-1:]]),
        "skips": sum(bool(e.get("skipped")) for e in steps),
        "mfu_mean": sum(e["mfu"] * e["step_s"] for e in timed) / sum(e["step_s"] for e in timed)
        if timed
        else None,
    }


def write_whole(path: Path, text: str) -> Path:
    """Writes the file under a temporary name and renames it: it is old, or new, never half."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_summary(run_dir: Path) -> Path:
    """Writes RUN_DIR/summary.json and returns its path on this host."""
    text = json.dumps(summarise(run_dir), indent=2, allow_nan=False)
    path = write_whole(Path(run_dir) / "summary.json", text + "\n")
    put_beside(Path(run_dir), path.name)
    return path
