"""A rollout engine on a transformers model that follows a weight log between decode steps.

The one idea: a unit of requests is one batch in the given order and every uniform comes from its
request's key, so samples are a pure function of weights and requests; and the log's tensors are
views on the very parameters the forward pass reads, so a commit is the whole weight update.

The KV cache of requests in flight is kept over a commit: their later tokens attend to keys and
values of two versions (each token's span names the weights that sampled it). Nothing is cached
between calls of generate.
"""

# axes: B requests, U distinct prompts, P prompt width, N new tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import chain, groupby
from threading import Lock
from typing import Any

import numpy as np
import torch
from gossamer.comm.live import CommitStats, LiveWeights, Staged
from gossamer.comm.log import WeightLog
from gossamer.comm.names import logical_views, published_dtype
from gossamer.comm.rollout import Request, Sample, VersionSpan
from gossamer.comm.subscriber import Subscriber
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel


class HFEngine:
    """RolloutEngine on the CPU; generate may run in one thread while another stages and commits.

    `model_config` is a transformers config as a dict with its `model_type`; its `dtype`, bfloat16
    if it says none, is both the live and the compute dtype and must be the log's publish dtype.
    `pad_id` is any token id, never attended to. `experts_implementation` None is transformers' own
    default, grouped_mm where the model has experts; it sums a token's experts in fp32 and takes as
    long as eager on the CPU.
    """

    def __init__(
        self,
        model_config: dict[str, Any],
        log: WeightLog,
        *,
        pad_id: int,
        eos_id: int,
        attn_implementation: str = "sdpa",
        experts_implementation: str | None = None,
    ) -> None:
        if "model_type" not in model_config:
            raise ValueError("model_config: expected a transformers config with its model_type")
        with torch.random.fork_rng(devices=[]):  # the initial values are never used
            self._model = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(**model_config),
                dtype=getattr(torch, model_config.get("dtype") or "bfloat16"),
                attn_implementation=attn_implementation,
                experts_implementation=experts_implementation,
            ).eval()
        for name, buffer in self._model.named_buffers():
            buffer.data = buffer.data.to(published_dtype(name, buffer.dtype))
        self._live = LiveWeights(live_tensors(self._model))
        self._subscriber = Subscriber(log, self._live)
        self._staged: Staged | None = None
        self._pad_id, self._eos_id = pad_id, eos_id
        self._gate, self._weights = Lock(), Lock()

    @property
    def version(self) -> int | None:
        """The live version, None before the first commit."""
        return self._live.version

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Owns the weights: one decode step, one commit or one audit at a time.

        Whoever waits for the weights holds the gate, so a commit is next after the running step
        however fast the decode loop comes back.
        """
        with self._gate:
            self._weights.acquire()
        try:
            yield
        finally:
            self._weights.release()

    def stage(self, version: int) -> None:
        """Fetches, checks and decodes `version` beside the running engine; changes no weight."""
        self._staged = self._subscriber.fetch_and_stage(version)

    def commit(self) -> CommitStats:
        """Makes the staged version live at the next step boundary.

        Raises RuntimeError when nothing is staged; any failure leaves the old version live.
        """
        staged, self._staged = self._staged, None
        if staged is None:
            raise RuntimeError("nothing to commit: stage a version first")
        with self._turn():
            return self._subscriber.commit(staged)

    def audit(self) -> str:
        """State hash over the live parameters, read in full; decoding waits for it."""
        with self._turn():
            return self._live.audit()

    def close(self) -> None:
        """Drops the model; the engine is not usable afterwards."""
        del self._model, self._live, self._subscriber, self._staged

    @torch.inference_mode()
    def generate(
        self, requests: list[Request], is_cut: Callable[[], bool] | None = None
    ) -> list[Sample]:
        """Samples `requests` as one batch, one completion each, in their order; see RolloutEngine.

        Raises RuntimeError before the first commit, ValueError for a request that cannot be run.
        """
        self._check(requests)
        limit_B = torch.tensor([r.max_new_tokens for r in requests])
        temperature_B = torch.tensor([r.temperature for r in requests], dtype=torch.float64)
        uniform_BN = uniforms(requests)
        token_BN = torch.full(uniform_BN.shape, self._pad_id)
        logprob_BN = torch.zeros_like(uniform_BN)
        length_B = torch.zeros_like(limit_B)
        versions: list[int] = []

        # samples of one prompt share its prefill; row_B: where in the batch a running request is
        prompts = {
            prompt: u for u, prompt in enumerate(dict.fromkeys(r.prompt_ids for r in requests))
        }
        row_B = torch.tensor([prompts[r.prompt_ids] for r in requests])
        running_B = torch.arange(len(requests))
        ids_BP, mask_BP = left_padded(list(prompts), self._pad_id)
        cache = DynamicCache(config=self._model.config)
        while len(running_B) and not (is_cut is not None and is_cut()):
            step = len(versions)
            with self._turn():
                version = self._live.version
                assert version is not None  # _check saw one, and versions are never taken away
                versions.append(version)
                logits_BV = self._forward(ids_BP, mask_BP, cache)[row_B]
            token_B, token_logprob_B = sample_tokens(
                logits_BV, temperature_B[running_B], uniform_BN[running_B, step]
            )
            token_BN[running_B, step] = token_B
            logprob_BN[running_B, step] = token_logprob_B
            length_B[running_B] = step + 1
            goes_on_B = (token_B != self._eos_id) & (step + 1 < limit_B[running_B])
            running_B, row_B, ids_BP = (
                running_B[goes_on_B],
                row_B[goes_on_B],
                token_B[goes_on_B, None],
            )
            if len(row_B) != len(mask_BP) or step == 0:
                cache.batch_select_indices(row_B)
                mask_BP = mask_BP[row_B]
            mask_BP = torch.cat([mask_BP, torch.ones_like(ids_BP)], dim=1)
            row_B = torch.arange(len(row_B))
        return [
            Sample(
                request_id=request.request_id,
                token_ids=tuple(tokens[:length]),
                logprobs=tuple(logprobs[:length]),
                spans=version_spans(versions[:length]),
                finished=length > 0 and tokens[length - 1] == self._eos_id,
            )
            for request, tokens, logprobs, length in zip(
                requests, token_BN.tolist(), logprob_BN.tolist(), length_B.tolist(), strict=True
            )
        ]

    def _forward(self, ids_BP: Tensor, mask_BP: Tensor, cache: DynamicCache) -> Tensor:
        """Logits [B, V] after the last new token of `ids_BP`; `mask_BP` covers the cache too."""
        position_BP = (mask_BP.cumsum(dim=1) - 1).clamp_min(0)[:, -ids_BP.shape[1] :]
        output = self._model(
            input_ids=ids_BP,
            attention_mask=mask_BP,
            position_ids=position_BP,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    def _check(self, requests: list[Request]) -> None:
        if self.version is None:
            raise RuntimeError("no weight version is live: stage and commit one before generate")
        vocab_size = self._model.config.vocab_size
        for r in requests:
            if not r.prompt_ids or not 0 <= min(r.prompt_ids) <= max(r.prompt_ids) < vocab_size:
                raise ValueError(
                    f"request {r.request_id}: expected prompt_ids in [0, {vocab_size})"
                )
            if r.max_new_tokens < 1 or not 0 <= r.temperature < float("inf"):
                raise ValueError(
                    f"request {r.request_id}: max_new_tokens must be at least 1 and temperature "
                    f"finite and not negative, got {r.max_new_tokens} and {r.temperature}"
                )


def live_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Views on all that save_pretrained would write: parameters and saved buffers, each once."""
    # not the state dict itself: it names a tied weight twice, and a delta applies once
    saved = model.state_dict().keys()
    buffers = ((name, b) for name, b in model.named_buffers() if name in saved)
    model_type = model.config.model_type
    return logical_views(chain(model.named_parameters(), buffers), model_type=model_type)


def left_padded(prompts: list[tuple[int, ...]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask [U, P], every prompt ending in the last column."""
    width = max(map(len, prompts), default=0)
    ids = [[pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)


def uniforms(requests: list[Request]) -> Tensor:
    """One uniform in [0, 1) per new token, float64 [B, N], row b a function of requests[b].key."""
    uniform_BN = np.zeros((len(requests), max((r.max_new_tokens for r in requests), default=0)))
    for row, request in zip(uniform_BN, requests, strict=True):
        # hashed, because numpy's own seeding takes (1, 2) and (1, 2, 0) for the same key
        words = ",".join(str(int(word)) for word in request.key).encode()
        key = int.from_bytes(blake2b(words, digest_size=16).digest(), "little")
        row[: request.max_new_tokens] = np.random.Generator(np.random.Philox(key=key)).random(
            request.max_new_tokens
        )
    return torch.from_numpy(uniform_BN)


def sample_tokens(
    logits_BV: Tensor, temperature_B: Tensor, uniform_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens [B] by inverse CDF in float64 (argmax where temperature is 0), and their log-probs.

    The log-probability is that of the sampling distribution, at temperature 1 for greedy rows.
    Raises FloatingPointError for logits that are not finite.
    """
    logits_BV = logits_BV.float()
    greedy_B = temperature_B == 0
    scaled_BV = logits_BV.double() / torch.where(greedy_B, 1.0, temperature_B)[:, None]
    scaled_BV -= scaled_BV.amax(dim=1, keepdim=True)
    cdf_BV = scaled_BV.exp().cumsum(dim=1)
    total_B1 = cdf_BV[:, -1:]
    if not torch.isfinite(total_B1).all():
        raise FloatingPointError("the live weights give logits that are not finite")
    # right=True: the first token whose cdf exceeds the draw, so none of probability zero
    drawn_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * total_B1, right=True).squeeze(1)
    token_B = torch.where(greedy_B, logits_BV.argmax(dim=1), drawn_B)
    logprob_B1 = scaled_BV.gather(1, token_B[:, None]) - total_B1.log()
    return token_B, logprob_B1.squeeze(1)


def version_spans(versions: list[int]) -> tuple[VersionSpan, ...]:
    """Spans of equal neighbours in the version of each token."""
    spans, start = [], 0
    for version, tokens in groupby(versions):
        stop = start + len(list(tokens))
        spans.append(VersionSpan(start=start, stop=stop, version=version))
        start = stop
    return tuple(spans)
