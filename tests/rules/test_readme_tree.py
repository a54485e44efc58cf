"""README's annotated tree is the real tree.

The tree is the first fenced block after a heading that contains the word "house": one entry a
line, folders with a slash at the end, depth by indentation (box-drawing characters count as
blanks), and after the name whatever is to be said about it. Every top-level folder and every
Python file of the four rooms is named (but __init__.py), and what is named exists.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from source_tree import ROOMS, ROOT, sources, tracked_files


def tree_block(readme: str) -> str | None:
    """The fenced block of the house, None when no heading speaks of it."""
    heading = re.search(r"^#+ .*\bhouse\b.*$", readme, re.MULTILINE | re.IGNORECASE)
    block = heading and re.search(r"^```\w*\n(.*?)^```", readme[heading.end() :], re.M | re.S)
    return block.group(1) if block else None


def named_paths(block: str) -> list[str]:
    """Paths named by the tree, folders with a slash at the end."""
    paths: list[str] = []
    above: list[tuple[int, str]] = []
    for line in block.splitlines():
        line = re.sub(r"[│├└─]", " ", line.replace("\u00a0", " "))
        if not line.strip():
            continue
        depth, name = len(line) - len(line.lstrip()), line.split()[0]
        above = [entry for entry in above if entry[0] < depth]
        path = (above[-1][1] if above else "") + name
        if name.endswith("/"):
            above.append((depth, path))
        paths.append(path)
    return paths


def tree_faults(named: list[str], real: list[str], required: list[str]) -> list[str]:
    """`real` and `required` hold files and folders in the same spelling as `named`."""
    return [
        *(f"README names {path}: no such thing" for path in named if path not in real),
        *(f"README names {path} twice" for path in sorted(set(named)) if named.count(path) > 1),
        *(f"README does not name {path}" for path in required if path not in named),
    ]


def with_folders(files: list[str]) -> list[str]:
    """The files and every folder above them."""
    folders = {f"{parent.as_posix()}/" for file in files for parent in Path(file).parents}
    return sorted({*files, *folders} - {"./"})


def test_the_tree_of_the_readme_is_the_real_one():
    block = tree_block((ROOT / "README.md").read_text())
    if block is None:
        pytest.skip("README.md has no heading with the word house and a fenced tree after it yet")
    modules = [s.path for s in sources(*ROOMS) if not s.path.endswith("__init__.py")]
    real = with_folders([*(tracked_files() or []), *(s.path for s in sources(*ROOMS, "tests"))])
    top = [path for path in real if re.fullmatch(r"[^./][^/]*/", path)]
    assert tree_faults(named_paths(block), real, [*top, *modules]) == []


README = """# X
## The house
Words.
```text
comm/             what crosses a thin wire
├── wire.py       the format
└── codec/        many
    └── step.py
tests/
```
"""
FILES = ["comm/wire.py", "comm/codec/step.py", "tests/test_a.py"]


def test_the_tree_is_read():
    named = named_paths(tree_block(README))
    assert named == ["comm/", "comm/wire.py", "comm/codec/", "comm/codec/step.py", "tests/"]
    assert tree_faults(named, with_folders(FILES), ["comm/", "tests/", "comm/wire.py"]) == []
    assert tree_block("# X\n```\na/\n```\n") is None


@pytest.mark.parametrize(
    ("old", "new"),
    [("wire.py ", "wires.py"), ("    └── step.py\n", ""), ("tests/", "comm/")],
)
def test_a_wrong_tree_is_found(old, new):
    named = named_paths(tree_block(README.replace(old, new)))
    assert tree_faults(named, with_folders(FILES), ["comm/wire.py", "comm/codec/step.py"]) != []
