"""The rows of `gossamer bench sync` as Markdown, printed or put into a page.

The one idea: a page holds nothing that was typed by hand. What stands between the two marks is
replaced as a whole by what the JSON says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gossamer.launch.bench.ours import NAME
from gossamer.launch.quantities import MISSING, format_bytes, format_percent

BEGIN, END = "<!-- bench sync: begin -->", "<!-- bench sync: end -->"
SUMMARY = ("trace", "changed", "full copy", "gossamer", "of the bound", "int32+bf16", "gap", "xor")
DETAILS = ("codec", "bytes", "encode", "decode", "stage", "commit", "pause")
TIMES = ("encode_s", "decode_s", "stage_s", "commit_s", "pause_s")

Row = dict[str, Any]


def render_table(path: Path) -> str:
    """A summary with one line a trace, then one table a trace. Raises ValueError for other JSON."""
    try:
        result = json.loads(path.read_text())
        machine, command, rows = result["machine"], result["command"], result["rows"]
        by_trace: dict[str, list[Row]] = {}
        for row in rows:
            by_trace.setdefault(row["trace"], []).append(row)
        links = list(dict.fromkeys(row["link_mbit"] for row in rows))
        lines = [f"`{command}` on {machine}.", "", *_summary(by_trace, links)]
        for trace, own in by_trace.items():
            lines += ["", *_details(trace, own, links)]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold rows of `gossamer bench sync`: {error}") from error
    return "\n".join(lines)


def put_table(page: Path, table: str) -> None:
    """Replaces what stands between the marks. Raises ValueError for a page without them."""
    text = page.read_text()
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{page} has no lines {BEGIN} and {END} to put the table between")
    page.write_text(f"{head}{BEGIN}\n{table}\n{END}{tail}")


def _summary(by_trace: dict[str, list[Row]], links: list[float | None]) -> list[str]:
    """Bytes by codec, and who brings the weights over first on each link."""
    lines = _head([*SUMMARY, *(f"first, {_link(link)}" for link in links)])
    for trace, rows in by_trace.items():
        size = {row["codec"]: row["bytes"] for row in rows}
        others = [f"{size[codec] / size[NAME]:.2f}x" for codec in size if codec != NAME][1:]
        first = [min(_on(rows, link), key=_total_s)["codec"] for link in links]
        cells = [trace, format_percent(rows[0]["density"]), format_bytes(rows[0]["full_bytes"])]
        cells += [format_bytes(size[NAME]), f"{size[NAME] / rows[0]['bound_bytes']:.3f}x"]
        lines.append(_line([*cells, *others, *first]))
    return lines


def _details(trace: str, rows: list[Row], links: list[float | None]) -> list[str]:
    row = rows[0]
    lines = [
        f"**{trace}**: {format_percent(row['density'])} changed, bound "
        f"{format_bytes(row['bound_bytes'])}, memcpy {_ms(row['memcpy_s'])} ms. Times in ms.",
        "",
        *_head([*DETAILS, *(f"wire, {_link(link)}" for link in links)]),
    ]
    for codec in dict.fromkeys(row["codec"] for row in rows):
        own = {row["link_mbit"]: row for row in rows if row["codec"] == codec}
        any_row = own[links[0]]
        cells = [codec, format_bytes(any_row["bytes"]), *(_ms(any_row[each]) for each in TIMES)]
        wires = [_ms(own[link]["wire_s"]) if link in own else MISSING for link in links]
        lines.append(_line([*cells, *wires]))
    return lines


def _on(rows: list[Row], link: float | None) -> list[Row]:
    return [row for row in rows if row["link_mbit"] == link]


def _total_s(row: Row) -> float:
    """From new weights at the trainer to new weights in the engine, nothing overlapped."""
    return row["encode_s"] + row["wire_s"] + row["stage_s"] + row["commit_s"]


def _link(mbit: float | None) -> str:
    return "loopback" if mbit is None else f"{mbit:g} Mbit/s"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:.0f}"


def _head(cells: list[str]) -> list[str]:
    return [_line(cells), "|" + "---|" * len(cells)]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
