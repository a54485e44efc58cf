"""Checkpoints: what was written is read by rows; less than all of it is never believed."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gloo_world import run_world
from gossamer.parallel.engine import Owned
from gossamer.trainer.checkpoint import (
    Checkpoint,
    list_checkpoints,
    prune_checkpoints,
    write_checkpoint,
)

SHAPES = {"a.weight": (130, 3), "b": (7,)}
KINDS = ("master", "exp_avg", "exp_avg_sq")
STATE = {"num_updates": 3, "progress": {"step": 40}, "data": None}
TWO_RANKS = ([("a.weight", 0, 64), ("a.weight", 128, 130), ("b", 0, 7)], [("a.weight", 64, 128)])
"""Rows of each rank, so that neither file has them in order."""


def whole(name: str, kind: str) -> torch.Tensor:
    """Any bits: -0.0, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(len(name) * 10 + KINDS.index(kind))
    values = torch.randn(SHAPES[name], generator=generator)
    values.view(-1)[:4] = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40])
    return values


def owned(rows: list[tuple[str, int, int]]) -> list[Owned]:
    found = []
    for name, start, stop in rows:
        master, *moments = (whole(name, kind)[start:stop] for kind in KINDS)
        moments = dict(zip(KINDS[1:], moments, strict=True))
        found.append(Owned(name, SHAPES[name], start, stop, master, moments))
    return found


def write_on_two_ranks(root: str) -> dict:
    rank = dist.get_rank()
    torch.manual_seed(rank)
    folder, num_bytes = write_checkpoint(Path(root), 40, 2, owned(TWO_RANKS[rank]), STATE)
    return {"folder": str(folder), "bytes": num_bytes, "rng": torch.get_rng_state()}


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, list[dict]]:
    root = tmp_path_factory.mktemp("two") / "checkpoints"
    ranks = run_world(write_on_two_ranks, 2, str(root))
    return Path(ranks[0]["folder"]), ranks


@pytest.fixture
def folder(written, tmp_path) -> Path:
    """A copy of the two ranks' checkpoint, to break."""
    return Path(shutil.copytree(written[0], tmp_path / written[0].name))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """This process as a world of one."""
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assert_holds(checkpoint: Checkpoint, name: str, start: int, stop: int) -> None:
    rows = checkpoint.read(name, start, stop)
    assert (rows.name, rows.shape) == (name, SHAPES[name])
    assert (rows.row_start, rows.row_stop) == (start, stop)
    assert rows.moments.keys() == set(KINDS[1:])
    for kind, values in {"master": rows.master, **rows.moments}.items():
        assert torch.equal(
            values.view(torch.int32), whole(name, kind)[start:stop].view(torch.int32)
        )


def test_two_ranks_write_and_one_reads(written):
    folder, ranks = written
    assert folder.name == "step-00000040-e0002"
    assert list(folder.parent.iterdir()) == [folder]  # no temporary folder
    names = ["manifest.json", "shard-00000.safetensors", "shard-00001.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == names
    sizes = [(folder / name).stat().st_size for name in names[1:]]
    assert [rank["bytes"] for rank in ranks] == [sum(sizes)] * 2

    checkpoint = Checkpoint(folder)
    assert checkpoint.step == 40 and checkpoint.shapes == SHAPES
    assert {key: checkpoint.state[key] for key in STATE} == STATE
    for rank, seen in enumerate(ranks):
        assert torch.equal(checkpoint.rng[rank], seen["rng"])
    assert not torch.equal(checkpoint.rng[0], checkpoint.rng[1])


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
def test_rows_are_read_from_whichever_shards_hold_them(written, name, start, stop):
    assert_holds(Checkpoint(written[0]), name, start, stop)


def test_before_the_first_step_there_are_no_moments(alone, tmp_path):
    rows = [Owned("b", (7,), 0, 7, whole("b", "master"), {})]
    folder, _ = write_checkpoint(tmp_path, 0, 1, rows, STATE)
    assert Checkpoint(folder).read("b", 0, 7).moments == {}


# --- which is newest -------------------------------------------------------------------------


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).mkdir(parents=True)


def test_the_newest_is_of_the_latest_epoch_then_step(tmp_path):
    """Attempt 2 went on from step 100, whatever attempt 1 wrote after that."""
    assert list_checkpoints(tmp_path / "nowhere") == []
    make(tmp_path, "step-00000300-e0001", "step-00000100-e0001", "step-00000150-e0002")
    make(tmp_path, "step-00000110-e0002", ".step-00000400-e0003", "step-5-e1", "notes")
    (tmp_path / "step-00000999-e0009.txt").touch()
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000100-e0001",
        "step-00000300-e0001",
        "step-00000110-e0002",
        "step-00000150-e0002",
    ]


@pytest.mark.parametrize("keep", [1, 2, 3, 7])
def test_prune_keeps_the_newest(tmp_path, keep):
    make(tmp_path, "step-00000300-e0001", "step-00000110-e0002", "step-00000120-e0002", "notes")
    before = list_checkpoints(tmp_path)
    prune_checkpoints(tmp_path, keep)
    assert list_checkpoints(tmp_path) == before[-keep:]
    assert (tmp_path / "notes").exists()


def test_writing_a_step_again_replaces_it(alone, tmp_path):
    first, _ = write_checkpoint(tmp_path, 5, 1, owned(sum(TWO_RANKS, [])), {"try": 1})
    again, _ = write_checkpoint(tmp_path, 5, 1, owned(sum(TWO_RANKS, [])), {"try": 2})
    assert list_checkpoints(tmp_path) == [first] == [again]
    assert Checkpoint(again).state["try"] == 2


# --- killed while writing --------------------------------------------------------------------

KILLED_AT = {
    "a shard is written": "gossamer.trainer.checkpoint.save_file",
    "shards are there, the manifest is not": "pathlib.Path.write_text",
    "the manifest is there, under the temporary name": "pathlib.Path.rename",
}


def write_and_die(root: str) -> None:
    """One fork for each place: a whole checkpoint of step 1, then SIGKILL in that of step 2."""
    torch.set_num_threads(1)
    for number, target in enumerate(KILLED_AT.values()):
        place = Path(root, str(number))
        pid = os.fork()
        if pid:
            status = os.waitpid(pid, 0)[1]
            Path(root, f"signal-{number}").write_text(str(os.WTERMSIG(status)))
            continue
        dist.init_process_group(
            "gloo", init_method=f"file://{root}/store-{number}", rank=0, world_size=1
        )
        write_checkpoint(place, 1, 1, owned(sum(TWO_RANKS, [])), STATE)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(target, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            write_checkpoint(place, 2, 1, owned(sum(TWO_RANKS, [])), STATE)
        os._exit(0)


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("killed")
    process = mp.get_context("spawn").Process(target=write_and_die, args=(str(root),))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    return root


@pytest.mark.parametrize("number", range(len(KILLED_AT)), ids=KILLED_AT)
def test_killed_while_writing_leaves_the_earlier_one_the_newest(killed, alone, number):
    root = killed / str(number)
    assert (killed / f"signal-{number}").read_text() == str(int(signal.SIGKILL))
    assert (root / ".step-00000002-e0001").is_dir()  # it was in the middle of it
    assert [path.name for path in list_checkpoints(root)] == ["step-00000001-e0001"]
    assert_holds(Checkpoint(list_checkpoints(root)[-1]), "a.weight", 0, 130)
    write_checkpoint(root, 2, 1, owned(sum(TWO_RANKS, [])), STATE)
    assert sorted(path.name for path in root.iterdir()) == [
        "step-00000001-e0001",
        "step-00000002-e0001",
    ]


# --- broken ----------------------------------------------------------------------------------


def refused(folder: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        Checkpoint(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_shard_is_named(folder):
    (folder / "shard-00001.safetensors").unlink()
    assert refused(folder) == f"checkpoint file {folder}/shard-00001.safetensors is missing"


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(folder, length):
    path = folder / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    assert f"{path} does not have the bytes that were written" in refused(folder)


@pytest.mark.parametrize("place", [0, 9, -1])
def test_a_flipped_bit_is_found(folder, place):
    path = folder / "shard-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert f"{path} does not have the bytes that were written" in refused(folder)


def test_shards_in_each_others_place_are_found(folder):
    first, second = (folder / f"shard-0000{rank}.safetensors" for rank in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert "does not have the bytes that were written" in refused(folder)


def test_a_missing_manifest_is_named(folder):
    (folder / "manifest.json").unlink()
    assert f"{folder}/manifest.json is missing" in refused(folder)


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
        b'{"shards": {"shard-00000.safetensors": {}}}',
        b'{"shards": {"shard-00000.safetensors": 5}}',
    ],
)
def test_another_file_in_the_manifests_place_is_named(folder, content):
    (folder / "manifest.json").write_bytes(content)
    assert refused(folder).startswith(f"{folder}/manifest.json is not a checkpoint manifest")


def test_a_cut_manifest_is_named(folder):
    path = folder / "manifest.json"
    path.write_bytes(path.read_bytes()[:-1])
    assert refused(folder).startswith(f"{path} is not a checkpoint manifest")


@pytest.mark.parametrize(
    ("rows", "missing"),
    [
        ([(64, 130)], "rows 0.."),
        ([(0, 64), (80, 130)], "rows 64.."),
        ([(0, 64), (64, 129)], "rows 129.."),
    ],
    ids=["first", "middle", "last"],
)
def test_a_hole_in_the_rows_is_named(alone, tmp_path, rows, missing):
    folder, _ = write_checkpoint(tmp_path, 1, 1, owned([("a.weight", *r) for r in rows]), STATE)
    message = refused(folder)
    assert str(folder) in message and missing in message and "a.weight" in message


def test_a_hole_in_the_moments_alone_is_named(alone, tmp_path):
    rows = owned([("a.weight", 0, 64), ("a.weight", 64, 130)])
    del rows[1].moments["exp_avg_sq"]
    folder, _ = write_checkpoint(tmp_path, 1, 1, rows, STATE)
    message = refused(folder)
    assert "rows 64.." in message and "exp_avg_sq" in message and "a.weight" in message


@pytest.mark.parametrize(
    ("name", "start", "stop"), [("c.weight", 0, 1), ("b", 0, 8), ("a.weight", 140, 150)]
)
def test_a_tensor_of_another_model_is_named(written, name, start, stop):
    with pytest.raises(ValueError) as error:
        Checkpoint(written[0]).read(name, start, stop)
    message = str(error.value)
    assert str(written[0]) in message and name in message and "another model" in message
    assert "\n" not in message


def test_the_manifest_says_what_each_shard_is(written):
    manifest = json.loads((written[0] / "manifest.json").read_text())
    assert (manifest["step"], manifest["epoch"]) == (40, 2)
    for name, described in manifest["shards"].items():
        assert described["bytes"] == (written[0] / name).stat().st_size
        assert len(described["sha256"]) == 64
