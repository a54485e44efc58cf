"""Traces in: ours, Megatron's and FLAME-MoE's; holes and experts out of range refused by line."""

import json

import numpy as np
import pytest
import torch
from gossamer.parallel.placement.trace import load_trace
from gossamer.trainer.moe.block import MoEBlock
from gossamer.trainer.moe.trace import RoutingTrace
from torch import nn

EXPERT_LTK = np.array([[[0, 1], [2, 3], [1, 0]], [[3, 2], [0, 1], [2, 3]]])


def line(step=0, layer=0, rank=0, rows=((0, 1), (2, 3)), **changed) -> str:
    record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer}
    record |= {"rank": rank, "num_tokens": len(rows), "topk": 2, "top_indices": rows}
    return json.dumps(record | changed)


def whole(ranks=2, steps=2, layers=(1, 3)) -> dict[int, list[str]]:
    return {r: [line(s, n, r) for s in range(steps) for n in layers] for r in range(ranks)}


def write(folder, files: dict[int, list[str]]):
    for rank, lines in files.items():
        (folder / f"router_trace_rank{rank}.jsonl").write_text("".join(f"{x}\n" for x in lines))
    return folder


def test_what_the_trainer_writes_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(MoEBlock, "__init__", lambda self: nn.Module.__init__(self))
    model = nn.Module()
    model.layers = nn.ModuleList([MoEBlock(), MoEBlock()])
    for block, expert_TK in zip(model.layers, EXPERT_LTK, strict=True):
        block.statistics = type("Statistics", (), {"expert_TK": torch.from_numpy(expert_TK)})()
    writer = RoutingTrace(tmp_path, 0, 3)
    for step in (0, 1, 1, 5):
        writer.write(step, model)
    trace = load_trace(tmp_path, 4)
    assert (trace.expert_LTK == np.concatenate([EXPERT_LTK] * 3, axis=1)).all()
    assert trace.step_T.tolist() == [0] * 3 + [1] * 6 and trace.layers == (0, 1)
    assert load_trace(tmp_path / "router_trace_rank0.jsonl").num_experts == 4
    assert trace.between(1, 2).expert_LTK.shape == (2, 6, 2)
    with pytest.raises(ValueError, match="no token of the steps 7 to 8"):
        trace.between(7, 9)


def test_ranks_lie_in_order_and_a_resumed_run_counts_once(tmp_path):
    files = whole()
    files[0] += [line(1, 1, 0, [[3, 2]]), line(1, 3, 0, [[3, 2]])]  # a micro-batch more ...
    trace = load_trace(write(tmp_path, files))
    assert trace.rank_T.tolist() == [0, 0, 1, 1] + [0, 0, 0, 1, 1]
    assert trace.expert_LTK[0, 6].tolist() == [3, 2]
    files[0] += [line(0, 1, 0), line(0, 3, 0), line(1, 1, 0), line(1, 3, 0)]  # ... then killed
    assert load_trace(write(tmp_path, files)).rank_T.tolist() == [0, 0, 1, 1] * 2


def test_other_stages_and_blocks_are_passed_over(tmp_path):
    lines = [line(), line(layer=7, block="mtp"), line(layer=8, stage="post_dispatch")]
    assert load_trace(write(tmp_path, {0: lines})).layers == (0,)


def test_a_spare_slot_is_kept(tmp_path):
    trace = load_trace(write(tmp_path, {0: [line(rows=((0, -1), (-1, -1)))]}), 2)
    assert trace.expert_LTK.tolist() == [[[0, -1], [-1, -1]]]


@pytest.mark.parametrize(
    ("at", "text", "reason"),
    [
        (2, None, "rank0.jsonl line 3: step 1 of rank 0 has no layer 1"),
        (3, None, "rank0.jsonl line 3: step 1 of rank 0 has no layer 3"),
        (1, line(0, 3, 0, [[0, 1]]), "different numbers of tokens: {1: 2, 3: 1}"),
        (1, line(0, 3, 0, [[0, 4], [1, 2]]), "line 2: token 0 goes to expert 4, there are 4"),
        (1, line(0, 3, 0, [[0, 1], [-2, 1]]), "line 2: token 1 goes to expert -2, there are 4"),
        (1, line(0, 3, 0, [[0, 1], [1, 1]]), "line 2: token 1 goes to one expert twice"),
        (1, line(0, 3, 0, topk=3), "line 2: top_indices is not 2 tokens of 3 whole numbers"),
        (1, line(0, 3, 0, [["a", 1]]), "line 2: top_indices is not 1 tokens of 2 whole numbers"),
        (1, line(0, 3, 0)[:40], "line 2 is not JSON"),
        (1, "[]", "line 2 is no line of a router trace"),
        (1, line("0", 3, 0), "line 2: step is '0'"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path, at, text, reason):
    files = whole()
    files[0][at : at + 1] = [text] if text else []
    with pytest.raises(ValueError) as error:
        load_trace(write(tmp_path, files), 4)
    assert reason in str(error.value) and str(tmp_path) in str(error.value)


def test_missing_ranks_and_steps_are_refused(tmp_path):
    files = whole(3)
    del files[1]
    with pytest.raises(ValueError, match="no line for step 0 of rank 1"):
        load_trace(write(tmp_path, files))
    files[1] = whole(3, 1)[1]
    with pytest.raises(ValueError, match="no line for step 1 of rank 1"):
        load_trace(write(tmp_path, files))
    with pytest.raises(ValueError, match="holds no routing trace"):
        load_trace(tmp_path / "nothing")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="empty.jsonl: the trace has no token"):
        load_trace(tmp_path / "empty.jsonl")


def flame(folder, tables: dict[str, object]):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    for name, rows in tables.items():
        path = folder / f"{name}.parquet"
        path.parent.mkdir(exist_ok=True)
        table = {"indices": pa.array(rows, pa.list_(pa.int16()))}
        pq.write_table(pa.table(table | {"scores": [[0.5, 0.25]] * len(rows)}), path)
    return folder


def test_flame_moe_is_read(tmp_path):
    rows = EXPERT_LTK.tolist()
    tables = {f"iter_{n}/layer_{i + 2:02d}": rows[i] for n in (540, 1080) for i in range(2)}
    trace = load_trace(flame(tmp_path, tables), 4)
    assert trace.layers == (2, 3) and trace.steps == [540, 1080]
    assert (trace.expert_LTK == np.concatenate([EXPERT_LTK] * 2, axis=1)).all()
    assert load_trace(tmp_path, max_tokens=2).expert_LTK.shape == (2, 4, 2)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([[0, 1], [2, 3]], "different numbers of tokens"),
        ([[0, 1], None, [2, 3]], "missing or of different lengths"),
        ([[0, 1], [2], [2, 3]], "missing or of different lengths"),
        ([[0, 1], [2, 9], [2, 3]], "layer_03.parquet: token 1 goes to expert 9"),
        ([], "it has no row"),
    ],
)
def test_a_wrong_flame_table_is_refused(tmp_path, rows, reason):
    tables = {"iter_5/layer_02": EXPERT_LTK[0].tolist(), "iter_5/layer_03": rows}
    with pytest.raises(ValueError, match=reason):
        load_trace(flame(tmp_path, tables), 4)
