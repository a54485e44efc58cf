import importlib
import shutil

import pytest
import torch
from gossamer.comm.engines.images import Scatter
from gossamer.comm.engines.pieces import LayoutError
from gossamer.comm.live import ApplyError
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher
from gossamer.comm.signing import Signer, write_keys
from tiny_models import EOS, MODELS, SMALL, Trained, answers, answers_of_llm, requests, start_llm
from vllm_here import VLLM, vllm_here  # noqa: F401

pytestmark = [*VLLM, pytest.mark.usefixtures("vllm_here")]
GOSSAMER = {"backend": "gossamer"}


def build(trained):
    module = importlib.import_module("gossamer.comm.engines.vllm_offline")
    return module.VLLMEngine(trained.config, trained.log, pad_id=0, eos_id=EOS, options=SMALL)


def worker_of(llm_engine):
    return llm_engine.model_executor.driver_worker.worker


def follow(engine, version):
    engine.stage(version)
    return engine.commit()


def at_head(trained):
    """An engine at the newest version, one that is newer, and the number of both."""
    engine, version = build(trained), None
    while (following := trained.log.next_version(version)) is not None:
        version = follow(engine, following).version
    trained.step()
    return engine, version, version + 1


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return Trained("qwen3_moe", tmp_path_factory.mktemp("qwen3_moe"))


@pytest.mark.parametrize("name", MODELS)
def test_after_20_deltas_it_answers_as_one_that_was_started_on_the_checkpoint(name, tmp_path):
    trained = Trained(name, tmp_path)
    engine = build(trained)
    follow(engine, 0)
    first = answers(engine.generate(requests()))
    for version in range(1, 21):
        trained.step()
        stats = follow(engine, version)
        manifest = trained.log.manifest(version)
        assert (stats.version, stats.num_changed) == (version, manifest.num_changed)
        assert engine.audit() == manifest.state_hash
    last = answers(engine.generate(requests()))
    assert last != first and len(last[0][0]) == 24
    folder = trained.save()
    assert last == answers_of_llm(start_llm(folder, weight_transfer_config=GOSSAMER))
    # and as a vLLM that has nothing of ours, but for the rounding of its packed linear layers
    plain = answers_of_llm(start_llm(folder))
    assert [tokens for tokens, _ in last] == [tokens for tokens, _ in plain]
    logprobs = ([logprob for _, logprobs in each for logprob in logprobs] for each in (last, plain))
    torch.testing.assert_close(*map(torch.tensor, logprobs), atol=0.05, rtol=0)


def test_a_commit_that_fails_half_way_leaves_the_old_answers(trained, monkeypatch):
    engine, _, new = at_head(trained)
    before, state = answers(engine.generate(requests())), engine.audit()
    engine.stage(new)
    writes, write = [], Scatter.write

    def fail_at_the_tenth(self, positions, start, patterns):
        writes.append(start)
        if len(writes) == 10:
            raise MemoryError("injected")
        write(self, positions, start, patterns)

    with monkeypatch.context() as patch:
        patch.setattr(Scatter, "write", fail_at_the_tenth)
        with pytest.raises(MemoryError, match="injected"):
            engine.commit()
    assert len(writes) > 15  # those that went before were undone
    assert engine.audit() == state and answers(engine.generate(requests())) == before
    assert follow(engine, new).num_changed > 0
    assert answers(engine.generate(requests())) != before


def test_a_rank_that_moved_its_weights_is_not_written(trained):
    engine, old, new = at_head(trained)
    engine.stage(new)
    norm = worker_of(engine._engine).get_model().model.norm.weight
    whole, norm.data = norm.data, norm.data.clone()
    with pytest.raises(LayoutError, match="model.norm.weight is not where it was"):
        engine.commit()
    norm.data = whole
    assert all(each.spans[0].version == old for each in engine.generate(requests()))


def test_what_is_forged_behind_the_driver_is_refused_by_the_workers(tmp_path):
    trained = Trained("qwen3_moe", tmp_path)
    write_keys(tmp_path / "key")
    honest, forged = tmp_path / "signed", tmp_path / "forged"
    log = WeightLog.open(honest, create=True)
    trained.publisher = Publisher(log, signer=Signer.from_file(tmp_path / "key"))
    trained.publish()
    trained.log = WeightLog.open(honest, public_key=tmp_path / "key.pub")
    engine = build(trained)
    follow(engine, 0)
    shutil.copytree(honest, forged)
    trained.step()
    assert trained.log.next_version(0) == 1  # read and believed
    trained.publisher = Publisher(WeightLog.open(forged), takeover=True)
    trained.step()
    shutil.copytree(forged, honest, dirs_exist_ok=True)
    before = engine.audit()
    with pytest.raises(ApplyError, match="manifest-00000001.json is not signed"):
        engine.stage(1)
    assert engine.audit() == before == trained.log.manifest(0).state_hash


def test_a_sample_that_a_commit_meets_names_both_versions(trained):
    engine, old, new = at_head(trained)
    engine.stage(new)
    step, steps = engine._engine.step, []

    def commit_at_the_eighth():
        steps.append(None)
        if len(steps) == 8:
            engine._turn_lock.release()  # as the thread that commits would find it
            engine.commit()
            engine._turn_lock.acquire()
        return step()

    engine._engine.step = commit_at_the_eighth
    for sample in engine.generate(requests()):
        spans = [(span.start, span.stop, span.version) for span in sample.spans]
        assert spans == [(0, 7, old), (7, 24, new)]


def test_vllms_own_llm_follows_a_log(trained):
    llm = start_llm(trained.save(), weight_transfer_config=GOSSAMER, load_format="dummy")
    llm.init_weight_transfer_engine({"init_info": {"log_url": trained.log.url}})
    version = trained.log.newest_anchor()
    while version is not None:
        llm.start_weight_update()
        llm.update_weights({"update_info": {"version": version}})
        llm.finish_weight_update(weight_version=f"{version}")
        version = trained.log.next_version(version)
    assert llm.get_weight_version() == f"{trained.log.head()}"
    (audit,) = llm.collective_rpc("gossamer_audit")
    assert audit["state_hash"] == trained.log.manifest(trained.log.head()).state_hash
    (status,) = llm.collective_rpc("gossamer_status")
    assert status["version"] == trained.log.head() and not status["updating"]
    with pytest.raises(ValueError, match="Invalid init_info"):
        llm.init_weight_transfer_engine({"init_info": {"url": "x"}})


def test_engines_with_another_backend_are_left_alone(trained):
    llm = start_llm(trained.save())
    (worker,) = llm.collective_rpc(lambda worker: worker)
    linear = [each for name, each in worker.get_model().named_parameters() if "o_proj" in name]
    assert len(linear) == 2 and all(
        each.numel() == 0 for each in linear
    )  # vLLM packs linear weights and drops them
    assert worker.weight_transfer_engine is None
    runtime_of = importlib.import_module("gossamer.comm.engines.vllm").runtime_of
    with pytest.raises(LayoutError, match="was not loaded by a loader that is followed"):
        runtime_of(worker.get_model())


def test_experts_are_repacked_and_latent_attention_is_refused(trained):
    plug_in = importlib.import_module("gossamer.comm.engines.vllm")
    plug_in.register()  # once more, as a second engine in the process would
    attention = importlib.import_module("vllm.model_executor.layers.attention")
    engine = build(trained)
    follow(engine, trained.log.newest_anchor())
    model = worker_of(engine._engine).get_model()
    runtime = plug_in.runtime_of(model)
    name = "model.layers.0.mlp.experts.routed_experts.w2_weight"
    assert any(each.load_shapes.get(name) == (4, 64, 40) for each in runtime.packed)
    assert runtime.tensors[name].shape == (4, 64, 64)

    class Latent(attention.MLAAttention):
        def __init__(self):
            torch.nn.Module.__init__(self)

    model.latent = Latent()
    with pytest.raises(LayoutError, match="latent: latent attention keeps copies"):
        plug_in.runtime_of(model)
