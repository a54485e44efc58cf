"""The rows of `gossamer bench placement` as Markdown.

The one idea: one table for each problem, one line for each answer, numbers of the steps that were
solved on beside those of the last steps scored.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gossamer.launch.quantities import MISSING, format_bytes, format_duration, format_percent

COMMAND = "gossamer bench placement"
BEGIN, END = "<!-- bench placement: begin -->", "<!-- bench placement: end -->"
COLUMNS = ("trace", "method", "busiest / mean", "later", "across nodes a step", "later")
Row = dict[str, Any]


def render_table(path: Path) -> str:
    """One table a problem. Raises ValueError for other JSON."""
    try:
        result = json.loads(path.read_text())
        lines = [f"`{result['command']}` on {result['machine']}."]
        problems: dict[str, dict[tuple[str, str], list[Row]]] = {}
        for row in result["rows"]:
            key = row["trace"], row["method"]
            problems.setdefault(row["minimised"], {}).setdefault(key, []).append(row)
        for name, methods in problems.items():
            lines += ["", f"**Minimised: {name}**", "", _line([*COLUMNS, "gap", "time"])]
            lines.append("|" + "---|" * (len(COLUMNS) + 2))
            lines += [_line(cells) for cells in _merged(methods)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold rows of `{COMMAND}`: {error}") from error
    return "\n".join(lines)


def _merged(methods: dict[tuple[str, str], list[Row]]) -> list[list[str]]:
    """Cells of each line; methods that answer alike share one, with the time of each."""
    lines: dict[tuple[str, ...], list[list[str]]] = {}
    for key, rows in methods.items():
        trace, method, *numbers, gap, time = _cells(*key, rows)
        lines.setdefault((trace, *numbers), []).append([method, gap, time])
    return [
        [trace, ", ".join(m for m, _, _ in alike), *numbers, alike[-1][1]]
        + [", ".join(time for _, _, time in alike)]
        for (trace, *numbers), alike in lines.items()
    ]


def _cells(trace: str, method: str, rows: list[Row]) -> list[str]:
    now, later = rows[0], rows[-1]
    size = f"{now['layers']} x {now['experts']} on {now['nodes']} x {now['ranks'] // now['nodes']}"
    return [
        f"{trace}: {size}",
        method,
        f"{now['max_over_mean']:.4f}",
        f"{later['max_over_mean']:.3f} (+{later['drift_steps']})",
        format_bytes(now["cross_node_bytes"]),
        format_bytes(later["cross_node_bytes"]),
        MISSING if now["gap"] is None else format_percent(now["gap"]),
        _time(now["time_s"]),
    ]


def _time(seconds: float | None) -> str:
    """Milliseconds below a second."""
    if seconds is None or seconds >= 1:
        return format_duration(seconds)
    return f"{1000 * seconds:.3g} ms"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
