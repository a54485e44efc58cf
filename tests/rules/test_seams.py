"""A seam is a Protocol of at most five methods beside a literal dict, with a contract test.

A registry is a module-level dict literal, NAMED_LIKE_THIS, whose values all name an implementation:
"package.module:Name", or a class or function by name. A contract test is a file
tests/contracts/test_*.py whose code (not its comments) uses the registry's name; running over the
registry, it meets every name in it.
"""

from __future__ import annotations

import ast

import pytest
from source_tree import IMPORT_PATH, ROOMS, Source, sources

SEAM_METHODS = 5
PROTOCOL = ("Protocol", "typing.Protocol")


def protocols(source: Source) -> list[ast.ClassDef]:
    classes = [node for node in ast.walk(source.tree) if isinstance(node, ast.ClassDef)]
    return [c for c in classes if any(ast.unparse(b).startswith(PROTOCOL) for b in c.bases)]


def protocol_faults(source: Source) -> list[str]:
    faults = []
    for seam in protocols(source):
        methods = [n for n in seam.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        where = f"{source.path}:{seam.lineno}: {seam.name}"
        if len(methods) > SEAM_METHODS:
            faults.append(f"{where} has {len(methods)} methods")
        faults += [f"{where}.{m.name} takes **{m.args.kwarg.arg}" for m in methods if m.args.kwarg]
    return faults


def registries(source: Source) -> dict[str, list[str]]:
    """Names of the registries in a file, and the names that each registers."""
    found = {}
    for node in source.tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        name, value = getattr(target, "id", ""), getattr(node, "value", None)
        if name.isupper() and name[0] != "_" and isinstance(value, ast.Dict) and value.keys:
            if all(is_implementation(v) for v in value.values):
                found[name] = [ast.unparse(key) for key in value.keys if key]
    return found


def is_implementation(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str) and bool(IMPORT_PATH.fullmatch(node.value))
    return isinstance(node, ast.Name)


def names_used(source: Source) -> set[str]:
    nodes = list(ast.walk(source.tree))
    loaded = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    return loaded | {n.attr for n in nodes if isinstance(n, ast.Attribute)}


def contract_faults(house: list[Source], contracts: list[Source]) -> list[str]:
    tested = set().union(*(names_used(c) for c in contracts if "/test_" in c.path))
    return [
        f"{source.path}: no test in tests/contracts runs over {registry} ({', '.join(names)})"
        for source in house
        for registry, names in registries(source).items()
        if registry not in tested
    ]


def test_protocols_are_narrow():
    assert [fault for source in sources(*ROOMS) for fault in protocol_faults(source)] == []


def test_every_registry_has_a_contract_test():
    house = sources(*ROOMS)
    assert any(registries(source) for source in house)
    assert contract_faults(house, sources("tests/contracts")) == []


METHOD = "    def {}(self{}) -> None: ...\n"


@pytest.mark.parametrize(
    "text",
    [
        "class Codec(Protocol):\n" + METHOD.format("encode", ", **options: int"),
        "class Codec(typing.Protocol):\n" + "".join(METHOD.format(f"m{i}", "") for i in range(6)),
    ],
)
def test_a_wide_protocol_is_found(text):
    assert len(protocol_faults(Source("comm/a.py", text))) == 1


def test_a_narrow_protocol_and_a_plain_class_pass():
    narrow = "class Codec(Protocol):\n" + "".join(METHOD.format(f"m{i}", "") for i in range(5))
    plain = "class Run:\n" + METHOD.format("add", ", **fields: int")
    assert protocol_faults(Source("comm/a.py", narrow + plain)) == []


@pytest.mark.parametrize(
    "contract",
    ["", "# CODECS\n", '"""CODECS"""\n', "from gossamer.comm.codec import CODECS\n"],
)
def test_a_registry_without_a_contract_is_found(contract):
    house = Source("comm/a.py", 'CODECS = {"step": "gossamer.comm.codec.step:StepCodec"}')
    contracts = [Source("tests/contracts/test_codec_contract.py", contract)]
    assert len(contract_faults([house], contracts)) == 1
    contracts.append(Source("tests/contracts/test_b.py", "for name in CODECS: run(name)"))
    assert contract_faults([house], contracts) == []


def test_what_is_a_registry():
    text = 'A = {"x": B}\nC: dict[str, str] = {"x": "p.m:f"}\nD = {"x": 1}\n_E = {"x": B}\nF = {}\n'
    assert registries(Source("comm/a.py", text)) == {"A": ["'x'"], "C": ["'x'"]}
