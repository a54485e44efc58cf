import math

import pytest
from gossamer.trainer.import_path import check_module, resolve

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


def test_a_module_is_looked_for_but_not_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "noisy_rewards.py").write_text("raise SystemExit")
    check_module("noisy_rewards:mine", REGISTRY, "rl.reward")
    check_module("root", REGISTRY, "rl.reward")
    for name in ("quiet_rewards:mine", "quiet.rewards:mine"):
        with pytest.raises(ValueError, match=f"rl.reward is '{name}', but there is no module"):
            check_module(name, REGISTRY, "rl.reward")
