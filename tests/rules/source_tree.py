"""What the rules look at: the house's Python files, parsed, and what each of them imports."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("comm", "launch", "parallel", "trainer")
IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.\w+)+:[A-Za-z_]\w*")
"""How a registry names an implementation: package.module:Name."""


@dataclass(frozen=True)
class Source:
    """One Python file; `path` is relative to the repository, with forward slashes."""

    path: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return parse(self.text)

    @property
    def room(self) -> str:
        return self.path.partition("/")[0]


@cache
def parse(text: str) -> ast.Module:
    return ast.parse(text)


def sources(*folders: str) -> list[Source]:
    """Every Python file under the folders, sorted."""
    paths = sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    return [Source(p.relative_to(ROOT).as_posix(), p.read_text()) for p in paths]


def tracked_files() -> list[str] | None:
    """What git tracks, or None outside a checkout."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return [path for path in listed.split("\0") if path and (ROOT / path).is_file()]


def imports(source: Source) -> list[tuple[int, str]]:
    """(line, dotted name) of everything a file imports, however it does: at the top, inside a
    function, by importlib, or by a string like "gossamer.comm.log:WeightLog"."""
    found: list[tuple[int, str]] = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(node.lineno, f"{module}.{alias.name}") for alias in node.names]
        elif isinstance(node, ast.Call) and name_of(node.func) in ("import_module", "__import__"):
            names = [a.value for a in node.args[:1] if isinstance(a, ast.Constant)]
            found += [(node.lineno, name) for name in names if isinstance(name, str)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if IMPORT_PATH.fullmatch(node.value) and node.value.startswith("gossamer."):
                found.append((node.lineno, node.value.replace(":", ".")))
    return found


def name_of(node: ast.AST) -> str:
    """The last name of `a.b.c` or `c`, else an empty string."""
    return getattr(node, "attr", None) or getattr(node, "id", None) or ""


def imported_modules(*arguments: str) -> set[str]:
    """Every module that `python ARGUMENTS` imports, asked of a fresh interpreter."""
    command = [sys.executable, "-X", "importtime", *arguments]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT.anchor,
        env={**os.environ, "COLUMNS": "80"},
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    rest = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 0, "\n".join(rest)
    return {line.rpartition("|")[2].strip() for line in lines}
