"""The policy that KL is measured to: the bytes of a version, on every rank, whatever is trained."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from gloo_world import run_world
from gossamer.comm.log import WeightLog
from gossamer.comm.names import logical_views
from gossamer.comm.publisher import Publisher
from gossamer.comm.rollout import Sample
from gossamer.launch.recipe import build_config
from gossamer.parallel.dims import build_dims
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.evaluate import logits_of
from gossamer.trainer.losses import learned_logprobs
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.rl.grpo import pack_samples
from gossamer.trainer.rl.reference import Reference
from tiny_run import SETTINGS


def score(folder: str) -> dict:
    """Log-probs of seven samples under the model, and under the reference read from its log."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parallel = {"expert": world_size, "data": 1}
    settings = {**SETTINGS, "parallel": parallel, "log": {"publish_dtype": "float32"}}
    config = replace(build_config(TrainConfig, settings, "train"), micro_rows=1)
    dims = build_dims(config.parallel)
    hf = hf_config(config.model, {"vocab_size": 40, "eos_token_id": 1, "pad_token_id": 0})
    model = build_model(config.model, hf, dims, seed=3)
    log = WeightLog.open(Path(folder, "log"), create=True)
    mine = logical_views(model.module.named_parameters(), dims.local_experts(4).start)
    if rank:  # what all ranks hold is the first one's to publish
        mine = {name: view for name, view in mine.items() if ".experts." in name}
    epoch = torch.tensor(log.claim_epoch() if rank == 0 else 0)
    dist.broadcast(epoch, src=0)
    Publisher(log, rank, world_size, int(epoch), config.log).publish(mine, step=0)
    samples = [
        Sample(
            request_id=str(n), token_ids=(n + 2, 5, 1), logprobs=(0.0,) * 3, spans=(), finished=True
        )
        for n in range(7)
    ]
    rl = replace(config.rl, seq_len=12)
    batch = pack_samples(samples, [[7, 8, 9]] * 7, [1.0] * 7, rl, 0)
    learned = batch.weights_BS != 0
    with torch.no_grad():
        own = learned_logprobs(logits_of(model, batch), batch, 1.0)
    before = torch.get_rng_state()
    reference = Reference(config, hf, dims, log)
    first = reference.scored(batch, 0).reference_logprobs_BS
    for parameter in model.module.parameters():
        parameter.data += 1.0  # the reference does not follow
    again = reference.scored(batch, 0).reference_logprobs_BS
    assert torch.equal(first, again) and torch.equal(before, torch.get_rng_state())
    assert not first[~learned].any()
    with pytest.raises(ValueError, match="does not name the version"):
        reference.scored(batch, None)
    return {"own": own, "reference": first}


def test_it_gives_the_log_probabilities_of_its_version(tmp_path):
    ranks = run_world(score, 2, str(tmp_path))
    scored_BS = sum(rank["reference"] for rank in ranks)  # each rank fills its own rows
    learned = scored_BS[scored_BS != 0]
    for rank in ranks:
        torch.testing.assert_close(learned, rank["own"], rtol=1e-5, atol=1e-6)
    assert all((rank["reference"] != 0).any() for rank in ranks)
