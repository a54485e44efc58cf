"""The rows of `gossamer bench replicas` as Markdown.

The one idea: the table says what was not reached as plainly as what was; means stand beside their
range over seeds, and what was tried to tune is listed with what came of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

from gossamer.launch.bench.replicas import COMMAND
from gossamer.launch.quantities import MISSING, format_bytes, format_count

BEGIN, END = "<!-- bench replicas: begin -->", "<!-- bench replicas: end -->"
COLUMNS = ("rule", "seeds", "loss", "tokens to target", "a replica sends", "leaves its host")
Row = dict[str, Any]


def render_table(path: Path) -> str:
    """What was measured, a table for each model, checks, questions and tuning.

    Raises ValueError for other JSON.
    """
    try:
        result = json.loads(path.read_text())
        lines = _about(result)
        for model, target in result["target_loss"].items():
            rows = [row for row in result["rows"] if row["model"] == model]
            if rows:
                lines += ["", *_of_model(model, target, rows)]
        lines += [*_checks(result), *_questions(result), *_tuning(result)]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold rows of `{COMMAND}`: {error}") from error
    return "\n".join(lines)


def _about(result: Row) -> list[str]:
    sizes, step_s = result["sizes"], result["step_s"]
    steps = sizes["rounds"] * sizes["inner_steps"]
    tokens = steps * sizes["replicas"] * sizes["rows"] * sizes["seq_len"]
    took = ", ".join(f"{1000 * each:.1f} ms ({model})" for model, each in step_s.items())
    shape = [f"{sizes['hidden']} wide", f"{sizes['layers']} layers", f"{sizes['experts']} experts"]
    return [
        f"`{result['command']}` on {result['machine']}, load average {result['load_average']} at"
        f" the end. {sizes['replicas']} replicas, {sizes['rounds']} rounds of"
        f" {sizes['inner_steps']} steps, {format_count(tokens)} tokens in all; models"
        f" {', '.join(shape)} (moe), vocabulary {sizes['vocab_size']}. A step takes {took} of CPU."
        " In square brackets: least and greatest over seeds. Seconds and utilisation are those of"
        " the least exchange, in round brackets utilisation by the median one: others used the"
        " machine.",
    ]


def _of_model(model: str, target: float, rows: list[Row]) -> list[str]:
    links = sorted({row["link_mbit"] for row in rows if row["link_mbit"] is not None})
    heads = [f"{link:g} Mbit/s: s to target, utilisation" for link in links]
    lines = [
        f"**{model}**; target: a held-out loss of {target:.3f}, which DDP, averaging, DiLoCo and"
        " SparseLoCo 3.12 % all came to with every seed",
        "",
        _line([*COLUMNS, *heads]),
        "|" + "---|" * (len(COLUMNS) + len(heads)),
    ]
    arms: dict[tuple, list[Row]] = {}
    for row in rows:
        arms.setdefault((row["rule"], row["density"], row["error_feedback"]), []).append(row)
    for own in arms.values():
        first = own[0]
        seeds = [row for row in own if row["link_mbit"] == first["link_mbit"]]
        cells = [
            _name(first),
            str(len(seeds)),
            _range([row["loss"] for row in seeds], "{:.3f}"),
            _reached(seeds, "tokens_to_target", "{:.3g} k", 1e-3),
            format_bytes(mean(row["wire_bytes"] for row in seeds)),
            MISSING if first["link_bytes"] is None else format_bytes(first["link_bytes"]),
        ]
        for link in links:
            over = [row for row in own if row["link_mbit"] == link]
            cells.append(f"{_reached(over, 'wall_to_target_s', '{:.3g}')}; {_used(over)}")
        lines.append(_line(cells))
    return lines


def _checks(result: Row) -> list[str]:
    """Whole trainings over a link beside what is composed."""
    lines = []
    for check in result["checks"]:
        arm, mbit = check["training"]["arm"], check["link_mbit"]
        row = next(
            row
            for row in result["rows"]
            if (row["rule"], row["density"], row["link_mbit"], row["model"], row["seed"])
            == (arm["rule"], arm["density"], mbit, check["training"]["model"], 1)
            and row["error_feedback"] == arm["error_feedback"]
        )
        exchanges = row["wall_s"] * (1 - row["utilisation"])
        same = "to the bit" if row["loss"] == check["loss"] else f"composed {row['loss']:.6f}"
        lines.append(
            f"- {_name(arm)}, dense, seed 1, over {mbit:g} Mbit/s: {check['wall_s']:.1f} s for all"
            f" rounds, {check['compute_s']:.1f} s of them computing (each round's slowest replica;"
            f" four on these cores) and {check['wall_s'] - check['compute_s']:.1f} s not; composed,"
            f" with a core each: {row['wall_s'] - exchanges:.1f} s and {exchanges:.1f} s. Loss"
            f" {check['loss']:.6f} ({same})."
        )
    return ["", "**Checked end to end**", "", *lines] if lines else []


def _questions(result: Row) -> list[str]:
    found: dict[tuple[str, str], list[float]] = {}
    for each in result["trainings"]:
        training = each["training"]
        for purpose in (training["purpose"], *each.get("also", ())):
            if purpose not in ("tuning", "grid"):
                key = purpose, _asked(training["arm"])
                found.setdefault(key, []).append(each["curve"][-1][1])
    if not found:
        return []
    lines = ["", "**Beside the grid**, dense model, SparseLoCo at 3.12 %", ""]
    lines += [_line(["question", "arm", "seeds", "loss"]), "|---|---|---|---|"]
    for (purpose, arm), losses in sorted(found.items()):
        lines.append(_line([purpose, arm, str(len(losses)), _range(losses, "{:.3f}")]))
    return lines


def _tuning(result: Row) -> list[str]:
    tried: dict[str, list[tuple[float, str]]] = {}
    for each in result["trainings"]:
        if each["training"]["purpose"] == "tuning":
            arm = each["training"]["arm"]
            how = f"lr {arm['lr']:g}"
            if arm["outer_lr"] is not None:
                how += f", outer {arm['outer_lr']:g}"
                how += f" / {arm['momentum']:g}" if arm["momentum"] is not None else ""
            tried.setdefault(arm["rule"], []).append((each["curve"][-1][1], how))
    if not tried:
        return []
    lines = ["", "**Tried with seed 0 of the dense model** (loss; the least is used, in both)", ""]
    for rule, found in tried.items():
        least = min(found)
        cells = [f"{how}: {loss:.3f}{' (used)' * ((loss, how) == least)}" for loss, how in found]
        lines.append(f"- {rule}: {'; '.join(cells)}")
    return lines


def _asked(arm: Row) -> str:
    """What sets an arm of a question apart."""
    if arm.get("longer", 1) > 1:
        return _name(arm)
    parts = [f"absence {arm['absence']}"] if arm["away"] or arm["leaves"] else []
    if arm["aggregation"] != "senders":
        parts.append(f"outer lr {arm['outer_lr']:g}")
    return ", ".join(parts) or f"clip_to_median {arm['clip_to_median']:g}"


def _name(arm: Row) -> str:
    names = {"ddp": "AdamW-DDP", "dgc": "top-k every step (dgc)"}
    name: str = names.get(arm["rule"]) or arm["rule"]
    if arm["density"] is not None:
        name += f" {100 * arm['density']:.3g} %"
    return name if arm["error_feedback"] is not False else f"{name}, no error feedback"


def _range(values: Iterable[float], form: str) -> str:
    ordered = sorted(values)
    shown = form.format(mean(ordered))
    if len(ordered) < 2:
        return shown
    return f"{shown} [{form.format(ordered[0])}, {form.format(ordered[-1])}]"


def _reached(rows: list[Row], field: str, form: str, scale: float = 1.0) -> str:
    """Mean and range over the seeds that came to the target; how many did, if not all."""
    values = [scale * row[field] for row in rows if row[field] is not None]
    if not values:
        return "never" if rows else MISSING
    shown = _range(values, form)
    return shown if len(values) == len(rows) else f"{shown} ({len(values)} of {len(rows)})"


def _used(rows: list[Row]) -> str:
    """Utilisation by the least exchange, and by the median one."""
    if not rows:
        return MISSING
    least, usual = rows[0]["utilisation"], rows[0]["median_utilisation"]
    return f"{100 * least:.0f} % ({100 * usual:.0f} %)"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"
