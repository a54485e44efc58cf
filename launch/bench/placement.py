"""`gossamer bench placement`: every method on the same traces, scored now and some steps later.

The one idea: a placement is chosen on what was routed and used on what will be, so each is solved
on one window of steps and scored on that and on later ones; `drift_steps` says how much later.

Columns of a row: `minimised` is the problem, balance or bytes of a dispatcher; `max_over_mean` the
busiest rank over the mean, layers in turn; `cross_node_bytes` what the dispatcher sends between
nodes in a step, forward and backward, if any rank is as likely to hold a token (the traces are of
one rank, or made up); `objective`, `bound` and `gap` of the window that was solved
(later windows have a value only); `moved` experts that are not where contiguous puts them. `time_s`
is the solver's, bound included; the trace is counted beforehand. eplb+N has N slots a rank more,
for replicas: no training placement, so it has no bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gossamer.launch.bench.routing import QUICK_STEPS, RECORDED, STEPS, Made, make_trace
from gossamer.launch.bench.sync import machine
from gossamer.launch.summary import write_whole
from gossamer.parallel.placement.eplb import rebalance
from gossamer.parallel.placement.placement import contiguous
from gossamer.parallel.placement.problem import Problem, Topology, build_problem
from gossamer.parallel.placement.score import score
from gossamer.parallel.placement.solve import METHODS, place
from gossamer.parallel.placement.trace import Trace, load_trace

ROW_BYTES = 8192
"""A hidden state of 4096 in bfloat16, whatever the trace's own model."""
Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A trace, where it is placed, and what is tried on it."""

    name: str
    trace: Trace
    topology: Topology
    window: int
    """Steps that are solved on, from `first`; later windows follow."""
    first: int = 0
    minimised: tuple[tuple[str, str], ...] = (("balance", "two_level"), ("bytes", "two_level"))
    """(objective, dispatch) of each problem."""
    methods: tuple[str, ...] = tuple(METHODS)
    slack: float | None = None
    """See Problem.slack."""
    time_limit_s: float = 10.0


def bench_placement(json_path: Path, traces_folder: Path | None, quick: bool) -> None:
    """Records traces that are missing in the folder, solves, and writes the JSON."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        for case in _cases(traces_folder or Path(temporary), quick):
            print(f"{case.name}: {case.trace.expert_LTK.shape}", file=sys.stderr, flush=True)
            rows += measure(case)
    command = " ".join(["gossamer bench placement", *["--quick"] * quick])
    result = {"machine": machine(), "command": command, "rows": rows}
    write_whole(json_path, json.dumps(result, indent=1))


def measure(case: Case) -> list[Row]:
    """The rows of one case."""
    last = max(case.trace.steps) + 1
    windows = [
        case.trace.between(start, start + case.window)
        for start in range(case.first, last - case.window + 1, case.window)
    ]
    rows: list[Row] = []
    for objective, dispatch in case.minimised:
        problems = [
            build_problem(
                *(window, case.topology),
                objective=objective,
                dispatch=dispatch,
                row_bytes=ROW_BYTES,
                slack=case.slack,
            )
            for window in windows
        ]
        for method in case.methods:
            rows += _rows(case, problems, method)
    return rows if case.slack else [*rows, *_replica_rows(case, problems)]


def _rows(case: Case, problems: list[Problem], method: str) -> Iterator[Row]:
    problem = problems[0]
    try:
        placed = place(problem, method, case.time_limit_s)
    except ValueError as error:  # too large for this method
        print(f"{case.name}: {error}", file=sys.stderr, flush=True)
        return
    even = contiguous(problem.layers, problem.experts, case.topology.ranks)
    shared = _about(case, problem) | {"method": method, "moved": even.moved(placed)}
    for number, later in enumerate(problems):
        found = score(later, placed)
        yield shared | {
            "drift_steps": number * case.window,
            "max_over_mean": found.max_over_mean,
            "cross_node_bytes": score(replace(later, objective="bytes"), placed).value
            / later.steps,
            "objective": found.value,
            "bound": None if number else placed.bound,
            "gap": None if number else placed.gap,
            "time_s": placed.time_s,
        }


def _replica_rows(case: Case, problems: list[Problem], spare: int = 1) -> Iterator[Row]:
    """EPLB with replicas: what equal slots cannot reach."""
    problem, ranks = problems[0], case.topology.ranks
    slots = problem.experts + spare * ranks
    answers = [rebalance(problem.load_LE, slots, n, n, ranks) for n in (case.topology.nodes, 1)]
    found = min(answers, key=lambda a: a.rank_loads(problem.load_LE, ranks).max(1).sum())
    nothing = dict.fromkeys(("cross_node_bytes", "bound", "gap", "time_s", "moved"))
    for number, later in enumerate(problems):
        load_LR = found.rank_loads(later.load_LE, ranks)
        busiest = float(load_LR.max(1).sum())
        yield (
            _about(case, replace(problem, objective="balance"))
            | nothing
            | {
                "method": f"eplb+{spare}",
                "drift_steps": number * case.window,
                "max_over_mean": busiest / float(load_LR.mean(1).sum()),
                "objective": busiest,
            }
        )


def _about(case: Case, problem: Problem) -> Row:
    return {
        "trace": case.name,
        "layers": len(problem.layers),
        "experts": problem.experts,
        "ranks": case.topology.ranks,
        "nodes": case.topology.nodes,
        "minimised": problem.name,
    }


def _cases(folder: Path, quick: bool) -> Iterator[Case]:
    """Recorded ones first, then those made up, from small to large."""
    steps = QUICK_STEPS if quick else STEPS
    limit_s = 1.0 if quick else 10.0
    for name in list(RECORDED)[: 1 if quick else None]:
        path = folder / f"{name}, {steps} steps"
        if not path.exists():
            # in a process of its own: torch and its threads stay there
            folder.mkdir(parents=True, exist_ok=True)
            words = [sys.executable, "-m", "gossamer.launch.bench.routing"]
            subprocess.run([*words, name, str(path), str(steps)], check=True)
        trace = load_trace(path)
        ranks = 2 if trace.num_experts < 64 else 4
        yield Case(
            name=name,
            trace=trace,
            topology=Topology(nodes=2, ranks_per_node=ranks),
            window=steps // 6,
            first=steps // 2,
            time_limit_s=limit_s,
        )
    every = (("balance", "two_level"), *(("bytes", d) for d in ("two_level", "summed", "resident")))
    small = Made(layers=4, experts=64, top_k=4, tokens=1024, steps=30, topics=8)
    if quick:
        small = replace(small, layers=2, steps=6, tokens=512)
    for name, how, slack in (
        ("topics", small, None),
        ("topics, 5 % slack", small, 0.05),
        ("no structure", replace(small, liking=0.0), None),
        ("skewed, drifting", replace(small, skew=1.2, drift=0.2), None),
    ):
        yield Case(
            name=f"made: {name}",
            trace=make_trace(how),
            topology=Topology(nodes=2, ranks_per_node=4),
            window=how.steps // 3,
            minimised=every[1:3] if slack else every if name == "topics" else every[:2],
            slack=slack,
            time_limit_s=limit_s,
        )
    if not quick:
        wide = Made(layers=58, experts=256, top_k=8, tokens=2048, steps=4)
        yield Case(
            name="made: 58 layers of topics",
            trace=make_trace(wide),
            topology=Topology(nodes=8, ranks_per_node=8),
            window=2,
            methods=("contiguous", "eplb", "lpt", "auto"),
            time_limit_s=58.0,
        )
