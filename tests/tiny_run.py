"""A run small enough for tests: a two-layer model, six updates on text, five of RL."""

from __future__ import annotations

import json
import time
from pathlib import Path

SETTINGS = {
    "seed": 5,
    "model": {
        "hf": {
            "model_type": "qwen3_moe",
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "intermediate_size": 48,
            "tie_word_embeddings": False,
        }
    },
    "tokenizer": {"vocab_size": 300, "train_chars": 50_000},
    "task": {"size": 900, "min_heldout": 10},
    "data": {"seq_len": 64, "num_rows": 5, "task_share": 0.6, "corpus_chars": 20_000},
    "rl": {
        "prompts_per_step": 4,
        "samples_per_prompt": 3,
        "prompts_per_unit": 2,
        "max_new_tokens": 4,
        "seq_len": 64,
        "max_staleness": 0,
        "normalise_by_std": False,
        # random models are never right: a reward that is never constant instead
        "reward": "tiny_run:length_of_answer",
    },
    "parallel": {"expert": 2, "zero_stage": 1},
    "phases": [
        {"name": "warm_start", "kind": "next_token", "max_steps": 6, "lr": 0.01},
        {"name": "rl", "kind": "grpo", "max_steps": 5, "lr": 0.01},
    ],
    # written before the next step: tests kill runs and say where they go on
    "checkpoint": {"every_steps": 2, "keep_last": 20, "asynchronous": False},
    "metrics": {"wandb_mode": "disabled"},
}


def length_of_answer(completion: str, answer: str, finished: bool) -> float:
    return len(completion.encode()) * 0.1 + finished


def slow_length_of_answer(completion: str, answer: str, finished: bool) -> float:
    """For runs that are to last, and leave the machine to others."""
    time.sleep(0.02)
    return length_of_answer(completion, answer, finished)


def events(run_dir: Path, event: str) -> list[dict]:
    # the last line may be half-written yet, and a killed writer's is followed by an empty one
    whole = (run_dir / "metrics.jsonl").read_text().rpartition("\n")[0]
    records = map(json.loads, filter(None, whole.split("\n")))
    return [record for record in records if record["event"] == event]
