"""`gossamer rl` with vLLM as the engine of its own pool: a whole run, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import SHAPE
from tiny_run import SETTINGS, events
from vllm_here import SETTINGS as VLLM_SETTINGS
from vllm_here import VLLM

pytestmark = [*VLLM, pytest.mark.timeout(900)]
MODEL = {
    **SETTINGS["model"]["hf"],
    "hidden_size": SHAPE["hidden_size"],
    "head_dim": SHAPE["head_dim"],
    "moe_intermediate_size": 40,
}
# a unit's prompts do not fit into one pass
OPTIONS = {"max_model_len": 64, "max_num_batched_tokens": 64, "kv_cache_memory_bytes": 1 << 24}


def test_a_run_samples_on_vllm_and_ends_bit_equal(tmp_path):
    recipe, run_dir = tmp_path / "tiny.yaml", tmp_path / "run"
    rl = {**SETTINGS["rl"], "prompts_per_unit": 4}
    train = {**SETTINGS, "model": {"hf": MODEL}, "rl": rl, "parallel": {"expert": 1}}
    train["log"] = {"publish_dtype": "float16"}
    rollout = {"engine": "vllm", "engines": 1, "engine_options": OPTIONS}
    recipe.write_text(json.dumps({"name": "tiny", "train": train, "rollout": rollout}))
    command = [sys.executable, "-m", "gossamer.launch.cli", "rl", recipe, "--run-dir", run_dir]
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        command,
        env={**os.environ, **VLLM_SETTINGS, "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    steps = [e for e in events(run_dir, "train_step") if e["phase"] == "rl"]
    assert len(steps) == SETTINGS["phases"][1]["max_steps"]
    # the engine's own probabilities: fp16 beside the trainer's fp32
    assert all(0.95 < step["mean_ratio"] < 1.05 and step["completion_tokens"] for step in steps)
    assert [audit["equal"] for audit in events(run_dir, "audit")] == [True]
