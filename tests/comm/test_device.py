"""The device path on CPU tensors: the same frames as the host path, and a mirror that follows."""

import numpy as np
import pytest
import torch
from gossamer.comm.codec import part as part_module
from gossamer.comm.device import DeviceMirror, find_changed_on_device, integer_view
from gossamer.comm.live import LiveWeights
from gossamer.comm.subscriber import Subscriber
from toy_weights import SHAPES, moved, new_writer, rows_of, same_bits, toy_state, zeros


def test_a_device_finds_what_the_host_finds(tmp_path, monkeypatch):
    """Three versions, their frames byte for byte, but for the run's name."""
    frames = []
    for on_device in (False, True):
        monkeypatch.setattr(part_module, "is_on_device", lambda tensor, flag=on_device: flag)
        encoder = part_module.PartEncoder()
        state, found = toy_state(), []
        for version in range(3):
            part = encoder.encode(rows_of(state), with_delta=version > 0, with_anchor=version == 0)
            encoder.move_base(part)
            runs = part.delta if version else part.anchor
            found.append([(run.name, run.codec, bytes(run.payload)) for run in runs])
            found.append([part.delta_gain, part.anchor_gain])
            state = moved(state, 0.1, version)
        frames.append(found)
    assert frames[0] == frames[1]


def test_a_mirror_on_a_device_follows(tmp_path):
    log, writer = new_writer(tmp_path)
    states = [toy_state()]
    states += [moved(states[0], 0.2, 1), moved(states[0], 0.9, 2)]
    there = zeros()
    live = LiveWeights(zeros(), {name: DeviceMirror(tensor) for name, tensor in there.items()})
    for step, state in enumerate(states):
        writer.publish(rows_of(state), step)
        Subscriber(log, live).catch_up()
        assert same_bits(there, state) and live.audit() == log.manifest(step).state_hash
    assert live.rollback() == 1 and same_bits(there, states[1])
    name = next(iter(SHAPES))
    there[name].view(torch.int16)[0] ^= 1
    assert live.differing() == [name]


def test_views_are_of_bits_and_contiguous():
    old = torch.tensor([0.0, float("nan"), 1.0])
    new = torch.tensor([-0.0, float("nan"), 1.0])
    positions, before, after = find_changed_on_device(integer_view(old), integer_view(new))
    assert positions.tolist() == [0] and before.tolist() == [0] and after.tolist() == [2**31]
    assert positions.dtype == np.uint32
    with pytest.raises(ValueError, match="expected a contiguous tensor of elements of 1, 2 or 4"):
        integer_view(torch.zeros(3, dtype=torch.float64))
