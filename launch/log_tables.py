"""What `gossamer log ls` and `inspect` print for people.

The one idea: one line a version, one line a layer; a terminal and a pipe get the same rows.
"""

from __future__ import annotations

import re
import sys
import time
from collections import defaultdict
from typing import Any

from gossamer.launch.quantities import MISSING, format_bytes, format_count, format_percent
from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 200
LAYER = re.compile(r".*?\.\d+(?=\.)")
MAX_STEPS = 6


def print_versions(listed: dict[str, Any]) -> None:
    """`listed` is list_versions' answer."""
    folds: dict[int, list[str]] = defaultdict(list)
    for fold in listed["folds"]:
        folds[fold["last"]].append(
            f"fold from {fold['first']}, {format_bytes(fold['delta_bytes'])}"
        )
    table = _table("version", "step", "epoch", "written", "changed", "delta", "anchor", "")
    for row in listed["versions"]:
        notes = folds[row["version"]]
        if row["rewind_to_step"] is not None:
            notes = [f"takes over at step {row['rewind_to_step']}", *notes]
        table.add_row(
            str(row["version"]),
            str(row["step"]),
            str(row["writer_epoch"]),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(row["created_s"])),
            format_percent(row["density"]) if row["delta"] else MISSING,
            format_bytes(row["delta_bytes"]) if row["delta"] else MISSING,
            format_bytes(row["anchor_bytes"]) if row["anchor"] else MISSING,
            "; ".join(notes),
        )
    _print(f"run {listed['run_id']} at {listed['url']}", table)


def print_version(found: dict[str, Any], by_tensor: bool) -> None:
    """`found` is inspect_version's answer; a row is a layer, or a tensor."""
    changed, elements = found["num_changed"], found["num_elements"]
    signs = f"version {found['version']}, {found['kind']}, step {found['step']}"
    title = (
        f"{signs}: {format_count(changed)} of {format_count(elements)} elements "
        f"({format_percent(changed / elements)}) in {format_bytes(found['frame_bytes'])}, "
        f"full copy {format_bytes(found['full_bytes'])}"
    )
    codecs = _table("codec", "tensors' rows", "elements", "bytes", "bytes per element")
    for name, each in found["codecs"].items():
        ratio = f"{each['nbytes'] / each['coded']:.3g}"
        counts = (each["runs"], each["coded"])
        codecs.add_row(name, *map(format_count, counts), format_bytes(each["nbytes"]), ratio)
    codecs.add_row("(tables)", "", "", format_bytes(found["table_bytes"]), "")
    _print(title, codecs)
    steps = sorted(found["steps"].items(), key=lambda step: -step[1])
    if steps:
        total = sum(count for _, count in steps)
        shown = [f"{name}: {format_percent(count / total)}" for name, count in steps[:MAX_STEPS]]
        _print("steps, in neighbouring values: " + ", ".join(shown))
    rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for tensor in found["tensors"]:
        layer = LAYER.match(tensor["name"])
        rows[tensor["name"] if by_tensor or not layer else layer[0]].append(tensor)
    table = _table("tensor" if by_tensor else "layer", "elements", "coded", "bytes", "by codec")
    for name, tensors in rows.items():
        bytes_of: dict[str, int] = defaultdict(int)
        for tensor in tensors:
            for codec, nbytes in tensor["codecs"].items():
                bytes_of[codec] += nbytes
        held, coded = (sum(t[key] for t in tensors) for key in ("num_elements", "coded"))
        table.add_row(
            name,
            format_count(held),
            format_percent(coded / held),
            format_bytes(sum(bytes_of.values())),
            ", ".join(f"{codec} {format_bytes(n)}" for codec, n in bytes_of.items()),
        )
    _print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        is_text = column in ("tensor", "layer", "codec", "written", "by codec", "")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=True)
    return table


def _print(*things: str | Table) -> None:
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    console = Console(width=width, highlight=False, markup=False)
    for each in things:
        console.print(each)
