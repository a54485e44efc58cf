"""The rows of `gossamer bench moe` as Markdown.

The one idea: the verdict is worked out here, from the rows, and printed above them whatever it is.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gossamer.launch.bench.moe import COMMAND, LEVEL
from gossamer.launch.quantities import MISSING, format_bytes

BEGIN, END = "<!-- bench moe: begin -->", "<!-- bench moe: end -->"
HEAD = (
    "| experts, top-k | EP | layer | tokens/s | ours / theirs | interval | memory | ours / theirs |"
)

Row = dict[str, Any]


def render_table(path: Path) -> str:
    """What was measured and where, how many rows are level, then a table for each dtype.

    Raises ValueError for other JSON.
    """
    try:
        result = json.loads(path.read_text())
        lines = _about(result)
        rows = result["rows"]
        ours = {_layer(row): row for row in rows if "ratio" not in row}
        for dtype in dict.fromkeys(row["dtype"] for row in rows):
            lines += ["", f"**{dtype}**", "", HEAD, "|" + "---|" * (HEAD.count("|") - 1)]
            lines += [_line(row, ours[_layer(row)]) for row in rows if row["dtype"] == dtype]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold rows of `{COMMAND}`: {error}") from error
    return "\n".join(lines)


def _about(result: dict[str, Any]) -> list[str]:
    rows, (before, after) = result["rows"], result["load_average"]
    ours = {_layer(row): row for row in rows if "ratio" not in row}
    peers = [row for row in rows if "ratio" in row]
    level = sum(row["ratio"] >= LEVEL for row in peers)
    lean = sum(ours[_layer(row)]["peak_bytes"] <= row["peak_bytes"] for row in peers)
    row = peers[0]
    return [
        f"`{result['command']}` on {result['machine']}; load average {before} before and {after}"
        f" after. A step is {result['includes']}. Hidden size {row['hidden']}, experts"
        f" {row['width']} wide, {row['tokens']} tokens a rank, {len(row['pairs_s'])} pairs.",
        "",
        f"Of {len(peers)} rows ours is level or faster (median of ratios >= {LEVEL}) in {level},"
        f" and needs no more memory in {lean}.",
    ]


def _layer(row: Row) -> tuple[str, int, int]:
    return row["dtype"], row["experts"], row["ep"]


def _line(row: Row, ours: Row) -> str:
    cells = [f"{row['experts']}, {row['top_k']}", str(row["ep"]), row["impl"]]
    cells += [f"{row['tokens_per_s']:.0f}"]
    if row is ours:
        cells += [MISSING, MISSING, format_bytes(row["peak_bytes"]), MISSING]
    else:
        cells += [f"{row['ratio']:.2f}", f"{row['ratio_low']:.2f} to {row['ratio_high']:.2f}"]
        cells += [format_bytes(row["peak_bytes"])]
        cells += [f"{ours['peak_bytes'] / row['peak_bytes']:.2f}"]
    return f"| {' | '.join(cells)} |"
