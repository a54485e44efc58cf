import pytest
import torch
from gossamer.comm.fold import fold
from gossamer.comm.live import ApplyError, LiveWeights
from gossamer.comm.log import LogError, WeightLog
from gossamer.comm.manifest import fold_name, total_bytes
from gossamer.comm.publisher import Publisher
from gossamer.comm.reader import read_frame, read_state
from gossamer.comm.retention import gc
from gossamer.comm.subscriber import Subscriber
from gossamer.comm.verify import verify
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_weights import CONFIG, moved, new_writer, rows_of, same_bits, toy_state, zeros


def stepped(state, seed):
    """The same 5 % of the elements, one step up: what changes, changes again and again."""
    mask_of = torch.Generator().manual_seed(7)
    after = {}
    for name, values in state.items():
        mask = torch.rand(values.shape, generator=mask_of) < 0.05
        after[name] = (values.view(torch.int16) + mask).view(torch.bfloat16)
    return after


def write(folder, versions, change=stepped, config=CONFIG):
    log, writer = new_writer(folder, config)
    states = [toy_state()]
    for step in range(versions):
        writer.publish(rows_of(states[-1]), step)
        states.append(change(states[-1], step))
    return log, writer, states


def follower_at(log, version):
    live = LiveWeights(zeros())
    subscriber = Subscriber(WeightLog.open(log.store.root), live)
    for each in range(version + 1):
        subscriber.commit(subscriber.fetch_and_stage(each))
    return live, subscriber


@settings(deadline=None, max_examples=12)
@given(data=st.data(), density=st.sampled_from([0.0, 0.001, 0.05, 0.6]))
def test_a_fold_leads_where_the_deltas_lead(tmp_path_factory, data, density):
    log, _, states = write(
        tmp_path_factory.mktemp("log"), 8, lambda state, seed: moved(state, density, seed)
    )
    first = data.draw(st.integers(0, 5))
    last = data.draw(st.integers(first + 2, 7))
    folded = fold(log, first, last)
    manifest = log.fold(first, last)
    assert folded.nbytes == total_bytes(manifest.delta)
    assert (manifest.base_version, manifest.version, manifest.step) == (first, last, last)
    live, _ = follower_at(log, first)
    live.commit(live.stage(manifest, [log.read_part(ref) for ref in manifest.delta]))
    assert live.version == last and same_bits(live.tensors, states[last])
    assert live.audit() == log.manifest(last).state_hash


def test_what_changed_often_is_sent_once(tmp_path):
    log, _, states = write(tmp_path, 4)
    live, lagging = follower_at(log, 0)
    folded = fold(log, 0, 3)
    assert folded.name == fold_name(0, 3) == "fold-00000000-00000003.json"
    assert folded.delta_bytes == sum(total_bytes(log.manifest(v).delta) for v in (1, 2, 3))
    assert folded.nbytes < 0.6 * folded.delta_bytes
    read = lagging.fetched_bytes
    assert lagging.next_version() == 3
    assert lagging.catch_up() == 3
    assert lagging.fetched_bytes - read == folded.nbytes
    assert same_bits(live.tensors, states[3])


def test_the_cheapest_way_is_taken(tmp_path):
    log, writer, states = write(tmp_path, 7, lambda state, seed: moved(state, 0.02, seed))
    fold(log, 1, 5)
    bytes_of = [total_bytes(log.manifest(version).delta) for version in range(7)]
    for start, stops in [(0, [1, 5, 6]), (1, [5, 6]), (2, [3, 4, 5, 6]), (5, [6])]:
        live, lagging = follower_at(log, start)
        taken = []
        while (version := lagging.next_version()) is not None:
            lagging.commit(lagging.fetch_and_stage(version))
            taken.append(version)
        assert taken == stops
        assert same_bits(live.tensors, states[6])
    assert log.hop(1, 5).kind == "fold" and log.hop(1, 5).nbytes < sum(bytes_of[2:6])
    assert log.hop(4, 5).kind == "delta"
    assert log.hop(2, 5) is None and log.hop(None, 5) is None
    assert log.hop(3, 4).kind == "delta" and log.hop(2, 4).kind == "anchor"


def test_where_an_anchor_is_smaller_than_the_deltas_it_is_taken(tmp_path):
    log, _, states = write(tmp_path, 6, lambda state, seed: moved(state, 0.9, seed))
    live, lagging = follower_at(log, 0)
    assert lagging.next_version() == 4 and log.hop(0, 4).kind == "anchor"
    assert lagging.catch_up() == 5
    assert same_bits(live.tensors, states[5])


def test_a_fold_outlives_the_deltas_that_it_stands_for(tmp_path):
    log, _, states = write(tmp_path, 6)
    live, lagging = follower_at(log, 1)
    fold(log, 1, 5)
    fold(log, 0, 2)
    anchor = total_bytes(log.manifest(4).anchor)
    gc(log, 1, grace_s=0)
    assert log.folds() == [(1, 5)] and WeightLog.open(tmp_path).versions() == [4, 5]
    read = lagging.fetched_bytes
    assert lagging.catch_up() == 5
    assert lagging.fetched_bytes - read < anchor
    assert same_bits(live.tensors, states[5])


def test_a_fold_may_go_over_a_takeover(tmp_path):
    log, _, states = write(tmp_path, 3)
    branch = moved(states[1], 0.05, 50)
    heir = Publisher(log, config=CONFIG, takeover=True)
    heir.publish(rows_of(states[1]), 1, rewind_to_step=1)
    heir.publish(rows_of(branch), 2)
    fold(log, 1, 4)
    live, lagging = follower_at(log, 1)
    assert lagging.next_version() == 4 and lagging.catch_up() == 4
    assert same_bits(live.tensors, branch)


def test_a_fold_that_is_wrong_is_refused_and_one_that_is_broken_is_not_needed(tmp_path):
    log, _, states = write(tmp_path, 4)
    with pytest.raises(ValueError, match="a fold spans at least two versions, not 2 to 3"):
        fold(log, 2, 3)
    with pytest.raises(LogError, match="manifest-00000009.json is missing"):
        fold(log, 0, 9)
    fold(log, 0, 3)
    with pytest.raises(LogError, match="fold-00000000-00000003.json exists already"):
        fold(log, 0, 3)
    assert verify(log, replay=True).faults == []
    path = tmp_path / fold_name(0, 3)
    text = path.read_text()
    (tmp_path / fold_name(1, 3)).write_text(text)  # another's under this name
    live, lagging = follower_at(log, 1)
    with pytest.raises(LogError, match="fold-00000001-00000003.json goes on version 0"):
        log.fold(1, 3)
    assert lagging.next_version() == 2  # as if it were not there
    with pytest.raises(ApplyError, match="goes on version 0"):
        live.stage(log.fold(0, 3), [log.read_part(log.fold(0, 3).delta[0])])
    state_hash = log.manifest(3).state_hash
    path.write_text(text.replace(state_hash, "0" * 16))
    live, lagging = follower_at(log, 0)
    with pytest.raises(ApplyError, match=f"would leave state hash {state_hash}"):
        lagging.catch_up()
    assert live.version == 0 and same_bits(live.tensors, states[0])
    assert lagging.catch_up() == 3 and same_bits(live.tensors, states[3])  # by the deltas
    assert any(
        "leads to another state" in fault for fault in verify(WeightLog.open(tmp_path)).faults
    )


def test_the_frame_of_a_fold_says_what_it_is(tmp_path):
    log, _, _ = write(tmp_path, 4)
    fold(log, 1, 3)
    frame = read_frame(log, log.fold(1, 3).delta[0])
    assert (frame.kind, frame.base_version, frame.version, frame.num_parts) == ("delta", 1, 3, 1)
    assert frame.base_state_hash == log.manifest(1).state_hash
    assert same_bits(read_state(log), read_state(log, 3))
