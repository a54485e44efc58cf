"""Checkpoints: what was written is read by rows; less than all of it is never believed."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from checkpoint_rows import (
    SHAPES,
    STATE,
    TWO_RANKS,
    assert_holds,
    owned,
    whole,
    write_on_two_ranks,
    write_one_rank,
)
from gossamer.parallel.engine import Owned
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.checkpoint_writer import Target
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    return Path(write_on_two_ranks(tmp_path_factory.mktemp("two") / "checkpoints"))


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy of the two ranks' checkpoint, to break."""
    return Path(shutil.copytree(written, tmp_path / written.name))


def write_alone(root: Path, rows: list[Owned]) -> str:
    target = Target(root=str(root), step=1, epoch=1)
    write_one_rank(target, rows)
    return target.url


def test_two_ranks_write_and_one_reads(written):
    assert written.name == "step-00000040-e0002"
    assert sorted(path.name for path in written.parent.iterdir()) == [
        "step-00000040-e0002",
        "step-00000040-e0002.begun",
    ]
    assert list_checkpoints(written.parent) == [str(written)]
    checkpoint = Checkpoint(written)
    checkpoint.verify()
    assert (checkpoint.step, checkpoint.state["epoch"]) == (40, 2)
    assert checkpoint.shapes == SHAPES
    assert {key: checkpoint.state[key] for key in STATE} == STATE
    assert torch.equal(checkpoint.rng(0), torch.get_rng_state())
    assert checkpoint.rng(1) is not None and checkpoint.rng(2) is None


def test_its_files_are_safetensors_of_bounded_size(written):
    found = {}
    for path in written.glob("*.safetensors"):
        tensors = load_file(path)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 600
        assert len({key.partition("|")[0] for key in tensors}) == 1
        found |= tensors
    rows = torch.cat([found[f"master|a.weight|{start}"] for start in (0, 50, 64, 114, 128)])
    assert torch.equal(rows.view(torch.int32), whole("a.weight", "master").view(torch.int32))


@pytest.mark.parametrize(
    ("name", "start", "stop"),
    [
        ("a.weight", 0, 130),
        ("a.weight", 63, 65),
        ("a.weight", 64, 130),
        ("a.weight", 5, 6),
        ("b", 0, 7),
    ],
)
def test_rows_are_read_from_whichever_files_hold_them(written, name, start, stop):
    assert_holds(Checkpoint(written), name, start, stop)


def test_before_the_first_step_there_are_no_moments(tmp_path):
    rows = [Owned("b", (7,), 0, 7, whole("b", "master"), {})]
    assert Checkpoint(write_alone(tmp_path, rows)).read("b", 0, 7).moments == {}


def test_files_are_hashed_by_shares(folder):
    """Each file by one of the ranks, whatever their number; or those of the weights alone."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    checkpoint = Checkpoint(folder)
    for broken in range(len(names)):
        path = folder / names[broken]
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        for part in range(3):
            if part == broken % 3:
                with pytest.raises(ValueError, match=names[broken]):
                    checkpoint.verify(part, 3)
            else:
                checkpoint.verify(part, 3)
        if any(key.startswith("master|") for key in load_file(path)):
            with pytest.raises(ValueError, match=names[broken]):
                checkpoint.verify(kind="master")
        else:
            checkpoint.verify(kind="master")
        path.write_bytes(content)
    checkpoint.verify()


# --- broken ----------------------------------------------------------------------------------


def refused(url: Path | str) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Checkpoint(url).verify()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_file_is_named(folder):
    (folder / "shard-00001-00002.safetensors").unlink()
    assert refused(folder) == f"checkpoint file {folder}/shard-00001-00002.safetensors is missing"


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_file_is_named(folder, length):
    path = folder / "shard-00001-00001.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert f"{path} does not have the bytes that were written" in refused(folder)


@pytest.mark.parametrize("place", [0, 9, -1])
def test_a_flipped_bit_is_found(folder, place):
    path = folder / "shard-00000-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert f"{path} does not have the bytes that were written" in refused(folder)


def test_files_in_each_others_place_are_found(folder):
    first, second = (folder / f"shard-0000{rank}-00000.safetensors" for rank in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert "does not have the bytes that were written" in refused(folder)


def test_a_file_cut_after_it_was_verified_is_named_by_whoever_reads_it(folder):
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    for path in folder.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ValueError, match="does not have the bytes that were written"):
        checkpoint.read("a.weight", 0, 130)


def test_a_missing_manifest_is_named(folder):
    (folder / "manifest.json").unlink()
    assert f"{folder}/manifest.json is missing" in refused(folder)
    assert "expected a checkpoint" in refused(folder / "nowhere")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"{}",
        b"[]",
        b'"shards"',
        b"\xff\xfe\x00",
        b'{"shards": []}',
        b'{"sha256": "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"}',
    ],
)
def test_another_file_in_the_manifests_place_is_named(folder, content):
    (folder / "manifest.json").write_bytes(content)
    assert refused(folder).startswith(f"{folder}/manifest.json is not a checkpoint manifest")


def test_a_cut_manifest_or_one_with_a_flipped_bit_is_named(folder):
    path = folder / "manifest.json"
    content = path.read_bytes()
    before = json.loads(content)
    for broken in [content[:-1], *flipped(content, range(0, len(content), 37))]:
        path.write_bytes(broken)
        try:
            if json.loads(broken) == before:
                continue  # a bit of what JSON overlooks
        except ValueError:
            pass
        assert refused(folder).startswith(f"{path} is not a checkpoint manifest")


def flipped(content: bytes, places: range) -> list[bytes]:
    return [
        content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :] for place in places
    ]


@pytest.mark.parametrize(
    ("rows", "missing"),
    [
        ([(64, 130)], "rows 0.."),
        ([(0, 64), (80, 130)], "rows 64.."),
        ([(0, 64), (64, 129)], "rows 129.."),
    ],
    ids=["first", "middle", "last"],
)
def test_a_hole_in_the_rows_is_named(tmp_path, rows, missing):
    url = write_alone(tmp_path, owned([("a.weight", *r) for r in rows]))
    message = refused(url)
    assert url in message and missing in message and "a.weight" in message


def test_a_hole_in_the_moments_alone_is_named(tmp_path):
    rows = owned([("a.weight", 0, 64), ("a.weight", 64, 130)])
    del rows[1].moments["exp_avg_sq"]
    message = refused(write_alone(tmp_path, rows))
    assert "rows 64.." in message and "exp_avg_sq" in message and "a.weight" in message


@pytest.mark.parametrize(
    ("name", "start", "stop"), [("c.weight", 0, 1), ("b", 0, 8), ("a.weight", 140, 150)]
)
def test_a_tensor_of_another_model_is_named(written, name, start, stop):
    with pytest.raises(ValueError) as error:
        Checkpoint(written).read(name, start, stop)
    message = str(error.value)
    assert str(written) in message and name in message and "another model" in message
    assert "\n" not in message


def test_the_rows_of_a_rank_that_owns_none_are_none(tmp_path):
    """Its shard holds its generator's state alone."""
    write_one_rank(Target(root=str(tmp_path), step=1, epoch=1, rank=1, world_size=2), [])
    target = Target(root=str(tmp_path), step=1, epoch=1, rank=0, world_size=2)
    write_one_rank(target, owned(sum(TWO_RANKS, []), step=1))
    Checkpoint(target.url).verify()
    assert_holds(Checkpoint(target.url), "a.weight", 0, 130)
