"""`gossamer sparsity plan` tells what the run does; `methods` writes recipes that can be run."""

import json

import pytest
import yaml
from gossamer.launch.cli import main
from gossamer.launch.recipe import build_config
from gossamer.trainer.sparsity.config import SparsityConfig
from gossamer.trainer.sparsity.recipes import RECIPES

STEPS = "train.phases.0.max_steps=1000"


@pytest.mark.parametrize("name", RECIPES)
def test_a_method_as_yaml_is_the_method(name, capsys):
    assert main(["sparsity", "methods", name]) == 0
    written = yaml.safe_load(capsys.readouterr().out)["train"]["sparsity"]
    assert build_config(SparsityConfig, written, "") == RECIPES[name]


def test_the_list_of_methods(capsys):
    assert main(["sparsity", "methods"]) == 0
    assert capsys.readouterr().out.split() == list(RECIPES)


def test_journey_is_drawn_with_its_closed_form(tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = ["sparsity", "plan", "tiny_qwen3_moe", "--method", "journey", STEPS]
    assert main([*command, "train.sparsity=null", "--json", str(out)]) == 0
    drawn, course = capsys.readouterr().out, json.loads(out.read_text())
    # s=.8: mean density .399, from .100 T to .501 T (Jin et al., 2025)
    assert course["mean_density"] == pytest.approx(0.399, abs=0.01)
    assert course["updates"] == [0, 100, 200, 300, 400, 500]
    assert "0.200 at the end" in drawn and "█" in drawn


def test_gradients_and_warm_up_are_counted(tmp_path, capsys):
    counts = {}
    for name in ("rigl", "spdf"):
        out = tmp_path / f"{name}.json"
        command = ["sparsity", "plan", "tiny_qwen3_moe", "--method", name, STEPS]
        assert main([*command, "--json", str(out)]) == 0
        counts[name] = json.loads(out.read_text())
    assert counts["rigl"]["scored"] == 7  # a step before each change up to 75 %
    assert counts["rigl"]["updates"] == list(range(0, 800, 100))
    assert counts["spdf"]["updates"] == [0, 800]
    assert counts["spdf"]["rewarm"] == list(range(801, 820))
    assert set(counts["spdf"]["final"].values()) == {1.0}
    assert "rises again over 19 steps" in capsys.readouterr().out


def test_a_recipe_without_a_plan_and_a_method_that_is_none(capsys):
    assert main(["sparsity", "plan", "demo"]) == 1
    assert "no train.sparsity" in capsys.readouterr().err
    assert main(["sparsity", "plan", "demo", "--method", "magic"]) == 1
    assert "magic is no method" in capsys.readouterr().err
