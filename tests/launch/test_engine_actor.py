"""What a new version does to samples in the making; a scripted engine, a real log, no Ray."""

import time
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from gossamer.comm.codec.part import Rows
from gossamer.comm.config import LogConfig
from gossamer.comm.fold import fold
from gossamer.comm.live import ApplyError, CommitStats, LiveWeights
from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError
from gossamer.comm.publisher import Publisher
from gossamer.comm.rollout import Request, Sample, VersionSpan
from gossamer.comm.signing import write_keys
from gossamer.comm.store import StoreError
from gossamer.comm.subscriber import Subscriber
from gossamer.launch.config import RolloutConfig
from gossamer.launch.engine_actor import EngineActor, UnfitError, joined
from tiny_run import events

EOS, PATIENCE_S = 1, 10.0
IDS = {"pad_token_id": 0, "eos_token_id": EOS}


class SteppingEngine:
    """Tokens are 10 + the version that sampled them; a prompt that begins with n ends after n.

    When all have two tokens, `between()` is called once: the test publishes there.
    """

    def __init__(self, model: dict, log: WeightLog, *, pad_id: int, eos_id: int) -> None:
        self.version, self.between, self.seen = -1, None, []

    def generate(self, requests: list[Request], is_cut=None) -> list[Sample]:
        self.seen.append([(r.prompt_ids, r.max_new_tokens, r.key) for r in requests])
        made: list[list[int]] = [[] for _ in requests]
        for step in range(max(r.max_new_tokens for r in requests)):
            if is_cut is not None and is_cut():
                break
            if step == 2 and self.between is not None:
                between, self.between = self.between, None
                between(is_cut)
                if is_cut is not None and is_cut():
                    break
            for request, tokens in zip(requests, made, strict=True):
                if len(tokens) < request.max_new_tokens and tokens[-1:] != [EOS]:
                    done = len(request.prompt_ids) - 1 + len(tokens)
                    is_last = done + 1 == request.prompt_ids[0]
                    tokens.append(EOS if is_last else 10 + self.version)
        return [
            Sample(
                request_id=r.request_id,
                token_ids=tuple(tokens),
                logprobs=(-0.5,) * len(tokens),
                spans=spans_of(tokens, self.version),
                finished=tokens[-1:] == [EOS],
            )
            for r, tokens in zip(requests, made, strict=True)
        ]

    def stage(self, version: int) -> None:
        self._staged = version

    def commit(self) -> CommitStats:
        self.version = self._staged
        return CommitStats(version=self.version, pause_s=0.0, num_changed=0)


class ForgetfulEngine(SteppingEngine):
    """As vLLM: of a request that is cut nothing is kept, but of one that is finished all."""

    def generate(self, requests: list[Request], is_cut=None) -> list[Sample]:
        return [
            sample
            if sample.finished or len(sample.token_ids) == request.max_new_tokens
            else replace(sample, token_ids=(), logprobs=(), spans=())
            for request, sample in zip(requests, super().generate(requests, is_cut), strict=True)
        ]


class FailingEngine(SteppingEngine):
    """Staging raises what `faults` holds, one after the other."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.faults, self.staged = [], []

    def stage(self, version: int) -> None:
        self.staged.append(version)
        if self.faults:
            raise self.faults.pop(0)
        super().stage(version)


class LiveEngine(FailingEngine):
    """Holds the log's bits."""

    def __init__(self, model: dict, log: WeightLog, *, pad_id: int, eos_id: int) -> None:
        super().__init__(model, log, pad_id=pad_id, eos_id=eos_id)
        self.live = LiveWeights({"a": torch.zeros(4, dtype=torch.bfloat16)})
        self._subscriber = Subscriber(log, self.live)

    def stage(self, version: int) -> None:
        self.staged.append(version)
        self._ready = self._subscriber.fetch_and_stage(version)

    def commit(self) -> CommitStats:
        return self._subscriber.commit(self._ready)

    def audit(self) -> str:
        return self.live.audit()


def spans_of(tokens: list[int], last: int) -> tuple[VersionSpan, ...]:
    """Read off the tokens; an end of sequence is the last version's."""
    versions = [last if token == EOS else token - 10 for token in tokens]
    edges = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(versions)) if a != b), len(tokens)]
    return tuple(
        VersionSpan(start=start, stop=stop, version=versions[start])
        for start, stop in pairwise(edges)
        if stop > start
    )


@pytest.fixture
def build(tmp_path):
    log = WeightLog.open(tmp_path / "log", create=True)
    publisher = Publisher(log, 0, 1, log.claim_epoch(), LogConfig())

    def publish() -> None:
        step = 0 if (head := log.head()) is None else head + 1
        values = torch.full((4,), float(step), dtype=torch.bfloat16)
        publisher.publish([Rows("a", (4,), 0, values)], step)

    publish()

    def build(
        mode: str, engine: str = "SteppingEngine", **options
    ) -> tuple[EngineActor, SteppingEngine]:
        rollout = RolloutConfig(
            engine=f"test_engine_actor:{engine}", on_new_version=mode, **options
        )
        actor = EngineActor("engine-0", str(tmp_path), rollout, IDS)
        engine = actor._engine

        def between(is_cut) -> None:
            publish()
            reached = is_cut or (lambda: engine.version == 1)
            is_waited_for = mode == "keep" or is_cut is not None
            deadline = time.monotonic() + (PATIENCE_S if is_waited_for else 0.3)
            while not reached() and time.monotonic() < deadline:
                time.sleep(0.005)

        engine.between, engine.publish, engine.log = between, publish, log
        return actor, engine

    return build


def asked() -> list[Request]:
    """Three that end after 2, 4 and 9 tokens; the last one is cut by its limit of 5."""
    return [
        Request(request_id=f"r{n}", prompt_ids=(n,), max_new_tokens=5, temperature=1.0, key=(7, n))
        for n in (2, 4, 9)
    ]


@pytest.mark.parametrize(
    ("mode", "tokens"),
    [
        ("keep", [[10, EOS], [10, 10, 11, EOS], [10, 10, 11, 11, 11]]),
        ("wait", [[10, EOS], [10, 10, 10, EOS], [10, 10, 10, 10, 10]]),
        ("recompute", [[10, EOS], [10, 10, 11, EOS], [10, 10, 11, 11, 11]]),
        ("abort", [[11, EOS], [11, 11, 11, EOS], [11, 11, 11, 11, 11]]),
    ],
)
def test_each_way_to_take_a_version(build, tmp_path, mode, tokens):
    actor, engine = build(mode)
    samples = actor.run(asked(), 0)
    assert [list(sample.token_ids) for sample in samples] == tokens
    for sample in samples:
        versions = [s.version for s in sample.spans for _ in range(s.start, s.stop)]
        assert len(versions) == len(sample.logprobs) == len(sample.token_ids)
        assert all(t in (EOS, 10 + v) for t, v in zip(sample.token_ids, versions, strict=True))
        assert len(sample.spans) == len(set(versions))
    assert [sample.finished for sample in samples] == [True, True, False]
    (event,) = [e for e in events(tmp_path, "engine") if e["what"] == "generate"]
    is_stopped = mode in ("recompute", "abort")
    assert (event["cuts"], event["dropped_tokens"]) == (int(is_stopped), 6 * (mode == "abort"))
    if mode == "recompute":  # what is left is asked behind the tokens so far, under another key
        assert engine.seen[1] == [((4, 10, 10), 3, (7, 4, 2)), ((9, 10, 10), 3, (7, 9, 2))]
    if mode == "abort":
        assert engine.seen[1] == engine.seen[0]
    deadline = time.monotonic() + PATIENCE_S
    while engine.version != 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.version == 1  # the version that waited is taken behind the unit


@pytest.mark.parametrize("mode", ["recompute", "abort"])
def test_what_was_finished_is_not_kept_where_nothing_else_is(build, tmp_path, mode):
    actor, engine = build(mode, "ForgetfulEngine")
    samples = actor.run(asked(), 0)
    assert [list(sample.token_ids) for sample in samples] == [
        [11, EOS], [11, 11, 11, EOS], [11, 11, 11, 11, 11]
    ]  # fmt: skip
    assert engine.seen[1] == engine.seen[0]
    (event,) = [e for e in events(tmp_path, "engine") if e["what"] == "generate"]
    assert (event["cuts"], event["dropped_tokens"]) == (1, 2)


def test_a_version_that_could_not_be_taken_is_looked_for_again(build, monkeypatch):
    monkeypatch.setattr("gossamer.launch.engine_actor.AGAIN_S", (0.01, 0.02))
    actor, engine = build("keep", "FailingEngine")
    assert actor.catch_up(False) == 0
    for faults in ([LogError("cut")], [ApplyError("other base"), OSError("full")]):
        engine.faults = faults
        engine.publish()
        assert actor.catch_up(False) == engine.log.head() and actor.status()[1] is None
    engine.faults = [StoreError("away")] * 9  # longer than anything else is tried
    engine.publish()
    assert actor.catch_up(False) == 3 and not engine.faults
    engine.faults = [LogError("cut")] * 9
    engine.publish()
    with pytest.raises(UnfitError, match="LogError: cut"):
        actor.catch_up(False)
    assert len(engine.faults) == 6


def test_a_store_is_not_waited_for_for_ever(build, monkeypatch):
    monkeypatch.setattr("gossamer.launch.engine_actor.AGAIN_S", (0.01,))
    monkeypatch.setattr("gossamer.launch.engine_actor.STORE_AGAIN_S", 0.1)
    actor, engine = build("keep", "FailingEngine")
    actor.catch_up(False)
    engine.faults = [StoreError("away")] * 1000
    engine.publish()
    with pytest.raises(UnfitError, match="StoreError: away"):
        actor.catch_up(False)


def test_an_unsound_fold_is_gone_round(build, monkeypatch, tmp_path):
    monkeypatch.setattr("gossamer.launch.engine_actor.AGAIN_S", (0.01,))
    actor, engine = build("keep", "LiveEngine")
    assert actor.catch_up(False) == 0
    with actor._moving:  # it sees all of it at once
        for _ in range(3):
            engine.publish()
        fold(engine.log, 0, 3)
        (ref,) = engine.log.fold(0, 3).delta
        part = tmp_path / "log" / ref.name
        part.write_bytes(part.read_bytes()[:-1] + b"!")
    assert actor.catch_up(True) == 3
    assert engine.staged == [0, 3, 1, 2, 3]


def test_a_unit_is_stopped_no_more_often_than_told(build):
    actor, engine = build("abort", max_cuts=0)
    samples = actor.run(asked(), 0)
    assert [list(s.token_ids) for s in samples][2] == [10] * 5 and len(engine.seen) == 1


def test_pieces_of_one_version_become_one_span():
    def piece(tokens, version, finished=False):
        spans = (VersionSpan(start=0, stop=len(tokens), version=version),)
        return Sample(
            request_id="a",
            token_ids=tokens,
            logprobs=(0.0,) * len(tokens),
            spans=spans,
            finished=finished,
        )

    whole = joined(joined(joined(None, piece((5, 6), 3)), piece((7,), 3)), piece((8, 1), 4, True))
    assert whole.token_ids == (5, 6, 7, 8, 1) and whole.finished
    assert [(s.start, s.stop, s.version) for s in whole.spans] == [(0, 3, 3), (3, 5, 4)]


def test_engines_that_were_given_a_key_follow_nothing_else(build, monkeypatch, tmp_path):
    monkeypatch.setattr("gossamer.launch.engine_actor.AGAIN_S", (0.01,))
    write_keys(tmp_path / "key")
    actor, engine = build("keep", public_key_path=str(tmp_path / "key.pub"))
    assert actor._log.public_key == str(tmp_path / "key.pub")  # vLLM's workers are told of it
    with pytest.raises(UnfitError, match="is not signed"):
        actor.catch_up(False)
