"""The recipe of each family validates and learns; what it leaves is a Hugging Face folder."""

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from gossamer.launch.recipe import load_recipe
from gossamer.parallel.config import ParallelConfig
from gossamer.parallel.dims import build_dims
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.families import FAMILY_ROUTERS
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.tokenizer import token_fields
from gossamer.trainer.update import update
from transformers import AutoModelForCausalLM

BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


class PlainEngine:
    """What `update` asks of an engine, without DeepSpeed."""

    def __init__(self, module):
        self.module, self.num_updates = module, 0
        self._optimizer = torch.optim.AdamW(module.parameters())

    def backward(self, loss, is_last):
        loss.backward()

    def step(self, lr, max_norm):
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), max_norm)
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.num_updates += 1
        return float(norm)


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("family", FAMILY_ROUTERS)
def test_the_recipe_of_a_family_trains_two_steps(family, world_of_one):
    config = load_recipe(f"tiny_{family}", []).train
    assert config.model.hf["model_type"] == family
    dims = build_dims(ParallelConfig())
    tokens = token_fields(config.tokenizer.vocab_size)
    model = build_model(config.model, hf_config(config.model, tokens), dims, config.seed)
    before = {name: t.clone() for name, t in model.module.state_dict().items()}
    token_ids_BS = torch.randint(3, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(
        token_ids_BS=token_ids_BS,
        position_ids_BS=torch.arange(64).repeat(4, 1),
        weights_BS=torch.ones(4, 64),
    )
    engine = PlainEngine(model.module)
    losses = [update(model, engine, dims, batch, 3e-3, config).loss for _ in range(3)]
    assert losses[2] < losses[1] < losses[0] < 7
    for name, tensor in model.module.state_dict().items():
        assert tensor.isfinite().all() and not torch.equal(tensor, before[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILY_ROUTERS)
def test_the_command_trains_a_family_on_two_ranks_and_exports_it(family, tmp_path):
    run_dir, out = str(tmp_path / "run"), tmp_path / "out"
    overrides = ["train.phases.0.max_steps=2", "train.phases.0.warmup_steps=1"]
    overrides.append("train.metrics.wandb_mode=disabled")
    for words in (
        ["train", f"tiny_{family}", "--run-dir", run_dir, *overrides],
        ["export", run_dir, str(out)],
    ):
        command = [sys.executable, "-m", "gossamer.launch.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
    exported = AutoModelForCausalLM.from_pretrained(out)
    assert exported.config.model_type == family
    assert next(exported.parameters()).dtype == torch.bfloat16
    if family == "deepseek_v3":
        bias_E = exported.state_dict()[BIAS]
        assert bias_E.dtype == torch.float32 and 0 < bias_E.abs().max() <= 0.002 + 1e-6
