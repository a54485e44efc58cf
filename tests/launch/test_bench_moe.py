"""`gossamer bench moe`: rows that can be worked out again, peers that are what they claim to be."""

from __future__ import annotations

import json
import math
import os
import random
from statistics import median

import pytest
import torch
import torch.distributed as dist
from gloo_world import run_world
from gossamer.launch.bench.moe import EXPERT_PARALLEL, LAYERS, LEVEL, finish, median_interval
from gossamer.launch.cli import main

PEERS = ("DeepSpeed AutoEP", "DeepSpeed MoE")
AT_ONE = ("transformers eager", "transformers grouped_mm")
KEYS = {
    *("experts", "top_k", "ep", "dtype", "hidden", "width", "tokens", "impl"),
    *("peak_bytes", "pairs_s", "tokens_per_s"),
}
OF_PEERS = {"ratio", "ratio_low", "ratio_high", "confidence"}


def test_quick_rows_follow_from_their_pairs_and_make_a_table(tmp_path, capsys):
    out, page = tmp_path / "out.json", tmp_path / "page.md"
    assert main(["bench", "moe", "--quick", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    rows = result["rows"]
    assert result["command"] == "gossamer bench moe --quick" and result["load_average"]
    expected = [
        (experts, ep, impl)
        for ep in EXPERT_PARALLEL
        for experts, _ in LAYERS
        for impl in ("gossamer", *(AT_ONE if ep == 1 else ()), *PEERS)
    ]
    assert [(row["experts"], row["ep"], row["impl"]) for row in rows] == expected
    for row in rows:
        tokens = row["tokens"] * row["ep"]
        matrices = 3 * row["experts"] // row["ep"] * row["hidden"] * row["width"]
        # weights, gradients and two moments, all float32, are there at once
        assert 4 * 4 * matrices < row["peak_bytes"] < 3 * 4 * 4 * matrices
        if row["impl"] == "gossamer":
            assert set(row) == KEYS
            same = [r for r in rows if (r["experts"], r["ep"]) == (row["experts"], row["ep"])]
            mine_s = [mine for peer in same for mine, _ in peer["pairs_s"]]
            assert row["tokens_per_s"] == pytest.approx(tokens / median(mine_s))
        else:
            assert set(row) == KEYS | OF_PEERS and len(row["pairs_s"]) >= 9
            theirs_s = [theirs for _, theirs in row["pairs_s"]]
            assert row["tokens_per_s"] == pytest.approx(tokens / median(theirs_s))
            ratios = sorted(theirs / mine for mine, theirs in row["pairs_s"])
            assert row["ratio"] == pytest.approx(median(ratios))
            assert (row["ratio_low"], row["ratio_high"]) == pytest.approx((ratios[1], ratios[7]))

    page.write_text("<!-- bench moe: begin -->\nold\n<!-- bench moe: end -->\n")
    assert main(["bench", "table", str(out), "--into", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("<!-- bench moe: begin -->\n`gossamer bench moe --quick` on ")
    assert text.count("\n| ") == len(rows) + 1 and "\nold\n" not in text
    level = sum(row.get("ratio", 0) >= LEVEL for row in rows)
    assert f"Of 18 rows ours is level or faster (median of ratios >= 0.97) in {level}," in text
    page.write_text("no marks")
    assert main(["bench", "table", str(out), "--into", str(page)]) == 1
    assert "no lines <!-- bench moe: begin -->" in capsys.readouterr().err
    out.write_text(json.dumps({**result, "rows": []}))
    assert main(["bench", "table", str(out)]) == 1
    assert "does not hold rows of `gossamer bench moe`" in capsys.readouterr().err


def test_the_interval_holds_the_median_as_often_as_it_says():
    assert median_interval(range(9)) == (4, 1, 7)
    drawn, hits = random.Random(1), 0
    for _ in range(2000):
        _, low, high = median_interval([drawn.expovariate(1) for _ in range(11)])
        hits += low <= math.log(2) <= high
    assert 0.95 <= hits / 2000 <= 1
    with pytest.raises(ValueError, match="5 values give no interval; expected at least 6"):
        median_interval(range(5))


def test_ratios_of_pairs_do_not_see_a_machine_that_slows_down():
    pairs_s = [(1.0 * slow, 1.1 * slow) for slow in (1, 1, 1, 5, 5, 5, 9, 9, 9)]
    layer = {"tokens": 10, "ep": 1}
    ours, peer = finish([{**layer, "pairs_s": []}, {**layer, "pairs_s": pairs_s}])
    assert peer["ratio"] == pytest.approx(1.1) and peer["ratio_high"] == pytest.approx(1.1)
    assert ours["tokens_per_s"] == pytest.approx(10 / 5)


def watched() -> dict:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from gossamer.launch.bench import moe_layers, moe_world

    moe_layers.join_deepspeed(1)
    shape = moe_layers.Shape(
        experts=4, top_k=2, ep=1, dtype="float32", hidden=16, width=8, tokens=32
    )
    mega = torch.zeros(1 << 20).numel() * 4

    def hungry(shape: moe_layers.Shape) -> moe_layers.Layer:
        torch.zeros(3 << 20)  # to build it, which does not count
        layer = moe_layers.ours(shape)
        plain = layer.module.forward
        layer.module.forward = lambda x: plain(x) + 0 * torch.zeros(1 << 20).sum()
        return layer

    def wrong(shape: moe_layers.Shape) -> moe_layers.Layer:
        layer = moe_layers.ours(shape)
        layer.module.experts.down_proj.data[1, 2, 3] += 1.0
        return layer

    peaks = [moe_world.peak_of(build, shape) for build in (moe_layers.ours, hungry)]
    layers = {moe_layers.OURS: moe_layers.ours(shape), "liar": wrong(shape)}
    try:
        moe_world._check_same(layers, shape)
        refused = "nothing"
    except RuntimeError as error:
        refused = str(error)
    assert dist.get_world_size() == 1
    return {"more": peaks[1] - peaks[0], "mega": mega, "refused": refused}


@pytest.mark.slow
def test_a_peer_that_computes_something_else_is_refused_and_every_tensor_counts():
    (found,) = run_world(watched, 1)
    assert found["refused"].startswith("liar is ") and "away from ours" in found["refused"]
    assert 0.9 * found["mega"] < found["more"] <= found["mega"] + 64
