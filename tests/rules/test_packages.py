"""The package list of pyproject.toml is the folders': a forgotten one is missing from the wheel
while an editable install hides it. And the four rooms are no packages of their own."""

from __future__ import annotations

import tomllib
from pathlib import Path

from source_tree import ROOMS, ROOT, sources


def folders() -> list[str]:
    """Every folder of a room that holds Python files, at whatever depth."""
    above = [parent for source in sources(*ROOMS) for parent in Path(source.path).parents]
    return sorted({folder.as_posix() for folder in above} - {"."})


def package_faults(listed: list[str], found: list[str]) -> list[str]:
    packages = {"gossamer." + folder.replace("/", ".") for folder in found}
    return [
        *(f"pyproject.toml does not list {name}" for name in sorted(packages - set(listed))),
        *(f"pyproject.toml lists {name}: no such folder" for name in set(listed) - packages),
        *(f"pyproject.toml lists {name} twice" for name in set(listed) if listed.count(name) > 1),
    ]


def init_faults(found: list[str], has_init: set[str]) -> list[str]:
    """A room with an __init__.py would hide PyPI's comm or trainer from whoever stands at the root;
    a subfolder without one would be left out of type checks."""
    return [
        *(f"{f}/__init__.py must not exist" for f in found if "/" not in f and f in has_init),
        *(f"{f}/__init__.py is missing" for f in found if "/" in f and f not in has_init),
    ]


def test_every_folder_is_a_listed_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    setuptools = project["tool"]["setuptools"]
    assert package_faults(setuptools["packages"], folders()) == []
    assert setuptools["package-dir"] == {f"gossamer.{room}": room for room in ROOMS}


def test_rooms_have_no_init_and_subfolders_have_one():
    has_init = {folder for folder in folders() if (ROOT / folder / "__init__.py").exists()}
    assert init_faults(folders(), has_init) == []


def test_test_folders_have_no_init_and_unique_names():
    paths = [source.path for source in sources("tests")]
    names = [path.rpartition("/")[2] for path in paths]
    assert "__init__.py" not in names
    assert sorted({name for name in names if names.count(name) > 1}) == []


def test_a_wrong_list_is_found():
    assert package_faults(["gossamer.comm"], ["comm", "comm/codec"]) != []
    assert package_faults(["gossamer.comm", "gossamer.old"], ["comm"]) != []
    assert package_faults(["gossamer.comm", "gossamer.comm"], ["comm"]) != []
    assert package_faults(["gossamer.comm", "gossamer.comm.codec"], ["comm", "comm/codec"]) == []


def test_a_wrong_init_is_found():
    assert init_faults(["comm"], {"comm"}) == ["comm/__init__.py must not exist"]
    assert init_faults(["comm", "comm/codec"], set()) == ["comm/codec/__init__.py is missing"]
