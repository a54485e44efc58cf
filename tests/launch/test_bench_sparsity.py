"""The benchmark of sparsity plans: equal compute, honest verdicts, and it runs."""

import json
from itertools import product

import pytest
from gossamer.launch.bench import sparsity_table
from gossamer.launch.bench.sparsity import bench_sparsity, noise, verdicts
from gossamer.launch.bench.sparsity_arms import QUESTIONS, QUICK, Sizes, arms, step_shares, steps_of
from gossamer.launch.bench.sparsity_products import time_changes, time_products
from gossamer.launch.bench.sparsity_train import config_of


@pytest.mark.parametrize("name", arms(QUICK))
def test_every_arm_gets_the_dense_arms_compute(name):
    sizes = Sizes()
    plan = arms(sizes)[name]
    steps = steps_of(plan, sizes)
    compute = steps if plan is None else sum(step_shares(plan, steps, sizes))
    assert compute == pytest.approx(sizes.dense_steps, rel=0.02)
    assert config_of(name, 2, sizes).phases[0].max_steps == steps


def test_what_is_under_no_mask_costs_what_it_does():
    """Of 64 wide, 2 layers, 2 of 8 experts: 4 attention matrices and 3 of an expert are masked;
    embedding, router and attention over 64 places are not."""
    masked = 2 * (64 * (64 + 32 + 32 + 64) + 2 * 3 * 64 * 64)
    rest = 512 * 64 + 2 * 8 * 64 + 2 * 2 * 64 * 64
    dense_step = 1.0 - 0.8 * masked / (masked + rest)
    assert steps_of(arms(Sizes())["static_uniform"], Sizes()) == round(100 / dense_step) == 191


def test_questions_are_about_arms():
    assert {name for _, *pair in QUESTIONS for name in pair} <= set(arms(QUICK))


def rows_of(**losses: tuple[float, ...]) -> list[dict]:
    return [
        {"arm": arm, "seed": seed, "loss": loss}
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]


@pytest.mark.parametrize(
    ("erk", "uniform", "verdict"),
    [
        ((1.0, 1.1, 1.2), (2.0, 2.1, 2.2), "yes"),
        ((2.0, 2.1, 2.2), (1.0, 1.1, 1.2), "no"),
        ((1.0, 1.1, 1.2), (1.1, 1.2, 1.3), "not above the noise"),  # all seeds, but .1 < .2
        ((1.0, 1.0, 9.0), (7.0, 7.0, 7.0), "not above the noise"),  # seeds differ
        ((1.0,), (9.0,), "not above the noise"),  # one seed says nothing
    ],
)
def test_a_verdict_needs_every_seed_and_more_than_the_noise(erk, uniform, verdict):
    (found,) = verdicts(rows_of(static_erk=erk, static_uniform=uniform))
    assert found["verdict"] == verdict


def test_noise_is_the_widest_range_of_an_arm():
    assert noise(rows_of(a=(1.0, 1.5), b=(3.0, 3.1))) == 0.5


def result(quick: bool = True) -> dict:
    rows = rows_of(static_erk=(1.0, 1.1), static_uniform=(2.0, 2.1))
    for row in rows:
        row |= {"steps": 30, "density": 0.2, "mean_density": 0.2, "flops_share": 0.4}
        row |= {"flip_rate": 0.001, "step_s": 0.01, "flops": 1.24e9}
    return {
        "command": "gossamer bench sparsity",
        "machine": "this",
        "load_average": 0.1,
        "sizes": {"seeds": [0, 1], "dense_steps": 6},
        "rows": rows,
        "noise": noise(rows),
        "verdicts": verdicts(rows),
        "products": time_products(quick),
        "changes": time_changes(quick),
        "messages": [
            {"plan": None, "density": 1.0, "rule": "diloco", "bytes": [2000, 3000]},
            {"plan": "rigl", "density": 0.1, "rule": "diloco", "bytes": [2500, 300]},
        ],
    }


def test_the_table_says_what_the_json_says(tmp_path):
    path = tmp_path / "sparsity.json"
    path.write_text(json.dumps(result()))
    text = sparsity_table.render_table(path)
    assert "| static_erk | 1.050 (0.100) | 1.2 | 30 | 40 % | 0.200, 0.200 | 0.00100 | 10 |" in text
    assert "| Is ERK better than uniform? | -1.000 | -1.000, -1.000 | 30, 30 | yes |" in text
    assert "| 0.02 |" in text and "| rigl |" in text
    assert "| none | 2.0, 3.0 |" in text and "| rigl, 10 % | 2.5, 0.3 |" in text
    path.write_text("{}")
    with pytest.raises(ValueError, match="does not hold rows of `gossamer bench sparsity`"):
        sparsity_table.render_table(path)


def test_a_file_of_other_measurements_is_not_overwritten(tmp_path):
    path = tmp_path / "sparsity.json"
    path.write_text('{"command": "gossamer bench sync"}')
    with pytest.raises(ValueError, match="holds other measurements; expected a new file"):
        bench_sparsity(path, quick=True)


@pytest.mark.slow
def test_the_quick_benchmark_runs_and_goes_on_where_it_was(tmp_path, capsys):
    path = tmp_path / "sparsity.json"
    bench_sparsity(path, quick=True)
    found = json.loads(path.read_text())
    assert {(row["arm"], row["seed"]) for row in found["rows"]} == {*product(arms(QUICK), [1])}
    assert {each["verdict"] for each in found["verdicts"]} == {"not above the noise"}
    (dense,) = (row["flops"] for row in found["rows"] if row["arm"] == "dense")
    for row in found["rows"]:  # what is pruned at large is not of all alike
        assert row["flops"] == pytest.approx(dense, rel=0.1), row["arm"]
    sent = {row["rule"]: row["bytes"] for row in found["messages"]}
    assert sent["sparseloco"][-1] < sent["diloco"][-1] / 10  # chosen among a tenth, no gradients
    dropped = found["rows"].pop()
    path.write_text(json.dumps(found))
    bench_sparsity(path, quick=True)
    again = json.loads(path.read_text())["rows"][-1]
    assert {k: again[k] for k in ("arm", "loss", "sad")} == {
        k: dropped[k] for k in ("arm", "loss", "sad")
    }
    assert "not above the noise" in capsys.readouterr().out
