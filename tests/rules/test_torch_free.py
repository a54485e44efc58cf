"""Configs, --help and what watches a run answer at once: they import no torch."""

from __future__ import annotations

import pytest
from source_tree import ROOMS, ROOT, Source, imported_modules, imports, sources

HEAVY = {"torch", "transformers", "deepspeed", "ray", "plotly"}
LIGHT_MODULES = ("gossamer.launch.summary", "gossamer.launch.display")


def heavy_imports(modules: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in modules} & HEAVY


def is_config(source: Source) -> bool:
    return source.path.endswith("/config.py")


def test_configs_name_no_heavy_package():
    faults = [
        f"{source.path}:{line}: {name}"
        for source in sources(*ROOMS)
        if is_config(source)
        for line, name in imports(source)
        if heavy_imports({name})
    ]
    assert faults == []


def test_configs_and_displays_import_none_on_the_way():
    configs = [source.path for source in sources(*ROOMS) if is_config(source)]
    assert configs
    modules = ["gossamer." + path[: -len(".py")].replace("/", ".") for path in configs]
    code = "\n".join(f"import {name}" for name in (*modules, *LIGHT_MODULES))
    assert heavy_imports(imported_modules("-c", code)) == set()


@pytest.mark.skipif(not (ROOT / "launch/cli.py").exists(), reason="launch/cli.py is not there yet")
def test_help_imports_none():
    found = imported_modules("-m", "gossamer.launch.cli", "--help")
    assert heavy_imports(found) == set()


def test_a_heavy_import_is_found():
    assert heavy_imports(imported_modules("-c", "import json, plotly.colors")) == {"plotly"}
    assert heavy_imports({"torch.nn", "torchdata"}) == {"torch"}
