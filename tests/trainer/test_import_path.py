import math

import pytest
from gossamer.trainer.import_path import resolve

REGISTRY = {"root": "math:sqrt", "broken": "math:no_such"}


def test_short_name_and_import_path():
    assert resolve("root", REGISTRY, "a.b") is math.sqrt
    assert resolve("math:cos", REGISTRY, "a.b") is math.cos


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("rooot", r"a.b is 'rooot'; expected one of \['broken', 'root'\]"),
        (":sqrt", "expected one of"),
        ("math:", "expected one of"),
        ("no_such_module:x", "cannot be imported: No module named"),
        ("math:no_such", "cannot be imported"),
        ("broken", "cannot be imported"),
    ],
)
def test_unknown_name_is_refused(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        resolve(name, REGISTRY, "a.b")
