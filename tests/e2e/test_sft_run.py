"""A run that reads files, first text and then conversations, with a foreign tokenizer: killed in
both phases and resumed, it is the run that was never killed."""

import json
import math
from pathlib import Path

import hf_tokenizers
import pyarrow
import pyarrow.parquet
import pytest
from gloo_world import run_world
from gossamer.launch.recipe import build_config
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from test_resume import run_until
from tiny_run import SETTINGS, events


def settings(folder: Path) -> dict:
    chats = [
        [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n}" * 3}]
        for n in range(40)
    ]
    lines = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
    (folder / "chats.jsonl").write_text(lines)
    table = pyarrow.table({"body": [f"def f{n}(): return {n}" for n in range(90)]})
    pyarrow.parquet.write_table(table, folder / "texts.parquet", row_group_size=20)
    sources = [
        {"kind": "parquet", "path": f"{folder}/*.parquet", "text_field": "body"},
        {"kind": "jsonl", "path": f"{folder}/chats.jsonl", "messages_field": "messages"},
    ]
    data = {"seq_len": 64, "num_rows": 5, "task_share": 0.0, "buffer_tokens": 600}
    common = {name: SETTINGS[name] for name in ("seed", "model", "parallel", "metrics")}
    return common | {
        "tokenizer": {"path": str(hf_tokenizers.qwen_like(folder / "hf"))},
        "data": data | {"sources": sources},
        "heldout": {"every_steps": 2, "num_rows": 2, "permille": 100},
        "phases": [
            {"name": "text", "kind": "next_token", "max_steps": 4, "lr": 0.01},
            {"name": "chat", "kind": "sft", "max_steps": 6, "lr": 0.01},
        ],
        "checkpoint": SETTINGS["checkpoint"],
    }


@pytest.mark.slow
def test_files_and_conversations_through_kills(tmp_path):
    held = settings(tmp_path)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        prepare_run(build_config(TrainConfig, held, "train"), folder, "test")
    run_world(run_until, 2, str(whole), None, held)
    for kill_at_step in (3, 7):
        with pytest.raises(AssertionError, match="exit code -9"):
            run_world(run_until, 2, str(killed), kill_at_step, held)
    run_world(run_until, 2, str(killed), None, held)
    expected = {e["step"]: e for e in events(whole, "train_step")}
    assert [e["step"] for e in events(killed, "train_step")] == [
        1,
        2,
        3,
        3,
        4,
        5,
        6,
        7,
        7,
        8,
        9,
        10,
    ]
    for event in events(killed, "train_step"):
        for field in ("loss", "grad_norm", "tokens", "learned_tokens"):
            assert event[field] == expected[event["step"]][field], event["step"]
    learned = {s: e["learned_tokens"] / e["tokens"] for s, e in expected.items()}
    assert min(learned[s] for s in range(1, 5)) > 0.8 > 0.4 > max(learned[s] for s in range(5, 11))
    assert expected[10]["loss"] < expected[5]["loss"] < math.log(324) + 1
    heldout = {e["step"]: e["loss"] for e in events(whole, "eval")}
    assert list(heldout) == [2, 4, 6, 8, 10] and heldout[10] < heldout[6]
    assert all(e["loss"] == heldout[e["step"]] for e in events(killed, "eval"))
