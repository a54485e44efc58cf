"""A rollout engine on vLLM in this process that follows a weight log between steps.

The one idea: the engine's own worker follows (vllm.py); here it is told when, between two steps. A
sample is a function of weights and requests: seeds come from the requests' keys, and no prefix is
cached. Requests in flight over a commit are kept and their KV is computed anew with the new
weights, so that no KV is of two versions; each token's span names the weights that sampled it.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from itertools import count
from pathlib import Path
from threading import Lock
from typing import Any

from gossamer.comm.engines.vllm import BACKEND
from gossamer.comm.live import ApplyError, CommitStats
from gossamer.comm.log import WeightLog
from gossamer.comm.rollout import Request, Sample, VersionSpan
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.inputs import TokensPrompt
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor.abstract import Executor


class VLLMEngine:
    """RolloutEngine; generate may run in one thread while another stages and commits.

    `model_config` is a transformers config as a dict with its `model_type`; its `dtype`, bfloat16
    if it says none, is the log's publish dtype; weights come from the log alone. Workers open the
    log themselves, by the url and the public key's file that it was opened with. `options` are
    vLLM's engine arguments, on top of those chosen here. `pad_id` is not needed.
    """

    def __init__(
        self,
        model_config: dict[str, Any],
        log: WeightLog,
        *,
        pad_id: int,
        eos_id: int,
        options: dict[str, Any] | None = None,
    ) -> None:
        with tempfile.TemporaryDirectory(prefix="gossamer-vllm-") as folder:
            (Path(folder) / "config.json").write_text(json.dumps(_with_architecture(model_config)))
            arguments = {
                "model": folder,
                "load_format": "dummy",
                "dtype": model_config.get("dtype") or "bfloat16",
                "skip_tokenizer_init": True,
                "enforce_eager": True,
                "kv_cache_memory_bytes": 1 << 28,
                # samples are to be a function of weights and requests alone
                "enable_prefix_caching": False,
                "async_scheduling": False,
                # a half prefill takes back its draw, which a CPU's generators cannot
                "enable_chunked_prefill": not current_platform.is_cpu(),
                "logprobs_mode": "processed_logprobs",
                "generation_config": "vllm",
                "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
                **(options or {}),
            }
            config = EngineArgs(**arguments).create_engine_config()
            with out_of_sight("llvmlite.binding.ffi"):
                self._engine = LLMEngine(
                    vllm_config=config,
                    executor_class=Executor.get_class(config),
                    log_stats=False,
                    multiprocess_mode=False,
                )
        self._log, self._eos_id = log, eos_id
        self._ids = count()
        self._staged: int | None = None
        self._version: int | None = None
        self._gate, self._turn_lock = Lock(), Lock()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Owns the engine: one step or one call at a time; who waits comes before the next step."""
        with self._gate:
            self._turn_lock.acquire()
        try:
            yield
        finally:
            self._turn_lock.release()

    def _rpc(self, method: str, *args: Any) -> list[Any]:  # noqa: ANN401
        """What each rank answers."""
        return self._engine.collective_rpc(method, args=args)

    def stage(self, version: int) -> None:
        """Fetches, checks and decodes `version` beside the running engine; changes no weight."""
        self._staged = None
        with self._turn():
            if not all(self._rpc("gossamer_status")):  # until now the log may have been empty
                init = {"log_url": self._log.url, "public_key": self._log.public_key}
                self._rpc("init_weight_transfer_engine", init)
            self._rpc("gossamer_stage", version)
        while True:
            with self._turn():
                ranks = self._rpc("gossamer_status")
            failures = [rank["failure"] for rank in ranks if rank["failure"]]
            if failures:
                hop = self._log.hop(self._version, version)
                if hop and any(rank["is_unsound"] for rank in ranks):
                    self._log.avoid(hop.refs)  # whoever asks it again is shown another way
                raise ApplyError(failures[0])
            if all(rank["staged"] == version for rank in ranks):
                self._staged = version
                return
            time.sleep(0.002)

    def commit(self) -> CommitStats:
        """Makes the staged version live on every rank; a failure on one leaves the old one live."""
        version, self._staged = self._staged, None
        if version is None:
            raise RuntimeError("nothing to commit: stage a version first")
        with self._turn():
            start_s = time.perf_counter()
            try:
                self._rpc("start_weight_update")
                self._rpc("update_weights", {"version": version})
            except BaseException:
                self._rpc("gossamer_roll_back")
                raise
            self._rpc("finish_weight_update")
            self._engine.set_weight_version(str(version))
            self._engine.reset_prefix_cache(reset_running_requests=True)
            self._version = version
            pause_s = time.perf_counter() - start_s
            return CommitStats(version, pause_s, self._rpc("gossamer_status")[0]["num_changed"])

    def audit(self) -> str:
        """State hash of what the ranks compute with. Raises RuntimeError where they differ."""
        with self._turn():
            hashes = {rank["state_hash"] for rank in self._rpc("gossamer_audit")}
        if len(hashes) > 1:
            raise RuntimeError(f"ranks hold different states: {', '.join(sorted(hashes))}")
        return hashes.pop()

    def close(self) -> None:
        """Frees the engine."""
        self._engine.engine_core.shutdown()
        del self._engine

    def generate(
        self, requests: list[Request], is_cut: Callable[[], bool] | None = None
    ) -> list[Sample]:
        """Samples one completion per request, in their order; see RolloutEngine.

        Of a request that is cut nothing is kept, for vLLM says its versions at the end.
        Raises RuntimeError before the first commit, ValueError for a request that cannot be run.
        """
        if self._version is None:
            raise RuntimeError("no weight version is live: stage and commit one before generate")
        ids = [f"{next(self._ids)}" for _ in requests]
        finished: dict[str, CompletionOutput] = {}
        try:
            with self._turn():
                for name, request in zip(ids, requests, strict=True):
                    prompt = TokensPrompt(prompt_token_ids=list(request.prompt_ids))
                    self._engine.add_request(name, prompt, _sampling(request, self._eos_id))
            while len(finished) < len(requests) and not (is_cut is not None and is_cut()):
                with self._turn():
                    for each in self._engine.step():
                        if isinstance(each, RequestOutput) and each.finished:
                            finished[each.request_id] = each.outputs[0]
        finally:
            with self._turn():
                self._engine.abort_request([name for name in ids if name not in finished])
        return [
            _sample_of(request, finished.get(name), self._eos_id)
            for name, request in zip(ids, requests, strict=True)
        ]


@contextmanager
def out_of_sight(module: str) -> Iterator[None]:
    """vLLM looks for kernels in all loaded modules, and fails at numba's library."""
    found = sys.modules.pop(module, None)
    try:
        yield
    finally:
        if found is not None:
            sys.modules[module] = found


def _with_architecture(model_config: dict[str, Any]) -> dict[str, Any]:
    """The config with the class that vLLM chooses its model by."""
    model_type = str(model_config.get("model_type"))
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ValueError(f"model_config: {model_type!r} is no model_type of a causal model")
    own = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    # a config that was never saved has the field, and it is None
    return {**model_config, "architectures": model_config.get("architectures") or own}


def _sampling(request: Request, eos_id: int) -> SamplingParams:
    words = ",".join(str(int(word)) for word in request.key).encode()
    return SamplingParams(
        temperature=request.temperature,
        max_tokens=request.max_new_tokens,
        seed=int.from_bytes(blake2b(words, digest_size=7).digest(), "little"),
        stop_token_ids=[eos_id],
        ignore_eos=True,
        logprobs=0,
        detokenize=False,
    )


def _sample_of(request: Request, output: CompletionOutput | None, eos_id: int) -> Sample:
    if output is None:
        name = request.request_id
        return Sample(request_id=name, token_ids=(), logprobs=(), spans=(), finished=False)
    tokens = tuple(output.token_ids)
    assert output.logprobs is not None and output.weight_versions is not None  # asked for
    return Sample(
        request_id=request.request_id,
        token_ids=tokens,
        logprobs=tuple(
            each[token].logprob
            for token, each in zip(tokens, output.logprobs, strict=True)
            if each is not None
        ),
        spans=tuple(
            VersionSpan(start=span.start, stop=span.end, version=int(span.version))
            for span in output.weight_versions
        ),
        finished=tokens[-1] == eos_id,
    )
