"""The rows of `gossamer bench sparsity` as Markdown.

The one idea: each arm is told with what it cost and how far its seeds lie apart, and each question
with its verdict, the ones without an answer too.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

BEGIN, END = "<!-- bench sparsity: begin -->", "<!-- bench sparsity: end -->"
COMMAND = "gossamer bench sparsity"
Row = dict[str, Any]


def render_table(path: Path) -> str:
    """Arms, verdicts, products. Raises ValueError for other JSON."""
    try:
        found = json.loads(path.read_text())
        seeds = ", ".join(str(seed) for seed in sorted({row["seed"] for row in found["rows"]}))
        lines = [
            f"`{found['command']}` on {found['machine']}, load {found['load_average']}; each arm:"
            f" seeds {seeds}, the compute of {found['sizes']['dense_steps']} dense steps.",
            "",
            *_arms(found["rows"]),
            "",
            f"Noise, the widest range between seeds of one arm: {found['noise']:.3f} nats.",
            "",
            *_verdicts(found["verdicts"], {row["arm"]: row["steps"] for row in found["rows"]}),
            "",
            *_products(found["products"]),
            "",
            *_changes(found["changes"]),
            "",
            *_messages(found["messages"]),
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold rows of `{COMMAND}`: {error}") from error
    return "\n".join(lines)


def _arms(rows: list[Row]) -> list[str]:
    head = ("arm", "loss (range)", "GFLOP", "steps", "of a dense step", "density, mean")
    lines = _head(*head, "flips a step", "ms")
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        losses = [row["loss"] for row in own]
        cells = (
            arm,
            f"{mean(losses):.3f} ({max(losses) - min(losses):.3f})",
            f"{mean(row['flops'] for row in own) / 1e9:.1f}",
            str(own[0]["steps"]),
            f"{100 * own[0]['flops_share']:.0f} %",
            f"{own[0]['density']:.3f}, {own[0]['mean_density']:.3f}",
            f"{mean(row['flip_rate'] for row in own):.5f}",
            f"{1000 * mean(row['step_s'] for row in own):.0f}",
        )
        lines.append(_line(*cells))
    return lines


def _verdicts(verdicts: list[Row], steps: dict[str, int]) -> list[str]:
    lines = _head("question", "difference of loss", "by seed", "steps", "here")
    for each in verdicts:
        by_seed = ", ".join(f"{difference:+.3f}" for difference in each["differences"])
        both = f"{steps[each['arm']]}, {steps[each['other']]}"
        cells = (each["question"], f"{each['difference']:+.3f}", by_seed, both, each["verdict"])
        lines.append(_line(*cells))
    return lines


def _products(products: list[Row]) -> list[str]:
    names = list(dict.fromkeys(row["product"] for row in products))
    dense_s = next(row["seconds"] for row in products)
    lines = _head("density", *(f"{name}, ms (times dense)" for name in names))
    for density in dict.fromkeys(row["density"] for row in products):
        own = {r["product"]: r["seconds"] for r in products if r["density"] == density}
        cells = [f"{1000 * own[name]:.2f} ({own[name] / dense_s:.2f})" for name in names]
        lines.append(_line(f"{density:g}", *cells))
    return lines


def _changes(changes: list[Row]) -> list[str]:
    lines = _head("a change of masks", "ms a million weights")
    return lines + [_line(row["change"], f"{1000 * row['seconds']:.0f}") for row in changes]


def _messages(messages: list[Row]) -> list[str]:
    """Of the first round and of the last one."""
    rules = sorted({row["rule"] for row in messages})
    lines = _head("plan", *(f"`{rule}`, kB: first round, last" for rule in rules))
    for plan, density in dict.fromkeys((row["plan"], row["density"]) for row in messages):
        own = {
            r["rule"]: r["bytes"] for r in messages if (r["plan"], r["density"]) == (plan, density)
        }
        name = "none" if plan is None else f"{plan}, {100 * density:g} %"
        lines.append(
            _line(name, *(f"{own[r][0] / 1e3:.1f}, {own[r][-1] / 1e3:.1f}" for r in rules))
        )
    return lines


def _head(*cells: str) -> list[str]:
    return [_line(*cells), "|" + "---|" * len(cells)]


def _line(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"
