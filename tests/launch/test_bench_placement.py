"""`gossamer bench placement`: traces with a known structure, rows for every method, a table."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from gossamer.launch.bench import placement
from gossamer.launch.bench.placement import Case, measure
from gossamer.launch.bench.placement_table import BEGIN, END
from gossamer.launch.bench.routing import Made, make_trace
from gossamer.launch.cli import main
from gossamer.parallel.placement.problem import Topology, build_problem
from gossamer.parallel.placement.solve import METHODS
from gossamer.parallel.placement.trace import load_trace

KEYS = {
    *("trace", "layers", "experts", "ranks", "nodes", "method", "minimised", "moved"),
    *("drift_steps", "max_over_mean", "cross_node_bytes", "objective", "bound", "gap", "time_s"),
}
SMALL = Made(layers=2, experts=16, top_k=2, tokens=300, steps=4, topics=4, liking=4.0)
NODES = Topology(nodes=2, ranks_per_node=2)


def test_what_is_made_up_has_the_structure_it_says():
    topics = build_problem(make_trace(SMALL), NODES)
    none = build_problem(make_trace(replace(SMALL, liking=0.0)), NODES)
    for problem, at_least in ((topics, 3.0), (none, 0.0)):
        both_EE = problem.together_LEE[0]
        assert both_EE.max() / both_EE.mean() > at_least
    assert topics.together_LEE[0].std() > 2 * none.together_LEE[0].std()
    still = make_trace(replace(SMALL, drift=0.0, tokens=4000, skew=1.0, liking=0.0))
    moving = make_trace(replace(SMALL, drift=0.9, tokens=4000, skew=1.0, liking=0.0))
    changes = []
    for trace in (still, moving):
        first, last = (trace.between(s, s + 1).expert_LTK[0].ravel() for s in (0, 3))
        changes.append(np.abs(np.bincount(first, None, 16) - np.bincount(last, None, 16)).sum())
    assert changes[1] > 3 * changes[0]


def test_rows_of_every_method_make_a_table(tmp_path, monkeypatch, capsys):
    case = Case(
        name="made",
        trace=make_trace(SMALL),
        topology=NODES,
        window=2,
        minimised=(("balance", "two_level"), ("bytes", "summed"), ("bytes", "resident")),
        time_limit_s=0.8,
        slack=0.3,
    )
    # what a first search compiles, or loads, is none of its limit
    measure(replace(case, methods=("local",), time_limit_s=60.0))
    monkeypatch.setattr(placement, "_cases", lambda folder, quick: [case])
    out = tmp_path / "out.json"
    assert main(["bench", "placement", "--quick", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    assert result["command"] == "gossamer bench placement --quick" and result["machine"]
    rows = result["rows"]
    assert all(set(row) == KEYS for row in rows)
    for name in ("balance", "bytes, summed", "bytes, resident"):
        own = [row for row in rows if row["minimised"] == name and row["method"] in METHODS]
        assert {(row["method"], row["drift_steps"]) for row in own} >= {("auto", 0), ("auto", 2)}
        values = {row["method"]: row["objective"] for row in own if row["drift_steps"] == 0}
        assert values["auto"] <= (1.0 if name == "balance" else 0.9) * values["eplb"]
    solved = [row for row in rows if row["bound"] is not None]
    assert all(row["bound"] <= row["objective"] and row["time_s"] > 0 for row in solved)

    page = tmp_path / "page.md"
    page.write_text(f"{BEGIN}\nold\n{END}\n")
    capsys.readouterr()
    assert main(["bench", "table", str(out), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.count("**Minimised: ") == 3 and "\nold\n" not in text
    named = [line.split("|")[2] for line in text.splitlines() if line.startswith("| made: 2 x 16")]
    assert sum(len(names.split(",")) for names in named) == len(METHODS) * 3
    out.write_text(json.dumps(result | {"rows": [{}]}))
    assert main(["bench", "table", str(out)]) == 1
    assert "does not hold rows of `gossamer bench placement`" in capsys.readouterr().err


def test_a_method_that_cannot_take_a_case_is_left_out(capsys, monkeypatch):
    monkeypatch.setattr("gossamer.parallel.placement.solve.ILP_COLUMNS", 10)
    case = Case(name="made", trace=make_trace(SMALL), topology=NODES, window=4, methods=("ilp",))
    rows = measure(case)
    assert {row["method"] for row in rows} == {"eplb+1"} and set(rows[0]) == KEYS
    assert "columns are more than 10; use local or auto" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_of_ours_is_recorded(tmp_path):
    words = [sys.executable, "-m", "gossamer.launch.bench.routing", "tiny_qwen3_moe"]
    subprocess.run([*words, str(tmp_path / "trace"), "2"], check=True)
    trace = load_trace(tmp_path / "trace")
    assert trace.steps == [0, 1] and trace.layers == (0, 1, 2) and trace.num_experts == 16
