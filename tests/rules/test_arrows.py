"""Who may import whom: launch -> trainer -> {parallel, comm}, and one file for each heavy guest."""

from __future__ import annotations

import sys

import pytest
from source_tree import ROOMS, Source, imports, sources

MAY_IMPORT = {
    "launch": {"launch", "trainer", "parallel", "comm"},
    "trainer": {"trainer", "parallel", "comm"},
    "parallel": {"parallel"},
    "comm": {"comm"},
}
GUESTS = {
    "ray": ("launch/", "comm/store/ray.py"),
    "deepspeed": ("parallel/deepspeed_engine.py", "launch/bench/moe_layers.py"),
    "wandb": ("trainer/metrics.py",),
    "datasets": ("trainer/data/readers/hf.py",),
    "omegaconf": ("launch/recipe.py",),
    "plotly": ("launch/",),
    "rich": ("launch/",),
}
"""Where a package may be imported; a name that ends in a slash is a folder."""

COMM_PACKAGES = {"torch", "numpy", "numba", "llvmlite", "zstandard"}
"""The base install; llvmlite comes with numba. Files that need more are named in COMM_GUESTS."""
COMM_GUESTS = {
    "comm/engines/hf.py": {"transformers"},
    "comm/engines/vllm.py": {"vllm"},
    "comm/engines/vllm_offline.py": {"vllm", "transformers"},
    "comm/signing.py": {"cryptography"},
    "comm/store/objects.py": {"obstore"},
    "comm/store/ray.py": {"ray"},
}


def arrow_faults(source: Source) -> list[str]:
    faults = []
    for line, name in imports(source):
        first, _, rest = name.partition(".")
        room = rest.partition(".")[0]
        where = f"{source.path}:{line}"
        if not first:
            faults.append(f"{where}: relative import {name}")
        elif first in ROOMS:
            faults.append(f"{where}: {name} without gossamer; other packages have that name")
        elif first == "gossamer" and room not in MAY_IMPORT.get(source.room, ROOMS):
            faults.append(f"{where}: {source.room} may not import {room} ({name})")
    return faults


def guest_faults(source: Source) -> list[str]:
    faults = []
    for line, name in imports(source):
        package = name.partition(".")[0]
        allowed = GUESTS.get(package)
        if allowed and not source.path.startswith(allowed):
            faults.append(f"{source.path}:{line}: {package} belongs in {' or '.join(allowed)}")
        is_foreign = package not in {"gossamer", *ROOMS, *sys.stdlib_module_names}
        known = COMM_PACKAGES | COMM_GUESTS.get(source.path, set())
        if source.room == "comm" and package and is_foreign and package not in known:
            faults.append(f"{source.path}:{line}: comm installs without {package}")
    return faults


def test_arrows_between_rooms():
    assert [fault for source in sources(*ROOMS, "tests") for fault in arrow_faults(source)] == []


def test_guests_stay_in_their_file():
    assert [fault for source in sources(*ROOMS) for fault in guest_faults(source)] == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("comm/a.py", "from gossamer.parallel.dims import build_dims"),
        ("parallel/a.py", "import gossamer.comm.log"),
        ("comm/a.py", "def f():\n    from gossamer.trainer import loop"),
        ("trainer/a.py", "from gossamer.launch.cli import main"),
        ("trainer/a.py", "from gossamer import launch"),
        ("trainer/a.py", 'ENGINES = {"x": "gossamer.launch.engine:X"}'),
        ("comm/a.py", 'import importlib\nimportlib.import_module("gossamer.launch.cli")'),
        ("trainer/a.py", "from .config import X"),
        ("trainer/a.py", "from . import config"),
        ("trainer/a.py", "from comm.log import WeightLog"),
        ("tests/comm/test_a.py", "import comm"),
    ],
)
def test_a_wrong_arrow_is_found(path, text):
    assert len(arrow_faults(Source(path, text))) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("trainer/a.py", "import ray.train"),
        ("parallel/a.py", "if True:\n    import deepspeed"),
        ("trainer/a.py", "from wandb import init"),
        ("launch/a.py", "import omegaconf"),
        ("comm/a.py", "import transformers"),
        ("comm/a.py", "from obstore.store import LocalStore"),
    ],
)
def test_a_guest_in_the_wrong_file_is_found(path, text):
    assert len(guest_faults(Source(path, text))) == 1


def test_right_imports_pass():
    good = {
        "launch/a.py": "import ray\nimport plotly\nfrom gossamer.comm.log import WeightLog",
        "trainer/a.py": "import torch, transformers\nfrom gossamer.parallel.dims import build_dims",
        "comm/engines/hf.py": "import os, torch, transformers\nimport gossamer.comm.log",
        "tests/e2e/test_a.py": "from gossamer.launch import cli\nfrom gossamer.comm import log",
    }
    for path, text in good.items():
        assert arrow_faults(Source(path, text)) + guest_faults(Source(path, text)) == []
