"""Nothing from a store or a socket is unpickled; nothing committed names a machine or registry."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from source_tree import ROOMS, ROOT, Source, imports, name_of, sources, tracked_files

PICKLERS = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
OBJECT_COLLECTIVES = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "scatter_object_list",
    "send_object_list",
}
"""torch.distributed calls that pickle; JSON in a uint8 tensor says the same."""

PLACES = re.compile(r"(?<![\w.~-])/(work|root)\b")
HOSTS = re.compile(
    r"pypi\.org|pythonhosted\.org|registry\.npmjs|download\.pytorch\.org|conda\.anaconda\.org"
    r"|proxy\.golang|index-url"
)


def pickle_faults(source: Source) -> list[str]:
    faults = [
        f"{source.path}:{line}: {name}"
        for line, name in imports(source)
        if name.partition(".")[0] in PICKLERS
    ]
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.Call):
            continue
        where, called = f"{source.path}:{node.lineno}", ast.unparse(node.func)
        given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
        if called == "torch.load" and given.get("weights_only") is not True:
            faults.append(f"{where}: torch.load without weights_only=True")
        if given.get("allow_pickle"):
            faults.append(f"{where}: allow_pickle")
        if name_of(node.func) in OBJECT_COLLECTIVES:
            faults.append(f"{where}: {name_of(node.func)} pickles")
    return faults


def place_faults(path: str, text: str) -> list[str]:
    """Folders of one machine and hosts of package registries."""
    return [
        f"{path}:{number}: {found.group()}"
        for number, line in enumerate(text.splitlines(), 1)
        for pattern in (PLACES, HOSTS)
        if (found := pattern.search(line))
    ]


def test_nothing_is_unpickled():
    assert [fault for source in sources(*ROOMS) for fault in pickle_faults(source)] == []


def test_tracked_files_name_no_machine_and_no_registry():
    paths = tracked_files()
    if paths is None:
        pytest.skip("not a git checkout: nothing says which files are tracked")
    own = Path(__file__).relative_to(ROOT).as_posix()
    others = [path for path in paths if path != own]
    texts = {path: (ROOT / path).read_bytes().decode(errors="replace") for path in others}
    assert [fault for path, text in texts.items() for fault in place_faults(path, text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "def f():\n    from cloudpickle import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "dist.all_gather_object(out, value)",
    ],
)
def test_a_pickle_is_found(text):
    assert len(pickle_faults(Source("comm/a.py", text))) == 1


def test_safe_loading_passes():
    text = "torch.load(path, weights_only=True)\njson.load(file)\nnp.load(path)"
    assert pickle_faults(Source("comm/a.py", text)) == []


@pytest.mark.parametrize(
    "line",
    ["see /work/main", '"/root/.cache"', "https://pypi.org/simple", "--index-url x"],
)
def test_a_place_is_found(line):
    assert len(place_faults("a.md", f"first\n{line}\n")) == 1


def test_innocent_paths_pass():
    assert place_faults("a.md", "run_dir/work/x, ../root/y, a/work, homework/, $ROOT/root/") == []
