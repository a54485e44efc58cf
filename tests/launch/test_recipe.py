"""Recipes: what is read, what is overridden, and what is refused in one sentence."""

import math
from dataclasses import replace

import pytest
from gossamer.launch.config import ClusterConfig, RolloutConfig, RunConfig
from gossamer.launch.recipe import SHIPPED, RecipeError, dump_config, load_recipe

RECIPE = """
name: small
train:
  seed: 3
  model:
    hf: {model_type: qwen3_moe, num_experts: 6, hidden_size: 32}
  data: {task_share: 0, corpus_path: here}
  optim: {max_norm: 2}
  phases:
    - {name: a, kind: next_token, max_steps: 7, lr: 1.0e-3}
    - {name: b, kind: next_token, max_steps: 9, lr: 2.0e-3}
"""


@pytest.fixture
def recipe(tmp_path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return str(path)


def refused(recipe: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe, list(overrides))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_what_is_written_is_read_and_the_rest_has_defaults(recipe):
    config = load_recipe(recipe, [])
    assert (config.name, config.train.seed, config.rollout.engines) == ("small", 3, 2)
    assert [(phase.name, phase.max_steps) for phase in config.train.phases] == [("a", 7), ("b", 9)]
    assert config.train.model.hf == {
        "model_type": "qwen3_moe",
        "num_experts": 6,
        "hidden_size": 32,
    }
    assert config.train.optim.max_norm == 2.0 and type(config.train.optim.max_norm) is float
    assert not config.has_rollouts


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("train.seed=12", lambda c: c.train.seed == 12),
        ("train.phases.0.max_steps=3", lambda c: [p.max_steps for p in c.train.phases] == [3, 9]),
        ("train.phases.1.lr=1", lambda c: [p.lr for p in c.train.phases] == [1e-3, 1.0]),
        ("train.phases.1.lr=2.5e-4", lambda c: c.train.phases[1].lr == 2.5e-4),
        ("train.data.corpus_path=null", lambda c: c.train.data.corpus_path is None),
        ("train.data.corpus_path=x=y z", lambda c: c.train.data.corpus_path == "x=y z"),
        ("train.model.hf.head_dim=8", lambda c: c.train.model.hf.get("head_dim") == 8),
        ("rollout.engines=5", lambda c: c.rollout.engines == 5),
        ("train.data.answer_only=true", lambda c: c.train.data.answer_only is True),
        ("name=${train.phases.0.name}-2", lambda c: c.name == "a-2"),
    ],
)
def test_overrides(recipe, override, read):
    assert read(load_recipe(recipe, [override]))
    assert not read(load_recipe(recipe, []))


def test_an_override_reads_numbers_as_a_file_does(recipe):
    assert math.isclose(load_recipe(recipe, ["train.phases.0.lr=3e-4"]).train.phases[0].lr, 3e-4)


def test_later_overrides_win(recipe):
    assert load_recipe(recipe, ["train.seed=4", "train.seed=5"]).train.seed == 5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.sed=4", ["unknown key train.sed", "did you mean seed?"]),
        ("trian.seed=4", ["unknown key trian", "did you mean train?"]),
        ("train.phases.0.max_step=4", ["train.phases[0].max_step", "did you mean max_steps?"]),
        ("train.optim.zzz=4", ["train.optim.zzz", "expected one of", "beta1"]),
        ("train.seed=four", ["train.seed is 'four'", "expected int"]),
        ("train.seed=4.0", ["train.seed is 4.0", "expected int"]),
        ("train.seed=true", ["train.seed is True", "expected int"]),
        ("train.optim.max_norm=false", ["train.optim.max_norm is False", "expected float"]),
        ("train.data.answer_only=1", ["train.data.answer_only is 1", "expected bool"]),
        ("train.data.corpus_path=5", ["train.data.corpus_path is 5", "expected str"]),
        ("train.phases=5", ["train.phases is 5", "expected a list"]),
        ("train.phases.0=5", ["train.phases[0] is 5", "expected keys and values"]),
        ("train.optim=5", ["train.optim is 5", "expected keys and values"]),
        ("train.model.hf=5", ["train.model.hf is 5", "expected keys and values"]),
        ("train.seed=", ["train.seed is None", "expected int"]),
        ("train.seed=-1", ["seed is -1", "expected 0 or more"]),
        ("train.phases.1.lr=0", ["phases[b].lr is 0", "expected a positive number"]),
        ("train.phases.1.lr=.nan", ["phases[b].lr is nan", "expected a positive number"]),
        ("train.phases.2.lr=1", ["train.phases[2]", "out of range"]),
        ("train.phases.x.lr=1", ["'x'", "not an int"]),
        ("train.seed=${nope}", ["'nope' not found", "train.seed"]),
        ("train.seed=[1", ["flow sequence"]),
        ("train.seed", ["override 'train.seed'", "expected KEY=VALUE"]),
        ("train.parallel.expert=4", ["parallel.expert=4 does not divide", "6"]),
        ("train.parallel.zero_stage=3", ["parallel.zero_stage=3 is refused"]),
        ("rollout.prompt_retries=-1", ["rollout.prompt_retries is -1", "expected 0 or more"]),
        ("rollout.on_new_version=stop", ["rollout.on_new_version is stop", "keep"]),
        ("rollout.max_waiting_samples=0", ["rollout.max_waiting_samples is 0", "1 or more"]),
        ("train.metrics.changes_every_steps=-1", ["metrics.changes_every_steps is -1"]),
        ("name=a/b", ["name is 'a/b'", "expected letters"]),
        ("name=..", ["name is '..'"]),
    ],
)
def test_a_bad_override_is_refused_by_key_and_file(recipe, override, words):
    message = refused(recipe, override)
    assert all(word in message for word in words), message
    assert recipe in message or "=" not in override


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["name is missing"]),
        ("name: x", ["train is missing", "no default"]),
        (RECIPE.replace("max_steps: 7, ", ""), ["train.phases[0].max_steps is missing"]),
        (RECIPE.replace("seed: 3", "seed: ???"), ["seed"]),
        ("- a\n- b", ["the recipe is ['a', 'b']", "expected keys and values"]),
        ("name: [", ["small.yaml"]),
        ("name: \x00", ["small.yaml"]),
        ("5", ["small.yaml"]),
    ],
)
def test_a_bad_file_is_refused_by_name(recipe, tmp_path, content, words):
    (tmp_path / "small.yaml").write_text(content)
    message = refused(recipe)
    assert all(word in message for word in [*words, "small.yaml"]), message


def test_a_file_that_is_not_there_is_refused_with_the_shipped_ones(tmp_path):
    message = refused(str(tmp_path / "none.yaml"))
    assert "none.yaml is not a file" in message and "demo" in message
    assert "is not a file" in refused(str(tmp_path))


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_right_by_name_and_by_path(path):
    config = load_recipe(path.stem, [])
    assert config == load_recipe(str(path), [])
    assert config.train.phases


def test_there_are_shipped_recipes_with_and_without_rollouts():
    kinds = {load_recipe(path.stem, []).has_rollouts for path in SHIPPED.glob("*.yaml")}
    assert kinds == {True, False}


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_what_is_dumped_loads_as_the_same_config(tmp_path, name):
    config = load_recipe(name, ["train.seed=77", "train.phases.0.lr=1.0e-05"])
    config = replace(
        config,
        rollout=RolloutConfig(engines=3, num_cpus=0.25),
        cluster=ClusterConfig(address="ray://host:10001"),
    )
    dump_config(config, tmp_path / "config.json")
    again = load_recipe(str(tmp_path / "config.json"), [])
    assert again == config and type(again) is RunConfig
    assert again.train.seed == 77 and again.train.phases[0].lr == 1e-5


@pytest.mark.parametrize(
    "url",
    [
        "https://me:hunter2@host/x",
        *("az://c/x?sig=hunter2", "https://h/x?a=1&Token=hunter2", "https://h/x?sig2=hunter2"),
        *("https://h/x?code=hunter2", "https://h/x?subscription-key=hunter2", "x?key=hunter2"),
    ],
)
def test_a_url_with_a_secret_is_refused_and_not_repeated(url):
    with pytest.raises(RecipeError, match=r"train\.checkpoint\.url holds a secret") as refused:
        load_recipe("demo", [f"train.checkpoint.url={url}"])
    assert "hunter2" not in str(refused.value)


def test_what_crosses_sites_is_signed(monkeypatch):
    monkeypatch.delenv("GOSSAMER_SIGNING_KEY", raising=False)
    assert load_recipe("rl_two_sites", []).train.log.signing_key_path == "signing.key"
    monkeypatch.setenv("GOSSAMER_SIGNING_KEY", "/keys/trainer")
    config = load_recipe("rl_two_sites", [])
    assert config.train.log.signing_key_path == "/keys/trainer"
    assert config.rollout.public_key_path == "/keys/trainer.pub"
