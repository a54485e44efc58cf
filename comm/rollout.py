"""What a rollout engine is: the seam between whoever samples and whoever asks for samples.

The one idea: a sample says which weight versions made it, token by token, so that the trainer can
correct for staleness and the books can be checked. Randomness is a function of the request's key
alone, so that the same requests on the same weights give the same samples on any engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from gossamer.comm.live import CommitStats

ROLLOUT_ENGINES = {
    "hf": "gossamer.comm.engines.hf:HFEngine",
    "vllm": "gossamer.comm.engines.vllm_offline:VLLMEngine",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One completion to be sampled."""

    request_id: str
    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    temperature: float
    """0 means greedy."""
    key: tuple[int, ...]
    """Words that seed the sample's randomness, e.g. (seed, step, prompt id, sample index)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VersionSpan:
    """Completion tokens [start, stop) were sampled with the weights of `version`."""

    start: int
    stop: int
    version: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One completion. `token_ids` holds the end-of-sequence token when the engine sampled it."""

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """log-probability of each token under the weights (and temperature) that sampled it."""
    spans: tuple[VersionSpan, ...]
    finished: bool
    """False when max_new_tokens, or whoever interrupted the engine, cut the completion."""


class RolloutEngine(Protocol):
    """An inference engine that follows a weight log."""

    def generate(
        self, requests: list[Request], is_cut: Callable[[], bool] | None = None
    ) -> list[Sample]:
        """Samples one completion per request, in the order of the requests.

        Stops before the next step once `is_cut()`: samples are then as they are, shorter than they
        were to be or without any token.
        """
        ...

    def stage(self, version: int) -> None:
        """Fetches, checks and decodes `version` beside the running engine; changes no weight.

        The engine's own version must be the base of `version`, or `version` must hold an anchor.
        """
        ...

    def commit(self) -> CommitStats:
        """Makes the staged version live; on failure the old one stays live."""
        ...

    def audit(self) -> str:
        """State hash over the live weights, read in full."""
        ...

    def close(self) -> None:
        """Frees the engine."""
        ...
