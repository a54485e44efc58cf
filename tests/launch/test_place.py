"""`gossamer place`: from a trace to a placement, a table and pictures."""

import json
import sys
from pathlib import Path

import pytest
from gossamer.launch import place as place_module
from gossamer.launch.cli import main
from gossamer.parallel.placement.placement import load_placement
from gossamer.parallel.placement.solve import METHODS

sys.path.append(str(Path(__file__).parents[1] / "parallel"))
from placement_cases import random_trace  # noqa: E402


@pytest.fixture
def folder(tmp_path):
    """Experts 0 and 4, 1 and 5, ... go together, so contiguous is the worst there is."""
    trace = random_trace(3, 8, 2, layers=2, tokens=40)
    lines = []
    for step in (0, 1):
        for layer, expert_TK in enumerate(trace.expert_LTK):
            rows = [[int(e) % 4, int(e) % 4 + 4] for e in expert_TK[:, 0]]
            record = {"step": step, "layer": layer, "rank": 0, "num_tokens": 40, "topk": 2}
            lines.append(json.dumps(record | {"top_indices": rows}))
    (tmp_path / "router_trace_rank0.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_trace_becomes_a_placement_and_pictures(folder, capsys):
    out, html = folder / "p.json", folder / "p.html"
    words = ["place", str(folder), "--nodes", "2", "--gpus-per-node", "2", "--slack", "2"]
    words += ["--time-limit", "2", "--steps", "0:1", "--row-bytes", "64", "--dispatch", "summed"]
    assert main([*words, "--out", str(out), "--html", str(html)]) == 0
    printed = capsys.readouterr().out
    assert "2 layers, 8 experts, 2 nodes x 2 ranks; 40 tokens of 1 steps" in printed
    for word in ("busiest rank / mean", "within nodes, a step", "across nodes, a step", "gap"):
        assert word in printed
    placed = load_placement(out)
    assert placed.objective == "bytes, summed" and placed.layers == (0, 1)
    for rank_E in placed.rank_LE:  # who goes together lives on one node
        assert (rank_E[:4] // 2 == rank_E[4:] // 2).all()
    page = html.read_text()
    assert page.count("<section") == 3 and "plotly" in page
    assert "://" not in page.partition("<script>")[0]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--steps", "3:5"], "no token of the steps 3 to 4"),
        (["--steps", "3"], "--steps is 3; expected A:B"),
        (["--nodes", "3"], "8 experts do not divide among 6 ranks"),
        (["--experts", "4"], "line 1: token 0 goes to expert"),
    ],
)
def test_what_cannot_be_placed_is_refused_in_a_sentence(folder, capsys, words, reason):
    given = ["--nodes", "2", "--gpus-per-node", "2"]
    assert main(["place", str(folder), *given, *words]) == 1
    captured = capsys.readouterr()
    assert reason in captured.err and captured.err.count("\n") == 1 and captured.out == ""


def test_the_command_names_every_method():
    assert set(place_module.METHODS) == set(METHODS)
