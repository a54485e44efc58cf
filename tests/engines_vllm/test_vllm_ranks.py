"""Two ranks, each in a process of its own. vLLM 0.32's CPU kernel crashes where experts are dealt
out whole (with or without us), so such an engine is only followed and audited, not asked."""

import importlib

import pytest
from tiny_models import EOS, SMALL, Trained, answers, requests
from vllm_here import SETTINGS, VLLM

pytestmark = [*VLLM, pytest.mark.slow, pytest.mark.timeout(300)]
TWO_RANKS = {**SMALL, "tensor_parallel_size": 2}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in (SETTINGS | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}).items():
        monkeypatch.setenv(name, value)


def build(trained, options):
    module = importlib.import_module("gossamer.comm.engines.vllm_offline")
    return module.VLLMEngine(trained.config, trained.log, pad_id=0, eos_id=EOS, options=options)


def move_norm(worker, rank):
    """Gives a rank's norm another place in memory; or its old one."""
    if worker.rank == rank:
        norm = worker.get_model().model.norm.weight
        worker.kept, norm.data = norm.data, getattr(worker, "kept", norm.data.clone())


def follow(engine, trained, versions):
    for version in versions:
        engine.stage(version)
        engine.commit()
        assert engine.audit() == trained.log.manifest(version).state_hash


def test_two_ranks_follow_and_go_back_together(tmp_path):
    trained = Trained("qwen3_moe", tmp_path)
    engine = build(trained, TWO_RANKS)
    for _ in range(4):
        trained.step()
    follow(engine, trained, range(4))
    before = answers(engine.generate(requests()))
    engine.stage(4)
    engine._engine.collective_rpc(move_norm, args=(1,))
    with pytest.raises(RuntimeError, match="model.norm.weight is not where it was"):
        engine.commit()
    engine._engine.collective_rpc(move_norm, args=(1,))
    assert engine.audit() == trained.log.manifest(3).state_hash
    assert answers(engine.generate(requests())) == before
    follow(engine, trained, [4])
    last = answers(engine.generate(requests()))
    engine.close()

    fresh = build(trained, {**TWO_RANKS, "model": trained.save(), "load_format": "auto"})
    fresh._version = 4
    fresh._engine.set_weight_version("4")
    assert answers(fresh.generate(requests())) == last != before
    fresh.close()


def test_ranks_that_hold_experts_of_their_own_follow(tmp_path):
    trained = Trained("qwen3_moe", tmp_path)
    engine = build(trained, {**TWO_RANKS, "enable_expert_parallel": True})
    for _ in range(3):
        trained.step()
    follow(engine, trained, range(4))
    engine.close()
