"""A sparse run's export in vLLM, which is told nothing of masks."""

import copy
from pathlib import Path

import pytest
import torch
from gloo_world import run_world
from gossamer.launch.config import RunConfig
from gossamer.launch.export import export_run
from gossamer.launch.recipe import build_config
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.prepare import prepare_run
from sparse_rules import GMP, RIGL, SR_STE
from tiny_models import MODELS, SMALL, answers_of_llm, requests
from tiny_run import SETTINGS
from transformers import AutoModelForCausalLM
from vllm_here import VLLM, vllm_here  # noqa: F401

pytestmark = [*VLLM, pytest.mark.usefixtures("vllm_here")]
STEPS = 4


def train(run_dir: str, settings: dict) -> None:
    from gossamer.trainer.loop import train
    from gossamer.trainer.session import RunPlace, Session

    config = build_config(TrainConfig, settings, "train")
    place = RunPlace(run_dir=Path(run_dir), name="test")
    train(Session(config, place, None, on_checkpoint=lambda step: None))


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Four steps under masks that live and that do not."""
    folder, settings = tmp_path_factory.mktemp("run"), copy.deepcopy(SETTINGS)
    hf = {name: value for name, value in MODELS["qwen3_moe"].items() if name != "vocab_size"}
    phase = {"name": "pretrain", "kind": "next_token", "max_steps": STEPS, "lr": 0.001}
    settings |= {"model": {"hf": hf}, "phases": [phase], "task": None}
    settings |= {"sparsity": {"rules": [RIGL, SR_STE, GMP]}, "parallel": {"expert": 1}}
    settings["data"]["task_share"] = 0.0
    prepare_run(build_config(TrainConfig, settings, "train"), folder, "test")
    run_world(train, 1, str(folder), settings)
    config = build_config(RunConfig, {"name": "test", "train": settings}, "")
    return export_run(config, folder, folder / "out")


def test_it_answers_as_transformers_does(exported):
    assert (exported / "sparsity/masks.safetensors").is_file()
    from gossamer.comm.engines.vllm_offline import out_of_sight
    from vllm import LLM

    with out_of_sight("llvmlite.binding.ffi"):
        llm = LLM(
            model=str(exported),
            dtype="float32",  # in bfloat16 the two round sums differently, and near ties part
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            **SMALL,
        )
    found = [tokens for tokens, _ in answers_of_llm(llm)]
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    for name, weight in model.state_dict().items():
        if ".experts." in name:
            zeros = 0.7 if "gate_up" in name else 0.5
            assert float((weight == 0).float().mean()) == pytest.approx(zeros, abs=0.01), name
    for request, tokens in zip(requests(), found, strict=True):
        prompt = torch.tensor([request.prompt_ids])
        answer = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=len(tokens),
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert tuple(answer[0, prompt.shape[1] :].tolist()) == tokens
