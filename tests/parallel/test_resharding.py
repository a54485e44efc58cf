"""A checkpoint of any EP, DP and ZeRO stage goes on under any other (DESIGN, contract 1)."""

from pathlib import Path

import pytest
import torch
from gloo_world import run_world
from gossamer.comm.log import WeightLog
from gossamer.parallel.dims import build_dims
from gossamer.trainer.checkpoint import Checkpoint, list_checkpoints
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.saving import Progress, Saver
from gossamer.trainer.update import update
from test_equal_under_topology import config_for, fixed_batch

QUICK = {"written": [(2, 1, 2), (1, 2, 1)], "read": [(1, 2, 1), (2, 1, 0), (1, 2, 2)]}
"""(EP, DP, ZeRO stage), in a world of two."""
GRID = [(ep, dp, zero) for ep in (1, 2, 4) for dp in (1, 2) for zero in (0, 1, 2)]


class Replica:
    """A model, its engine and what saves them, under one topology."""

    def __init__(self, topology: tuple[int, int, int], root: str, epoch: int):
        from gossamer.trainer.engine import build_engine

        expert, data, zero_stage = topology
        self.config = config_for(data, expert, zero_stage, micro_rows=8)
        self.dims = build_dims(self.config.parallel)
        model = build_model(self.config.model, hf_config(self.config.model, {}), self.dims, 3)
        self.model, self.events = model, []
        self.engine = build_engine(model, self.dims, self.config.parallel, self.config.optim)
        log = WeightLog.open(f"{root}/log", create=True)
        parts = (self.config.checkpoint, root, epoch, self.engine, model, log)
        self.saver = Saver(*parts, self.events.append)

    def learn(self) -> float:
        return update(self.model, self.engine, self.dims, fixed_batch(8), 1e-2, self.config).loss

    def differs_from(self, checkpoint: Checkpoint) -> list[str]:
        """Rows that this rank owns and that are not the checkpoint's, bit by bit."""
        found = []
        for owned in self.engine.owned(with_moments=True):
            kept = checkpoint.read(owned.name, owned.row_start, owned.row_stop)
            assert owned.moments.keys() == kept.moments.keys() == {"exp_avg", "exp_avg_sq"}
            pairs = {"master": (owned.master, kept.master)}
            pairs |= {kind: (owned.moments[kind], kept.moments[kind]) for kind in kept.moments}
            for kind, (one, other) in pairs.items():
                if not torch.equal(one.contiguous().view(torch.int32), other.view(torch.int32)):
                    found.append(f"{kind} {owned.name}")
        return found


def place(root: str, topology: tuple[int, int, int]) -> str:
    return f"{root}/{'-'.join(map(str, topology))}"


def write_under(topologies: list, root: str) -> dict:
    """One update, a checkpoint, and the loss of the next update."""
    losses = {}
    for topology in topologies:
        replica = Replica(topology, place(root, topology), epoch=1)
        replica.learn()
        replica.saver.save(Progress(step=1), None, None)
        losses["-".join(map(str, topology))] = replica.learn()  # beside the write
        replica.saver.wait()
        assert [event["step"] for event in replica.events] == [1]
    return losses


def go_on_under(topologies: list, written: list, root: str) -> dict:
    """What differs after reading each checkpoint, and the loss of the next update."""
    found = {}
    for topology in topologies:
        replica = Replica(topology, f"{root}/read", epoch=1)
        for source in written:
            checkpoint = Checkpoint(list_checkpoints(place(root, source))[-1])
            progress = replica.saver.restore(checkpoint)
            assert progress.step == replica.engine.num_updates == 1
            differing = replica.differs_from(checkpoint)
            case = f"{'-'.join(map(str, source))} -> {'-'.join(map(str, topology))}"
            found[case] = {"differing": differing, "loss": replica.learn()}
    return found


def check(losses: dict, ranks: list[dict]) -> int:
    for rank in ranks:
        for case, found in rank.items():
            assert found["differing"] == [], case
            expected = losses[case.partition(" ")[0]]
            assert found["loss"] == pytest.approx(expected, rel=1e-6), case
    return len(ranks[0])


def write_and_go_on(root: str) -> dict:
    losses = write_under(QUICK["written"], root)
    return {"losses": losses, "found": go_on_under(QUICK["read"], QUICK["written"], root)}


def test_other_shapes_of_the_same_world(tmp_path):
    ranks = run_world(write_and_go_on, 2, str(tmp_path))
    assert check(ranks[0]["losses"], [rank["found"] for rank in ranks]) == 6


def of_world(world_size: int) -> list[tuple[int, int, int]]:
    return [each for each in GRID if each[0] * each[1] == world_size]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_grid_any_to_any(tmp_path: Path):
    """18 topologies in worlds of 1, 2, 4 and 8 ranks: 324 pairs."""
    losses: dict[str, float] = {}
    for world_size in (1, 2, 4, 8):
        losses |= run_world(write_under, world_size, of_world(world_size), str(tmp_path))[0]
    pairs = 0
    for world_size in (1, 2, 4, 8):
        ranks = run_world(go_on_under, world_size, of_world(world_size), GRID, str(tmp_path))
        pairs += check(losses, ranks)
    assert pairs == 18 * 18
