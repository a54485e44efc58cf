"""Sizes, names and docstrings: files of at most 400 lines, functions of at most 60, no drawers."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

import pytest
from source_tree import ROOMS, Source, sources

FILE_LINES, FUNCTION_LINES = 400, 60
DRAWERS = {"util", "utils", "helper", "helpers", "common", "manager", "managers", "misc"}


def size_faults(source: Source) -> list[str]:
    count = len(source.text.splitlines())
    faults = [f"{source.path}: {count} lines"] if count > FILE_LINES else []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                faults.append(f"{source.path}:{node.lineno}: {node.name} has {length} lines")
    return faults


def name_faults(source: Source) -> list[str]:
    """A module or folder is named for what it holds, not for being handy."""
    words = re.split(r"[/_.]", source.path)
    return [f"{source.path}: {word} says nothing" for word in words if word in DRAWERS]


def docstring_faults(source: Source) -> list[str]:
    text = (ast.get_docstring(source.tree) or "").strip()
    if not text:
        return [f"{source.path}: no module docstring"]
    is_stub = re.match(r"(TBD|TODO|FIXME|XXX)\b", text)
    return [f"{source.path}: the docstring is a placeholder"] if is_stub else []


def unfinished_faults(source: Source) -> list[str]:
    return [
        f"{source.path}:{node.lineno}: NotImplementedError; a seam is a Protocol"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Name) and node.id == "NotImplementedError"
    ]


def all_faults(check: Callable[[Source], list[str]], *folders: str) -> list[str]:
    return [fault for source in sources(*folders) for fault in check(source)]


def test_sizes_and_names():
    assert all_faults(size_faults, *ROOMS, "tests") == []
    assert all_faults(name_faults, *ROOMS, "tests") == []


def test_every_module_says_what_it_does():
    assert all_faults(docstring_faults, *ROOMS) == []


def test_nothing_is_left_unimplemented():
    assert all_faults(unfinished_faults, *ROOMS) == []


@pytest.mark.parametrize(
    ("check", "path", "text"),
    [
        (size_faults, "comm/a.py", "x = 1\n" * 401),
        (size_faults, "comm/a.py", "class A:\n  def f(self):\n" + "    x = 1\n" * 60),
        (size_faults, "comm/a.py", "async def f():\n" + "  x = 1\n" * 60),
        (name_faults, "comm/utils.py", ""),
        (name_faults, "trainer/cache_manager.py", ""),
        (name_faults, "comm/common/a.py", ""),
        (docstring_faults, "comm/a.py", "x = 1"),
        (docstring_faults, "comm/a.py", '"""TBD."""'),
        (unfinished_faults, "comm/a.py", "def f():\n    raise NotImplementedError"),
        (unfinished_faults, "comm/a.py", 'def f():\n    raise NotImplementedError("x")'),
    ],
)
def test_a_fault_is_found(check, path, text):
    assert len(check(Source(path, text))) == 1


def test_what_is_at_the_cap_passes():
    assert size_faults(Source("comm/a.py", "x = 1\n" * 400)) == []
    assert size_faults(Source("comm/a.py", "def f():\n" + "  x = 1\n" * 59)) == []
    assert name_faults(Source("comm/wire.py", "")) == []
