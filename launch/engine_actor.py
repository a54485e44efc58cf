"""A rollout engine as a Ray actor: one thread follows the log while another samples.

The one idea: what a new version does to the samples in the making is a choice, and it is made here,
by when the engine is told to stop and when it is told to commit; so it is the same for any engine.
A unit that is aborted, or of which the engine keeps nothing but what was finished, is sampled again
as a whole: were its finished samples kept, short answers would be favoured.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from gossamer.comm.live import ApplyError
from gossamer.comm.manifest import GoneError, LogError
from gossamer.comm.rollout import Request, Sample, VersionSpan
from gossamer.launch.config import RolloutConfig
from gossamer.trainer.metrics import EventLog
from gossamer.trainer.run_folder import LOG_FOLDER, inside, open_run, url_of

LOOK_S, STORE_LOOK_S = 0.02, 0.2
"""Between two looks for a version: a bucket takes money for each."""
AGAIN_S = (0.25, 0.5, 1.0, 2.0)
"""Pauses before a version that could not be taken is looked for again: a fold that did not fit is
then avoided, what was read badly is read anew. After the last one the engine is unfit."""
STORE_AGAIN_S = 300.0
"""For so long a store may fail: were all engines started anew, all would read an anchor at once."""


def write_pid(run_dir: Path, role: str) -> None:
    """Leaves this process's id in RUN_DIR/pids/ROLE, for whoever has to find it."""
    folder = run_dir / "pids"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / role).write_text(str(os.getpid()))


class UnfitError(RuntimeError):
    """An engine does not hold what it should: no sample of it is taken, and it is started anew."""


class EngineActor:
    """One rollout engine."""

    def __init__(self, name: str, run_dir: str, rollout: RolloutConfig, model: dict) -> None:
        import torch
        from gossamer.comm.log import WeightLog
        from gossamer.comm.rollout import ROLLOUT_ENGINES
        from gossamer.trainer.import_path import resolve

        torch.set_num_threads(1)
        here = open_run(run_dir)
        write_pid(here, name)
        self._events, self._name, self._rollout = EventLog(here), name, rollout
        self._log = WeightLog.open(inside(here, LOG_FOLDER), public_key=rollout.public_key_path)
        self._look_s = LOOK_S if url_of(here) is None else STORE_LOOK_S
        self._version: int | None = None
        self._fault: str | None = None
        self._failures, self._failing_since_s, self._rests_until_s = 0, 0.0, 0.0
        self._unaudited = 0
        build = resolve(rollout.engine, ROLLOUT_ENGINES, "rollout.engine")
        ids = {"pad_id": model["pad_token_id"], "eos_id": model["eos_token_id"]}
        options = {"options": dict(rollout.engine_options)} if rollout.engine_options else {}
        self._engine = build(model, self._log, **ids, **options)
        self._moving, self._sampling = threading.Lock(), threading.Lock()
        self._is_wanted, self._is_over = threading.Event(), threading.Event()
        self._is_over.set()
        threading.Thread(target=self._follow_for_ever, daemon=True).start()

    def catch_up(self, is_anew: bool) -> int | None:
        """Follows to what is now the head of the log; the live version. With `is_anew` it is
        audited, too. Raises UnfitError."""
        head = self._log.head()
        while head is not None and (self._version is None or self._version < head):
            if not self._follow():
                self._raise_fault()
                time.sleep(self._look_s)
        if is_anew and self._version is not None:
            with self._moving:
                self._check_bits()
            self._raise_fault()
        return self._version

    def status(self) -> tuple[int | None, str | None]:
        """(live version, why the engine is unfit)."""
        return self._version, self._fault

    def run(self, requests: list[Request], oldest_version: int) -> list[Sample]:
        """Samples a unit at `oldest_version` or newer. Raises UnfitError."""
        while self._version is None or self._version < oldest_version:
            self._raise_fault()
            if not self._follow():
                time.sleep(self._look_s / 2)
        start_s = time.perf_counter()
        samples, cuts, dropped = self._generate(requests)
        self._raise_fault()
        self._event(
            "generate",
            samples=len(samples),
            tokens=sum(len(sample.token_ids) for sample in samples),
            generate_s=time.perf_counter() - start_s,
            cuts=cuts,
            dropped_tokens=dropped,
        )
        return samples

    def _generate(self, requests: list[Request]) -> tuple[list[Sample], int, int]:
        """(samples, how often a version stopped them, tokens thrown away)."""
        mode, cuts, dropped = self._rollout.on_new_version, 0, 0
        if mode == "keep":
            return self._engine.generate(requests), 0, 0
        so_far: dict[str, Sample] = {}
        left = requests
        while left:
            self._is_over.wait()  # a version that stopped us goes first
            is_cuttable = mode != "wait" and cuts < self._rollout.max_cuts
            is_cut = (self._is_wanted.is_set,) if is_cuttable else ()
            with self._sampling:
                for sample in self._engine.generate(left, *is_cut):
                    so_far[sample.request_id] = joined(so_far.get(sample.request_id), sample)
            if not is_cut:
                break
            left = [request for request in requests if not _is_whole(request, so_far)]
            cuts += bool(left)
            keeps_all = all(so_far[request.request_id].token_ids for request in left)
            if left and (mode == "abort" or not keeps_all):
                dropped += sum(len(sample.token_ids) for sample in so_far.values())
                left, so_far = requests, {}
            left = [_rest(request, so_far.get(request.request_id)) for request in left]
        return [so_far[request.request_id] for request in requests], cuts, dropped

    def audit(self, version: int) -> str:
        """State hash of the live weights once they are at `version`.

        Raises ValueError where they are at a later one: nobody waits for the answer any more; and
        UnfitError.
        """
        while self._version is None or self._version < version:
            self._raise_fault()
            if not self._follow():
                time.sleep(self._look_s / 2)
        if self._version > version:
            raise ValueError(f"the engine is at version {self._version}, past version {version}")
        self._events.flush()  # the run may end with this
        return self._engine.audit()

    def _follow_for_ever(self) -> None:
        while True:
            if not self._follow():
                time.sleep(self._look_s)

    def _follow(self) -> bool:
        """Stages and commits the next version; False when there is none, when it could not be taken
        and is to be looked at later, or when the engine is unfit."""
        with self._moving:
            if self._fault is not None or time.monotonic() < self._rests_until_s:
                return False
            try:
                is_moved = self._move()
            except GoneError:
                return True  # deleted meanwhile; the next look finds another way, or none
            except (LogError, ApplyError, OSError) as error:
                self._rest(error)
                return False
            except Exception as error:
                self._fault = f"{type(error).__name__}: {error}"
                return False
            self._failures = 0
            return is_moved

    def _rest(self, error: Exception) -> None:
        """A version could not be taken: waits a little longer each time, or is unfit at last."""
        now_s = time.monotonic()
        if not self._failures:
            self._failing_since_s = now_s
        pause_s = AGAIN_S[min(self._failures, len(AGAIN_S) - 1)]
        is_last = self._failures >= len(AGAIN_S)
        if isinstance(error, OSError):
            is_last = now_s - self._failing_since_s > STORE_AGAIN_S
        if is_last:
            self._fault = f"{type(error).__name__}: {error}"
        self._failures, self._rests_until_s = self._failures + 1, now_s + pause_s

    def _move(self) -> bool:
        version = self._log.next_version(self._version)
        if version is None:
            return False
        start_s = time.perf_counter()
        hop, manifest = self._log.hop(self._version, version), self._log.manifest(version)
        self._engine.stage(version)
        stage_s = time.perf_counter() - start_s
        self._is_over.clear()
        self._is_wanted.set()
        keeps = self._rollout.on_new_version == "keep"
        try:
            with nullcontext() if keeps else self._sampling:
                committed = self._engine.commit()
                self._version = version
        finally:
            self._is_wanted.clear()
            self._is_over.set()
        self._event(
            "commit",
            bytes=hop.nbytes if hop else 0,
            density=manifest.num_changed / manifest.num_elements,
            stage_s=stage_s,
            commit_s=time.perf_counter() - start_s - stage_s,
            pause_s=committed.pause_s,
        )
        self._unaudited += 1
        if 0 < self._rollout.audit_every_versions <= self._unaudited:
            self._check_bits()
        return True

    def _check_bits(self) -> None:
        """Hashes the live weights; the engine is unfit where they are not the log's."""
        assert self._version is not None  # asked after a commit
        self._unaudited = 0
        found, expected = self._engine.audit(), self._log.manifest(self._version).state_hash
        if found != expected:
            self._fault = (
                f"its live weights hash to {found} where version {self._version} has {expected}"
            )

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise UnfitError(self._fault)

    def _event(self, what: str, **fields: Any) -> None:  # noqa: ANN401
        named = {"engine": self._name, "what": what, "version": self._version}
        self._events.write("engine", {**named, **fields})


def joined(first: Sample | None, rest: Sample) -> Sample:
    """One completion of two pieces."""
    if first is None:
        return rest
    at = len(first.token_ids)
    spans = list(first.spans)
    for span in rest.spans:
        moved = VersionSpan(start=span.start + at, stop=span.stop + at, version=span.version)
        if spans and spans[-1].version == moved.version:
            moved = replace(moved, start=spans.pop().start)
        spans.append(moved)
    return Sample(
        request_id=first.request_id,
        token_ids=first.token_ids + rest.token_ids,
        logprobs=first.logprobs + rest.logprobs,
        spans=tuple(spans),
        finished=rest.finished,
    )


def _is_whole(request: Request, so_far: dict[str, Sample]) -> bool:
    sample = so_far[request.request_id]
    return sample.finished or len(sample.token_ids) == request.max_new_tokens


def _rest(request: Request, sample: Sample | None) -> Request:
    """What is left to be sampled of a request; its randomness goes on under a key of its own."""
    if sample is None or not sample.token_ids:
        return request
    done = len(sample.token_ids)
    return replace(
        request,
        prompt_ids=request.prompt_ids + sample.token_ids,
        max_new_tokens=request.max_new_tokens - done,
        key=(*request.key, done),
    )
