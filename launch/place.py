"""`gossamer place`: where experts should live, from a routing trace; the answer as text and files.

The one idea: the same counts before and after, so what a placement is said to save is what the
dispatcher would not send; and the bound beside it says what no placement could save.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gossamer.parallel.placement.placement import Placement
    from gossamer.parallel.placement.problem import Problem
    from gossamer.parallel.placement.score import Score

METHODS = ("auto", "contiguous", "eplb", "lpt", "ilp", "moetuner", "local")


def add_place_command(command: argparse.ArgumentParser) -> None:
    """Options of `gossamer place`; nothing heavy is imported."""
    command.add_argument("trace", type=Path, help="folder or file of a routing trace")
    command.add_argument("--nodes", type=int, required=True, metavar="N")
    command.add_argument("--gpus-per-node", type=int, required=True, metavar="N")
    command.add_argument("--method", choices=METHODS, default="auto")
    command.add_argument(
        "--objective",
        choices=("balance", "bytes"),
        help="default: bytes across nodes; balance where there is one node",
    )
    command.add_argument(
        "--dispatch",
        choices=("two_level", "one_level", "summed", "resident"),
        default="two_level",
        help="whose bytes; docs/placement.md says what makes each real (default: two_level)",
    )
    command.add_argument(
        "--sources",
        choices=("even", "seen"),
        default="even",
        help="which rank holds a token: any, as with shuffled data, or that of the trace",
    )
    command.add_argument(
        "--slack",
        type=float,
        metavar="SHARE",
        help="bytes: the busiest rank may have so much more than at the best balance found;"
        " default: as much as EPLB leaves there",
    )
    command.add_argument("--experts", type=int, metavar="N", help="of a layer; default: as seen")
    command.add_argument(
        "--row-bytes", type=int, default=8192, metavar="N", help="hidden size x bytes of an element"
    )
    command.add_argument(
        "--steps", metavar="A:B", help="only optimizer steps A to B - 1 of the trace"
    )
    command.add_argument("--time-limit", type=float, default=30.0, metavar="S", help="seconds")
    command.add_argument("--gap", type=float, default=1e-3, help="near enough to the bound")
    command.add_argument("--out", type=Path, metavar="FILE", help="placement, as JSON")
    command.add_argument("--html", type=Path, metavar="FILE", help="loads and traffic, as pictures")
    command.set_defaults(run=run_place)


def run_place(arguments: argparse.Namespace) -> None:
    """Solves, prints what changes, writes what is asked for."""
    from gossamer.parallel.placement.placement import contiguous, save_placement
    from gossamer.parallel.placement.problem import Topology, build_problem
    from gossamer.parallel.placement.score import score
    from gossamer.parallel.placement.solve import place
    from gossamer.parallel.placement.trace import load_trace

    trace = load_trace(arguments.trace, arguments.experts)
    if arguments.steps:
        trace = trace.between(*_steps(arguments.steps))
    topology = Topology(nodes=arguments.nodes, ranks_per_node=arguments.gpus_per_node)
    problem = build_problem(
        trace,
        topology,
        objective=arguments.objective or ("bytes" if topology.nodes > 1 else "balance"),
        dispatch=arguments.dispatch,
        sources=arguments.sources,
        row_bytes=arguments.row_bytes,
        slack=arguments.slack,
    )
    placed = place(problem, arguments.method, arguments.time_limit, arguments.gap)
    before = contiguous(problem.layers, problem.experts, topology.ranks)
    scores = score(problem, before), score(problem, placed)
    print(summary(problem, len(trace.step_T), placed, before.moved(placed), *scores))
    if arguments.out:
        save_placement(placed, arguments.out)
        print(f"placement: {arguments.out}")
    if arguments.html:
        from gossamer.launch.place_page import write_page

        print(f"pictures: {write_page(arguments.html, problem, placed, *scores)}")


def summary(
    problem: Problem, tokens: int, placed: Placement, moved: int, before: Score, after: Score
) -> str:
    """What `gossamer place` prints."""
    from gossamer.launch.quantities import format_bytes, format_duration, format_percent

    topology, steps = problem.topology, problem.steps
    lines = [
        f"{len(problem.layers)} layers, {problem.experts} experts, {topology.nodes} nodes x"
        f" {topology.ranks_per_node} ranks; {tokens} tokens of {steps} steps",
        f"{'':24}{'contiguous':>14}{placed.method:>14}",
    ]
    for what, old, new in (
        ("busiest rank / mean", f"{before.max_over_mean:.4f}", f"{after.max_over_mean:.4f}"),
        *(
            (f"{where}, a step", *(format_bytes(getattr(s, name) / steps) for s in (before, after)))
            for where, name in (("within nodes", "in_node_bytes"), ("across nodes", "across_bytes"))
        ),
    ):
        lines.append(f"{what:24}{old:>14}{new:>14}")
    lines += [
        f"{moved} of {placed.slots_LS.size} experts live on another rank",
        f"objective ({placed.objective}): {placed.value:.6g}, bound {placed.bound:.6g}, gap"
        f" {format_percent(placed.gap)}, {format_duration(placed.time_s)}",
        f"bound proven by: {placed.proof}",
    ]
    return "\n".join(lines)


def _steps(text: str) -> tuple[int, int]:
    first, colon, stop = text.partition(":")
    if not colon or not (first.isdigit() and stop.isdigit()):
        raise ValueError(f"--steps is {text}; expected A:B, two numbers of optimizer steps")
    return int(first), int(stop)
