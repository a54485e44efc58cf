"""The reference policy: what the KL of the loss is measured to.

The one idea: it is a version of the weight log, the one that the phase began with; so a resumed run
and an engine can read the same bytes, and a checkpoint holds no more than that version's number.
It is a second, frozen model on each rank, in the bits that engines sample from.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from gossamer.comm.log import WeightLog
from gossamer.comm.names import logical_views
from gossamer.comm.reader import StateReader
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.evaluate import logits_of
from gossamer.trainer.losses import learned_logprobs
from gossamer.trainer.model import MoEModel, build_model
from gossamer.trainer.rl.grpo import PolicyBatch
from transformers import PretrainedConfig


class Reference:
    """Built with the first batch; every rank makes the same calls."""

    def __init__(
        self, config: TrainConfig, hf: PretrainedConfig, dims: ParallelDims, log: WeightLog
    ) -> None:
        self._config, self._hf, self._dims, self._log = config, hf, dims, log
        self._model: MoEModel | None = None
        self._version: int | None = None

    @torch.no_grad()
    def scored(self, batch: PolicyBatch, version: int | None) -> PolicyBatch:
        """The batch with the log-probabilities under `version`, in the rows that this rank learns.

        A collective call. Raises LogError when the log no longer holds the version, ValueError for
        None.
        """
        if version is None:
            raise ValueError(
                "the checkpoint does not name the version that its grpo phase began with; expected"
                " rl.kl_coef 0, or a checkpoint of this version of gossamer"
            )
        if version != self._version:
            self._model = self._read(version)
            self._version = version
        assert self._model is not None
        rank, world_size = self._dims.rank, self._dims.world_size
        mine = batch.split(rank, world_size)
        num_micro = -(-len(mine.token_ids_BS) // self._config.micro_rows)
        scored_BS = torch.zeros_like(batch.reference_logprobs_BS)
        first = rank * len(mine.token_ids_BS)
        for index in range(num_micro):
            part = mine.split(index, num_micro)
            logits_BSV = logits_of(self._model, part)
            logprobs_T = learned_logprobs(logits_BSV, part, self._config.rl.temperature)
            rows_BS = torch.zeros_like(part.reference_logprobs_BS)
            rows_BS[part.weights_BS != 0] = logprobs_T.float()
            room = scored_BS[first : first + len(rows_BS)]  # zero rows may end behind the batch
            room.copy_(rows_BS[: len(room)])
            first += len(rows_BS)
        return replace(batch, reference_logprobs_BS=scored_BS)

    def _read(self, version: int) -> MoEModel:
        """A model with the weights of `version`; a tensor at a time is decoded."""
        random = replace(self._config.model, path=None, hf={"model_type": self._hf.model_type})
        with torch.random.fork_rng(devices=[]):  # the initial values are never used
            model = build_model(random, self._hf, self._dims, self._config.seed)
        model.module.requires_grad_(False).eval()
        offset = self._dims.local_experts(model.blocks[0].num_experts).start
        named = model.module.named_parameters()
        views = logical_views(named, offset, self._hf.model_type) | model.buffers()
        for name, tensor in StateReader(self._log, version):
            if (view := views.pop(name, None)) is not None:
                view.copy_(tensor)
        assert not views, f"version {version} lacks {min(views)}"
        for parameter in model.module.parameters():  # and no routing bias, nor frequency
            parameter.data = parameter.to(getattr(torch, self._config.parallel.compute_dtype))
        return model
