import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from gossamer.comm.live import ApplyError, LiveWeights
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher, Rows
from gossamer.comm.subscriber import Subscriber
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_weights import CONFIG, SHAPES, moved, new_writer, rows_of, same_bits, toy_state, zeros

UP = "model.layers.0.mlp.experts.1.down_proj.weight"
NORM = "model.norm.weight"


def copy_of(live):
    return {name: tensor.clone() for name, tensor in live.tensors.items()}


@pytest.fixture
def states():
    first = toy_state()
    second = moved(first, 0.3, 1)
    return [first, second, moved(second, 0.3, 2)]


@pytest.fixture
def log(tmp_path, states):
    log, writer = new_writer(tmp_path)
    for step, state in enumerate(states):
        writer.publish(rows_of(state), step)
    return log


def frames_of(log, version, kind="delta"):
    return [log.read_part(ref) for ref in getattr(log.manifest(version), kind)]


def live_at(log, version):
    live = LiveWeights(zeros())
    subscriber = Subscriber(log, live)
    for each in range(version + 1):
        subscriber.commit(subscriber.fetch_and_stage(each))
    return live


@settings(deadline=None, max_examples=15)
@given(density=st.sampled_from([0.0, 0.001, 0.05, 0.4, 1.0]), seed=st.integers(0, 10**6))
def test_live_bits_are_the_trainers_bits(tmp_path_factory, density, seed):
    log, writer = new_writer(tmp_path_factory.mktemp("log"))
    live, state = LiveWeights(zeros()), toy_state(seed)
    for step in range(3):
        published = writer.publish(rows_of(state), step)
        assert Subscriber(log, live).catch_up() == step
        assert same_bits(live.tensors, state)
        assert live.audit() == log.manifest(step).state_hash
        assert published.frame_bytes == sum(
            len(frame) for frame in frames_of(log, step, "delta" if step else "anchor")
        )
        state = moved(state, density, seed + step)


def test_dtypes_and_odd_shapes_apply(tmp_path):
    shapes = {
        torch.float32: (70, 3), torch.float16: (5, 4, 3), torch.uint8: (9,),
        torch.float8_e4m3fn: (130, 2), torch.int32: (),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    log, writer = new_writer(tmp_path)
    live = LiveWeights({str(each): torch.zeros(shapes[each], dtype=each) for each in shapes})
    for step in range(3):
        rows = []
        for dtype, shape in shapes.items():
            count = int(np.prod(shape)) * dtype.itemsize
            raw = torch.from_numpy(rng.integers(0, 256, count, np.uint8))
            rows.append(Rows(str(dtype), shape, 0, raw.view(dtype).reshape(shape)))
        writer.publish(rows, step)
        Subscriber(log, live).catch_up()
        for each in rows:
            got, sent = (
                tensor.reshape(-1).view(torch.uint8)
                for tensor in (live.tensors[each.name], each.values)
            )
            assert torch.equal(got, sent)


def test_a_run_larger_than_the_bound_is_split(tmp_path):
    shape = (5000, 300)
    log, writer = new_writer(tmp_path)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    live = LiveWeights({"w": torch.zeros(shape, dtype=torch.bfloat16)})
    for step in range(2):
        writer.publish([Rows("w", shape, 0, values)], step)
        Subscriber(log, live).catch_up()
        assert torch.equal(live.tensors["w"], values)
        values[4000:, ::7] *= 1.5
    assert live.audit() == log.manifest(1).state_hash


def test_views_on_fused_storage_are_written_in_place(log, states):
    fused = torch.zeros(2, 64, 40, dtype=torch.bfloat16)
    tensors = zeros()
    for expert in range(2):
        tensors[f"model.layers.0.mlp.experts.{expert}.down_proj.weight"] = fused[expert]
    Subscriber(log, LiveWeights(tensors)).catch_up()
    assert torch.equal(fused[1].view(torch.int16), states[2][UP].view(torch.int16))


def test_staging_changes_nothing(log):
    live = live_at(log, 0)
    before = copy_of(live)
    staged = live.stage(log.manifest(1), frames_of(log, 1))
    assert same_bits(live.tensors, before) and live.version == 0
    stats = live.commit(staged)
    assert (stats.version, stats.num_changed) == (1, log.manifest(1).num_changed)
    assert 0 < stats.num_changed < log.manifest(1).num_elements


def test_a_delta_on_the_wrong_base_is_refused(log):
    live = live_at(log, 0)
    before = copy_of(live)
    with pytest.raises(ApplyError, match="version 2 goes on version 1 with state .*live is vers"):
        live.stage(log.manifest(2), frames_of(log, 2))
    with pytest.raises(ApplyError, match="live is version None"):
        LiveWeights(zeros()).stage(log.manifest(1), frames_of(log, 1))
    with pytest.raises(ApplyError, match="version 2 goes on version 1 and holds no anchor"):
        Subscriber(log, live).fetch_and_stage(2)
    assert same_bits(live.tensors, before) and live.version == 0


def test_a_base_of_the_same_number_but_other_bytes_is_refused(log, tmp_path, states):
    other = WeightLog.open(tmp_path / "other", run_id=log.run_id, create=True)
    Publisher(other, 0, 1, other.claim_epoch(), CONFIG).publish(rows_of(states[1]), 0)
    live = live_at(other, 0)
    with pytest.raises(ApplyError, match="goes on version 0 with state hash"):
        live.stage(log.manifest(1), frames_of(log, 1))


def test_a_live_bit_that_flipped_is_found(log):
    live = live_at(log, 0)
    live.tensors[UP].view(torch.int16)[:] ^= 1
    assert live.differing() == [UP]
    with pytest.raises(ApplyError, match=f"not those of version 0: {UP}$|a block of {UP} "):
        live.stage(log.manifest(1), frames_of(log, 1))
    assert live.audit() != log.manifest(0).state_hash


def test_replay_is_harmless(log, states):
    live = live_at(log, 0)
    staged = live.stage(log.manifest(1), frames_of(log, 1))
    live.commit(staged)
    assert live.commit(staged).num_changed == 0
    again = live.stage(log.manifest(1), frames_of(log, 1))
    assert live.commit(again).num_changed == 0
    assert same_bits(live.tensors, states[1]) and live.version == 1


def test_what_was_staged_on_another_version_is_not_committed(log, states):
    live = live_at(log, 0)
    first = live.stage(log.manifest(1), frames_of(log, 1))
    anchor = live_at(log, 1)
    stale = live.stage(log.manifest(1), frames_of(log, 1))
    live.commit(first)
    live.commit(live.stage(log.manifest(2), frames_of(log, 2)))
    with pytest.raises(ApplyError, match="was staged on version 0, but version 2 is live"):
        live.commit(stale)
    assert same_bits(live.tensors, states[2]) and same_bits(anchor.tensors, states[1])


@pytest.mark.parametrize("kind", ["delta", "anchor"])
@pytest.mark.parametrize("broken", ["shrunk", "recast"])
def test_a_commit_that_fails_half_way_puts_every_bit_back(log, kind, broken):
    """The norm, the last tensor, stops being what it was between stage and commit."""
    live = live_at(log, 0)
    version = 1 if kind == "delta" else 4
    if kind == "anchor":  # of a writer that took over: it goes on any version
        state = moved(toy_state(5), 0.9, 5)
        heir = Publisher(log, 0, 1, log.claim_epoch(takeover=True), CONFIG)
        version = heir.publish(rows_of(state), 9).version
    staged = live.stage(log.manifest(version), frames_of(log, version, kind))
    before, norm = copy_of(live), live.tensors[NORM]
    whole = norm.data
    norm.data = whole[:5] if broken == "shrunk" else whole.float()
    with pytest.raises(ApplyError, match=f"live tensor {NORM}"):
        live.commit(staged)
    norm.data = whole
    assert same_bits(live.tensors, before) and live.version == 0
    live.commit(staged)  # and nothing stands in the way of another try
    assert live.audit() == log.manifest(version).state_hash
    assert live.rollback() == 0
    assert same_bits(live.tensors, before) and live.audit() == log.manifest(0).state_hash
    with pytest.raises(ApplyError, match="version 0 has no commit to be rolled back"):
        live.rollback()


def test_a_first_load_that_fails_leaves_no_version_live(log, states):
    live = LiveWeights(zeros())
    staged = live.stage(log.manifest(0), frames_of(log, 0, "anchor"))
    assert not staged.changes  # no second copy of the model
    norm = live.tensors[NORM]
    whole = norm.data
    norm.data = whole[:5]
    with pytest.raises(ApplyError, match=f"live tensor {NORM}"):
        live.commit(staged)
    norm.data = whole
    assert live.version is None
    live.commit(staged)
    assert same_bits(live.tensors, states[0]) and live.audit() == log.manifest(0).state_hash


class Copy:
    """A mirror that may fail half-way."""

    def __init__(self, image):
        self.low = image.view(torch.int16).view(-1).clone().numpy().view(np.uint16)
        self.fails, self.settled = False, 0

    def write(self, positions, start, patterns):
        where = slice(start, start + len(patterns)) if positions is None else start + positions
        half = len(patterns) // 2
        if self.fails:
            self.fails = False
            some = where[:half] if positions is not None else slice(start, start + half)
            self.low[some] = patterns[:half]
            raise OSError("the device is gone")
        self.low[where] = patterns

    def settle(self):
        self.settled += 1

    def read(self, start, stop):
        return self.low[start:stop].copy()


def test_a_mirror_follows_and_is_put_back(log, states):
    tensors = zeros()
    mirror = Copy(tensors[UP])
    live = LiveWeights(tensors, {UP: mirror}, num_threads=2)
    subscriber = Subscriber(log, live)
    subscriber.commit(subscriber.fetch_and_stage(0))
    before, copy = mirror.low.copy(), copy_of(live)
    staged = subscriber.fetch_and_stage(1)
    mirror.fails = True
    with pytest.raises(OSError, match="the device is gone"):
        live.commit(staged)
    assert np.array_equal(mirror.low, before) and same_bits(live.tensors, copy)
    live.commit(staged)
    assert live.audit() == log.manifest(1).state_hash and same_bits(live.tensors, states[1])
    mirror.low[3] ^= 1
    assert live.audit() != log.manifest(1).state_hash and live.differing() == [UP]
    mirror.low[3] ^= 1
    live.rollback()
    assert np.array_equal(mirror.low, before) and mirror.settled == 4


def test_tensors_that_do_not_fit_are_named(log):
    for name, tensor, message in [
        (NORM, torch.zeros(25, dtype=torch.bfloat16), rf"{NORM} is bfloat16 \(24,\) in the log"),
        (UP, torch.zeros(64, 40), rf"{UP} is bfloat16 .* in the log, float32"),
        ("extra", torch.zeros(3), "does not hold every live tensor once: extra is missing"),
        (UP, None, f"the log holds tensor {UP}, which is not among the live ones"),
    ]:
        tensors = zeros() | {name: tensor}
        if tensor is None:
            del tensors[name]
        with pytest.raises(ApplyError, match=message):
            Subscriber(log, LiveWeights(tensors)).catch_up()
    with pytest.raises(ApplyError, match="live tensor w: expected a contiguous CPU tensor"):
        LiveWeights({"w": torch.zeros(4, 6).T})


def test_frames_of_other_versions_are_refused(log):
    live = live_at(log, 0)
    for frames in ([], frames_of(log, 2), frames_of(log, 0, "anchor"), frames_of(log, 1) * 2):
        with pytest.raises(ApplyError, match="are not the (delta|anchor) parts of version 1"):
            live.stage(log.manifest(1), frames)
    forged = replace(log.manifest(1), state_hash="0" * 64)
    with pytest.raises(ApplyError, match="would leave state hash"):
        live.stage(forged, frames_of(log, 1))
    with pytest.raises(ApplyError, match="live weights are of run"):
        live.stage(replace(log.manifest(1), run_id="other"), frames_of(log, 1))


def test_an_anchor_heals_live_tensors(log, states):
    live = live_at(log, 0)
    live.tensors[UP].zero_()
    assert live.stage(log.manifest(0), frames_of(log, 0, "anchor")).num_changed == 0  # believed
    live.version = None
    Subscriber(log, live).catch_up()
    assert same_bits(live.tensors, states[2])
    assert set(live.tensors) == set(SHAPES)


def test_a_receiver_holds_no_second_model(tmp_path):
    """Peak memory of stage and commit against the model's bytes: an anchor, then 1 % changed."""
    shape, names = (2048, 512), [f"layers.{i}.w" for i in range(8)]
    generator = torch.Generator().manual_seed(0)
    masters = {name: torch.randn(shape, generator=generator) * 0.02 for name in names}
    log, writer = new_writer(tmp_path)
    writer.publish({name: values.bfloat16() for name, values in masters.items()}, 0)
    for values in masters.values():
        values += 2.5e-7 * torch.randn(shape, generator=generator)
    published = writer.publish({name: values.bfloat16() for name, values in masters.items()}, 1)
    assert 0.005 < published.num_changed / published.num_elements < 0.02
    live = LiveWeights({name: torch.zeros(shape, dtype=torch.bfloat16) for name in names})
    for version, kind, most in ((0, "anchor", 0.3), (1, "delta", 0.1)):
        frames = frames_of(log, version, kind)
        tracemalloc.start()
        live.commit(live.stage(log.manifest(version), frames))
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < most * published.full_bytes
    assert live.audit() == log.manifest(1).state_hash
