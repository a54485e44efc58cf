"""The contract of --custom-weight-loader, as SGLang documents it: in each worker it imports the
function by its path and calls it with the model and a list of (name, tensor)."""

from importlib import import_module

import pytest
import torch
from gossamer.comm.codec.part import Rows
from gossamer.comm.config import LogConfig
from gossamer.comm.device import integer_view
from gossamer.comm.engines.sglang import payload, take_back
from gossamer.comm.live import ApplyError
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher
from served_model import ServedModel, checkpoint, loaded

LOADER = "gossamer.comm.engines.sglang.load"


class Workers:
    """What a server does with an /update_weights_from_tensor whose load_format is LOADER."""

    def __init__(self, ranks):
        self.models = [ServedModel(rank, ranks) for rank in range(ranks)]

    def update(self, named_tensors):
        module, _, name = LOADER.rpartition(".")
        results = []
        for model in self.models:
            try:
                getattr(import_module(module), name)(model, list(named_tensors))
                results.append(True)
            except Exception:
                results.append(False)
        return all(results)

    def are_at(self, state):
        expected = [loaded(state, rank, len(self.models)) for rank in range(len(self.models))]
        return all(
            torch.equal(integer_view(tensor), integer_view(weights[name]))
            for model, weights in zip(self.models, expected, strict=True)
            for name, tensor in model.state().items()
        )


@pytest.fixture
def log(tmp_path):
    """Four versions; an anchor at 0 and at 3."""
    log = WeightLog.open(tmp_path, create=True)
    publisher = Publisher(log, config=LogConfig(anchor_every_versions=3))
    for version in range(4):
        rows = [Rows(name, tuple(t.shape), 0, t) for name, t in checkpoint(version).items()]
        publisher.publish(rows, step=version)
    return log


@pytest.mark.parametrize("ranks", [1, 2])
def test_workers_hold_what_the_loader_would_have_left(log, ranks):
    workers = Workers(ranks)
    for live, version in [(None, 0), (0, 1), (1, 2), (2, 3)]:
        tensors = payload(log, live, version)
        assert all(tensor.dtype == torch.uint8 and tensor.dim() == 1 for _, tensor in tensors)
        assert workers.update(tensors)
        assert workers.are_at(checkpoint(version))
    assert workers.update(payload(log, 2, 3)) and workers.are_at(checkpoint(3))  # a replay


def test_a_rank_that_fails_takes_the_others_back(log):
    workers = Workers(2)
    assert workers.update(payload(log, None, 0)) and workers.update(payload(log, 0, 1))
    norm = workers.models[1].norm
    whole, norm.data = norm.data, norm.data.clone()
    assert not workers.update(payload(log, 1, 2))
    norm.data = whole
    assert not workers.are_at(checkpoint(1)) and not workers.are_at(checkpoint(2))
    assert workers.update(take_back()) and workers.are_at(checkpoint(1))
    assert workers.update(take_back()) and workers.are_at(checkpoint(1))  # once only
    assert workers.update(payload(log, 1, 2)) and workers.are_at(checkpoint(2))


def test_a_damaged_payload_changes_nothing(log):
    workers = Workers(2)
    assert workers.update(payload(log, None, 0))
    damaged = payload(log, 0, 1)
    damaged[1][1][-5] ^= 1
    assert not workers.update(damaged) and workers.are_at(checkpoint(0))
    assert workers.update(payload(log, 0, 1)) and workers.are_at(checkpoint(1))


def test_what_is_no_payload_is_refused(log):
    model = ServedModel()
    load = import_module("gossamer.comm.engines.sglang").load
    with pytest.raises(ApplyError, match="expected a tensor gossamer.manifest, got a"):
        load(model, [("a", torch.zeros(1))])
    with pytest.raises(ApplyError, match="the first payload must be an anchor"):
        load(model, payload(log, 0, 1))
    with pytest.raises(ApplyError, match="no frames"):
        payload(log, 0, 2)
    load(model, payload(log, None, 0))
    with pytest.raises(ApplyError, match="goes on version 1"):
        load(model, payload(log, 1, 2))
    assert model.norm.equal(checkpoint(0)["model.norm.weight"])
