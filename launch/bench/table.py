"""The rows of `gossamer bench sync` as Markdown, printed or put into a page.

The one idea: a page holds nothing that was typed by hand. What stands between the two marks is
replaced as a whole by what the JSON says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gossamer.launch.bench.peers import OURS
from gossamer.launch.quantities import MISSING, format_bytes, format_percent

BEGIN, END = "<!-- bench sync: begin -->", "<!-- bench sync: end -->"
RATES = ("encode", "decode")
"""Whose speed the summary gives, as a share of memcpy's."""
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


def put_table(page: Path, table: str, begin_mark: str = BEGIN, end_mark: str = END) -> None:
    """Replaces what stands between the marks. Raises ValueError for a page without them."""
    text = page.read_text()
    head, begin, rest = text.partition(begin_mark)
    _, end, tail = rest.partition(end_mark)
    if not (begin and end):
        raise ValueError(
            f"{page} has no lines {begin_mark} and {end_mark} to put the table between"
        )
    page.write_text(f"{head}{begin}\n{table}\n{end}{tail}")


def _summary(by_trace: dict[str, list[Row]], links: list[float | None]) -> list[str]:
    """Our bytes beside the bound and the others', our speed, and who is first on each link."""
    others = list(dict.fromkeys(row["codec"] for rows in by_trace.values() for row in rows))
    others.remove(OURS)
    ours = [OURS, f"{OURS} / bound", *(f"{codec} / {OURS}" for codec in others)]
    speeds = [f"{OURS}: {rate}, share of memcpy rate" for rate in RATES]
    lines = _head(["trace", "changed", *ours, *speeds, *(f"first, {_link(on)}" for on in links)])
    for trace, rows in by_trace.items():
        by_codec = {row["codec"]: row for row in rows}
        own = by_codec[OURS]
        cells = [trace, format_percent(own["density"]), format_bytes(own["bytes"])]
        cells.append(f"{own['bytes'] / own['bound_bytes']:.3f}")
        cells += [f"{by_codec[codec]['bytes'] / own['bytes']:.3g}" for codec in others]
        cells += [f"{own['memcpy_s'] / own[f'{rate}_s']:.2f}" for rate in RATES]
        for on in links:
            same_link = [row for row in rows if row["link_mbit"] == on]
            cells.append(min(same_link, key=_total_s)["codec"])
        lines.append(_line(cells))
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
