"""What someone with a trainer of his own sees of a publisher."""

import re
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gossamer.comm.log import LogError, WeightLog
from gossamer.comm.manifest import part_name
from gossamer.comm.publisher import PartTimeoutError, Publisher
from gossamer.comm.reader import read_state
from gossamer.comm.wire import pack_frame, unpack_frame
from toy_weights import CONFIG, moved, new_writer, rows_of, toy_state

HASTY = replace(CONFIG, part_timeout_s=0.05)

PARTS = ("export_s", "find_s", "encode_s", "put_s", "wait_s")


def test_times_are_told_apart(tmp_path):
    """Each of the five is where its work is done, and together they are the whole."""
    log, writer = new_writer(tmp_path)
    state = toy_state()
    writer.publish(rows_of(state), 0)
    store, put = log.store, log.store.put

    def slow_rows():
        for rows in rows_of(moved(state, 0.1, 1)):
            time.sleep(0.01)
            yield rows

    def slow_put(name, data, overwrite=False):
        time.sleep(0.05 if name.startswith("parts/") else 0.02)
        return put(name, data, overwrite)

    store.put = slow_put
    # a busy machine may take the thread away at any moment, but not each time
    for step in range(1, 41):
        started_s = time.perf_counter()
        published = writer.publish(slow_rows(), step)
        whole_s = time.perf_counter() - started_s
        told_s = [getattr(published, part) for part in PARTS]
        if whole_s - sum(told_s) <= 0.02 and max(told_s[:3]) < 0.5:
            break
    assert 0.06 <= published.export_s < 0.5
    assert 0.05 <= published.put_s and 0.04 <= published.wait_s  # a manifest and HEAD
    assert 0 < published.find_s < 0.5 and 0 < published.encode_s < 0.5
    assert sum(getattr(published, part) for part in PARTS) == pytest.approx(whole_s, abs=0.02)


def test_whole_tensors_by_name_need_no_rows(tmp_path):
    """A trainer of one's own: any dtype, any layout, its tensors gone on by the next step."""
    weights = {
        "norm": torch.randn(24),
        "router.bias": torch.tensor(3.5, dtype=torch.float16),
        "experts": torch.randn(6, 10, 8).bfloat16(),
        "transposed": torch.randn(70, 40).bfloat16().t(),
        "packed": torch.randint(-128, 127, (130, 8), dtype=torch.int8),
    }
    parameter = torch.nn.Parameter(weights["norm"])
    log = WeightLog.open(tmp_path, create=True)
    publisher = Publisher(log)
    assert publisher.publish({**weights, "norm": parameter}, step=0).kind == "anchor"
    for step in range(1, 3):
        parameter.data[step] += 1
        weights["packed"][step] ^= 5
        assert publisher.publish(weights | {"norm": parameter}, step=step).num_changed == 9
    read = read_state(log)
    assert all(torch.equal(read[name], weights[name]) for name in weights)
    assert [read[name].dtype for name in weights] == [weights[name].dtype for name in weights]


def test_other_parts_are_read_by_their_ends_alone(tmp_path):
    log = WeightLog.open(tmp_path, create=True)
    epoch, state = log.claim_epoch(), {"w": torch.randn(4096, 64)}
    read = []
    get = log.store.get

    def counted(name, start=0, stop=None):
        data = get(name, start, stop)
        read.append((name, len(data)))
        return data

    own = WeightLog.open(tmp_path)
    own.store.get = counted
    other = threading.Thread(
        target=lambda: Publisher(log, 1, 2, epoch, CONFIG).publish(rows_of(state, 1, 2), 0)
    )
    other.start()
    Publisher(own, 0, 2, epoch, CONFIG).publish(rows_of(state, 0, 2), 0)
    other.join()
    name = part_name(0, epoch, 1, "anchor")
    asked = sum(nbytes for each, nbytes in read if each == name)
    assert 0 < asked < 70_000 < log.store.size(name) / 4
    assert not any(each == part_name(0, epoch, 0, "anchor") for each, _ in read)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("kind", "delta"),
        ("run_id", "another"),
        ("version", 1),
        ("base_version", 0),
        ("step", 9),
        ("writer_epoch", 2),
        ("part", 0),
        ("num_parts", 3),
    ],
)
def test_a_part_of_something_else_is_not_committed(tmp_path, field, value):
    log = WeightLog.open(tmp_path, create=True)
    epoch = log.claim_epoch()
    parts = [Publisher(log, part, 2, epoch, HASTY) for part in (0, 1)]
    state = toy_state()
    with pytest.raises(PartTimeoutError):
        parts[1].publish(rows_of(state, 1, 2), 0)
    path = tmp_path / part_name(0, 1, 1, "anchor")
    frame = replace(unpack_frame(path.read_bytes()), **{field: value})
    path.write_bytes(pack_frame(frame))
    with pytest.raises(LogError, match=rf"p1\.anchor has {field} {value}, expected"):
        parts[0].publish(rows_of(state, 0, 2), 0)
    assert log.head() is None


def examples(name):
    """The Python blocks of a page, as they are printed."""
    text = (Path(__file__).parents[2] / name).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)


@pytest.mark.parametrize("page", ["README.md", "docs/weight-log.md"])
def test_what_the_pages_show_works(tmp_path, page, capsys):
    torch.manual_seed(0)
    trained = torch.nn.Linear(40, 70)

    def training():
        for step in range(4):
            with torch.no_grad():
                trained.weight[step] += 1
            yield step, trained

    blocks = examples(page)
    exec(blocks[0], {"url": tmp_path, "training": training})
    log = WeightLog.open(tmp_path)
    assert log.head() == 3 and torch.equal(read_state(log)["weight"], trained.weight.bfloat16())
    for block in blocks[1:]:
        if "Subscriber(" in block:
            follower = torch.nn.Linear(40, 70).bfloat16()
            exec(block, {"url": tmp_path, "model": follower})
            assert torch.equal(follower.weight, trained.weight.bfloat16())
            assert capsys.readouterr().out.splitlines()[-1].startswith("3 ")
