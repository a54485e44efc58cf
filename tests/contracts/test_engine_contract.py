"""What every Engine keeps. Yours: GOSSAMER_ENGINE=my_package.mod:name pytest <this file>.

An engine is built from (module, expert_blocks, segments, dims, config, build_optimizer, decays).
Each layout is one world of two ranks, which goes through everything and tells what it saw.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from engine_rows import Snapshot, assert_close, by_owners, different, rows_in, share_rows, whole
from gloo_world import run_world
from gossamer.comm.names import logical_views
from gossamer.parallel.config import ParallelConfig
from gossamer.parallel.dims import ParallelDims, build_dims
from gossamer.parallel.dispatch import Dispatcher
from gossamer.parallel.engine import BAND_ROWS, ENGINES, Engine, Owned
from gossamer.trainer.config import OptimConfig
from gossamer.trainer.import_path import resolve
from gossamer.trainer.moe.block import MoEBlock, StepContext
from gossamer.trainer.moe.experts import GroupedExperts
from gossamer.trainer.moe.router import RouterSpec
from gossamer.trainer.moe.routers.topk_softmax import TopKSoftmaxRouter
from gossamer.trainer.optim import build_adamw, decays
from torch import Tensor, nn

NAMES = [*ENGINES, *filter(None, [os.environ.get("GOSSAMER_ENGINE")])]
D, F, E, K, ROWS = 16, 72, 4, 2, 8
LR = 1e-2
MOMENTS = ["exp_avg", "exp_avg_sq"]
WRITER = (1, 2, 1, "float32")
LAYOUTS = {
    "EP=2 ZeRO-1": WRITER,
    "EP=2 ZeRO-0": (1, 2, 0, "float32"),
    "DP=2 ZeRO-0": (2, 1, 0, "float32"),
    "DP=2 ZeRO-1": (2, 1, 1, "float32"),
    "DP=2 ZeRO-2": (2, 1, 2, "float32"),
    "EP=2 ZeRO-1 bf16": (1, 2, 1, "bfloat16"),
}
"""(data, expert, ZeRO stage, compute dtype)"""
CLOSE = {"float32": 1e-5, "bfloat16": 2e-2}
"""Relative, by compute dtype."""


class TinyMoE(nn.Module):
    """x [rows, D] -> [rows, D]: matrices that fill bands and partitions unevenly, and vectors."""

    def __init__(self, seed: int, dims: ParallelDims) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up, self.norm, self.down = nn.Linear(D, 150), nn.LayerNorm(150), nn.Linear(150, D)
        gate_ED, gate_up_EFD, down_EDF = (
            torch.randn(shape) / 4 for shape in [(E, D), (E, 2 * F, D), (E, D, F)]
        )
        mine = dims.local_experts(E)
        local = slice(mine.start, mine.stop)
        experts = GroupedExperts(gate_up_EFD[local].clone(), down_EDF[local].clone())
        router = TopKSoftmaxRouter(gate_ED, RouterSpec(top_k=K, is_renormalised=True))
        self.mlp = MoEBlock(router, experts, Dispatcher(dims, E), StepContext(), False)

    def forward(self, x_RD: Tensor) -> Tensor:
        h_RD = x_RD + self.down(self.norm(self.up(x_RD)).relu())
        return h_RD + self.mlp(h_RD)


def inputs_and_targets() -> tuple[Tensor, Tensor]:
    return torch.randn(2, ROWS, D, generator=torch.Generator().manual_seed(11)).unbind()


class World:
    """One rank: a model, its engine, and rows of numbers to learn from."""

    def __init__(self, name: str, seed: int, layout: tuple[int, int, int, str]) -> None:
        data, expert, zero_stage, dtype = layout
        config = ParallelConfig(
            data=data, expert=expert, zero_stage=zero_stage, compute_dtype=dtype
        )
        self.dims = build_dims(config)
        self.dtype = getattr(torch, dtype)
        self.model = model = TinyMoE(seed, self.dims)
        offset = self.dims.local_experts(E).start
        segments = {
            name: [(n, tuple(v.shape)) for n, v in logical_views([(name, p)], offset).items()]
            for name, p in model.named_parameters()
        }
        self.initial = self.weights()
        self.engine: Engine = resolve(name, ENGINES, "engine")(
            model,
            [model.mlp],
            segments,
            self.dims,
            config,
            lambda groups: build_adamw(groups, OptimConfig(weight_decay=0.1)),
            decays,
        )

    def losses(self, updates: int, parts: int = 1, max_norm: float = 0.0) -> list[float]:
        """Losses over all ranks of some updates, each of `parts` micro-batches."""
        found = []
        for _ in range(updates):
            loss = torch.zeros(())
            for part in range(parts):
                share = self.share(part, parts)
                self.engine.backward(share, is_last=part == parts - 1)
                loss += share.detach().float()
            dist.all_reduce(loss)
            self.norm = self.engine.step(LR, max_norm)
            found.append(float(loss))
        return found

    def share(self, part: int = 0, parts: int = 1) -> Tensor:
        """This rank's share of the mean squared error over all rows."""
        x_RD, y_RD = (rows.to(self.dtype) for rows in inputs_and_targets())
        mine = torch.arange(ROWS).chunk(self.dims.world_size)[self.dims.rank].chunk(parts)[part]
        return (self.engine.module(x_RD[mine]) - y_RD[mine]).square().sum() / ROWS

    def snapshot(self, with_moments: bool = True) -> Snapshot:
        return {
            f"{kind}|{rows.name}|{rows.row_start}": values.clone()
            for rows in self.engine.owned(with_moments)
            for kind, values in {"master": rows.master, **rows.moments}.items()
        }

    def weights(self) -> Snapshot:
        """What the forward pass computes with, under logical names."""
        offset = self.dims.local_experts(E).start
        views = logical_views(self.model.named_parameters(), offset)
        return {name: view.clone() for name, view in views.items()}


def go_through_everything(
    name: str, layout: tuple[int, int, int, str], folder: str, written: str | None
) -> dict:
    if written is None:  # nothing to compile with, and nothing compiled before
        os.environ.update(PATH="", TORCH_EXTENSIONS_DIR=f"{folder}/extensions")
    world, root = World(name, seed=3, layout=layout), Path(folder)
    engine, rank = world.engine, world.dims.rank
    seen = {"compilers": [t for t in ("ninja", "c++", "g++", "gcc") if shutil.which(t)]}

    start = world.snapshot()
    share_rows(root / "start", rank, start)
    seen["rows"] = [
        (o.name, list(o.shape), o.row_start, o.row_stop, list(o.master.shape))
        for o in engine.owned(with_moments=False)
    ]
    seen["initial"], seen["start"] = world.initial, start

    first = world.losses(1)
    seen["norm"], after_one = world.norm, world.snapshot()
    share_rows(root / "one", rank, after_one)
    seen["after_one"] = after_one
    masters = rows_in(root / "one")
    seen["weights_that_are_not_masters"] = [
        name
        for name, weight in world.weights().items()
        if not torch.equal(weight, masters(name, 0, len(weight)).master.to(world.dtype))
    ]
    second = world.losses(2)
    after_three = world.snapshot()
    seen["num_updates"] = engine.num_updates

    engine.write(masters, num_updates=1)
    seen["changed_by_writing"] = different(after_one, world.snapshot())
    seen["losses"], seen["losses_again"] = first + second, first + world.losses(2)
    seen["changed_by_going_on"] = different(after_three, world.snapshot())

    engine.write(rows_in(root / "start"), num_updates=0)
    seen["changed_by_starting_over"] = different(start, world.snapshot())
    world.losses(1, parts=2)
    seen["in_two_parts"] = world.snapshot()
    engine.write(rows_in(root / "start"), num_updates=0)
    world.losses(1, max_norm=seen["norm"] / 4)
    seen["clipped"], seen["clipped_norm"] = world.snapshot(), world.norm

    other_layout = Path(written) if written else root / "one"
    engine.write(rows_in(other_layout), num_updates=1)
    seen["from_other_layout"], seen["losses_from_other_layout"] = world.snapshot(), world.losses(2)
    engine.write(masters, num_updates=1)
    seen |= by_owners(world, is_replicated=layout[2] == 0)
    engine.write(masters, num_updates=1)
    seen["before_moving"] = world.snapshot()
    seen |= moves(world) | refusals(world, masters)
    return seen


def moves(world: World) -> dict:
    """Experts 0 and 3 change places, which are on two ranks where there are two; then back."""
    per_rank = E // world.dims.expert

    def segments(experts: list[int]) -> list[dict]:
        parts = [experts[i : i + per_rank] for i in range(0, E, per_rank)]
        return [
            {
                name: [
                    (n, tuple(v.shape))
                    for n, v in logical_views([(name, p)], 0, "", {"mlp.experts": part}).items()
                ]
                for name, p in world.model.named_parameters()
            }
            for part in parts
        ]

    now, then, lost = (segments(ids) for ids in ([0, 1, 2, 3], [3, 1, 2, 0], [3, 1, 2, 4]))
    weights, before = world.weights(), world.snapshot()
    errors = []
    for wrong in ((now, lost), (then, now)):
        with pytest.raises(ValueError) as raised:
            world.engine.move(*wrong)
        errors.append(str(raised.value))
    seen = {"move_errors": errors, "changed_by_no_move": different(before, world.snapshot())}
    seen["sent_to_others"] = world.engine.move(now, then)
    seen["after_moving"] = world.snapshot()
    seen["weights_that_stayed"] = sorted(weights.keys() - different(weights, world.weights()))
    world.engine.move(then, now)
    changed = different(before, world.snapshot()) + different(weights, world.weights())
    return seen | {"changed_by_moving_back": changed}


def refusals(world: World, read: Callable[[str, int, int], Owned]) -> dict:
    """A gradient that is NaN on one rank, and rows of a tensor of another shape."""
    seen, before, weights = {}, world.snapshot(), world.weights()
    world.engine.backward(world.share(0, 2), is_last=False)
    share = world.share(1, 2)
    world.engine.backward(share * float("nan") if world.dims.rank else share, is_last=True)
    updates = world.engine.num_updates
    with pytest.raises(FloatingPointError) as raised:
        world.engine.step(LR, max_norm=1.0)
    seen["nan_error"] = str(raised.value)
    changed = different(before, world.snapshot()) + different(weights, world.weights())
    seen["changed_by_nan"] = changed + ["updates"] * (world.engine.num_updates != updates)
    seen["losses_after_nan"] = world.losses(2)

    def read_wider(name: str, start: int, stop: int) -> Owned:
        rows = read(name, start, stop)
        shape = (rows.shape[0], *(size + 1 for size in rows.shape[1:]))
        return Owned(name, shape, start, stop, torch.zeros(stop - start, *shape[1:]), {})

    with pytest.raises(ValueError) as raised:
        world.engine.write(read_wider, num_updates=0)
    seen["shape_error"] = str(raised.value)
    return seen


@pytest.fixture(scope="module", params=NAMES)
def engine_name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def writer(engine_name, tmp_path_factory) -> tuple[list[dict], Path]:
    """The world whose rows all others go on from; it finds no compiler."""
    folder = tmp_path_factory.mktemp("writer")
    return run_world(go_through_everything, 2, engine_name, WRITER, str(folder), None), folder


@pytest.fixture(scope="module", params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request) -> tuple[int, int, int, str]:
    return request.param


@pytest.fixture(scope="module")
def ranks(layout, engine_name, writer, tmp_path_factory) -> list[dict]:
    if layout == WRITER:
        return writer[0]
    folder, written = tmp_path_factory.mktemp("layout"), str(writer[1] / "one")
    return run_world(go_through_everything, 2, engine_name, layout, str(folder), written)


def test_it_needs_no_compiler(writer):
    assert [rank["compilers"] for rank in writer[0]] == [[], []]


def test_each_row_has_one_owner_and_each_band_too(ranks):
    shapes = {n: list(w.shape) for rank in ranks for n, w in rank["initial"].items()}
    assert len(shapes) == 7 + 3 * E
    owners: dict[tuple[str, int], list[int]] = {}
    for number, rank in enumerate(ranks):
        assert rank["rows"]
        for name, shape, start, stop, held in rank["rows"]:
            assert shape == shapes[name] and held == [stop - start, *shape[1:]]
            for row in range(start, stop):
                owners.setdefault((name, row), []).append(number)
    assert owners.keys() == {(n, row) for n, shape in shapes.items() for row in range(shape[0])}
    assert all(len(owner) == 1 for owner in owners.values())
    for (name, row), owner in owners.items():
        height = BAND_ROWS if len(shapes[name]) > 1 else shapes[name][0]
        assert owner == owners[name, row - row % height]


def test_masters_start_as_the_models_weights_without_moments(ranks, layout):
    start, dtype = whole(ranks, "start"), getattr(torch, layout[3])
    initial = {f"master|{n}": w for rank in ranks for n, w in rank["initial"].items()}
    assert start.keys() == initial.keys()  # no kind but masters
    for key, weight in initial.items():
        assert start[key].dtype == torch.float32
        assert torch.equal(start[key], weight.to(dtype).float())


def test_after_a_step_rows_hold_moments_and_weights_are_the_masters(ranks):
    after = whole(ranks, "after_one")
    names = {n for rank in ranks for n in rank["initial"]}
    assert after.keys() == {f"{kind}|{n}" for kind in ["master", *MOMENTS] for n in names}
    assert all(after[f"exp_avg|{n}"].any() for n in names)
    assert [rank["weights_that_are_not_masters"] for rank in ranks] == [[], []]
    assert different(whole(ranks, "start"), after) == sorted(after)


def test_what_is_written_is_owned_and_goes_on_bit_by_bit(ranks):
    for rank in ranks:
        assert rank["changed_by_writing"] == []
        assert rank["changed_by_starting_over"] == []
        assert rank["losses_again"] == rank["losses"]
        assert rank["changed_by_going_on"] == []
        assert rank["num_updates"] == 3
        assert len(set(rank["losses"])) == 3


def test_owners_write_for_all_and_may_change_the_gradient(ranks, layout):
    for rank in ranks:
        assert rank["changed_otherwise"] == [] and rank["updates_after"] == 1
        if layout[2] == 0:
            assert rank["times"] == 2 and rank["all"]


def test_another_layouts_state_goes_on_with_its_losses(ranks, writer, layout):
    """Bits on arrival; from then on sums in another order."""
    arrived, left = whole(ranks, "from_other_layout"), whole(writer[0], "after_one")
    assert different(arrived, left) == []
    expected = pytest.approx(writer[0][0]["losses"][1:], rel=CLOSE[layout[3]])
    assert [rank["losses_from_other_layout"] for rank in ranks] == [expected] * 2


def test_gradients_are_those_of_a_plain_backward_pass(ranks, layout):
    """Of one process that holds all rows and experts; a first moment begins as (1 - beta1) g."""
    model = TinyMoE(3, ParallelDims(data=1, expert=1, rank=0, expert_group=None))
    x_RD, y_RD = inputs_and_targets()
    loss = (model(x_RD) - y_RD).square().sum() / ROWS
    loss.backward()
    gradients = logical_views((n, p.grad) for n, p in model.named_parameters())
    expected = {f"exp_avg|{n}": 0.1 * g for n, g in gradients.items()}
    after = whole(ranks, "after_one")
    assert_close({k: after[k] for k in expected}, expected, CLOSE[layout[3]])
    norm = sum(float(g.double().square().sum()) for g in gradients.values()) ** 0.5
    for rank in ranks:
        assert rank["losses"][0] == pytest.approx(loss.item(), rel=CLOSE[layout[3]])
        assert rank["norm"] == pytest.approx(norm, rel=CLOSE[layout[3]])


def test_micro_batches_add_up(ranks, layout):
    in_one, in_two = whole(ranks, "after_one"), whole(ranks, "in_two_parts")
    for kind in MOMENTS:
        names = [key for key in in_one if key.startswith(kind + "|")]
        assert_close({k: in_two[k] for k in names}, {k: in_one[k] for k in names}, CLOSE[layout[3]])


def test_the_norm_is_that_before_clipping(ranks, writer, layout):
    """Clipped to a quarter of it, the first moment is a quarter."""
    for rank in ranks:
        assert rank["clipped_norm"] == rank["norm"] == ranks[0]["norm"]
        expected = pytest.approx(writer[0][0]["norm"], rel=CLOSE[layout[3]])
        assert rank["norm"] == expected
    clipped, free = whole(ranks, "clipped"), whole(ranks, "after_one")
    quarter = {k: v / 4 for k, v in free.items() if k.startswith("exp_avg|")}
    assert_close({k: clipped[k] for k in quarter}, quarter, CLOSE[layout[3]])


def test_what_moves_keeps_its_name_and_its_bits(ranks, layout):
    assert different(whole(ranks, "before_moving"), whole(ranks, "after_moving")) == []
    for rank in ranks:
        assert rank["changed_by_no_move"] == rank["changed_by_moving_back"] == []
        assert all(error and "\n" not in error for error in rank["move_errors"])
        moved = {f"mlp.experts.{e}." for e in (0, 3)}
        stayed = {n for n in rank["initial"] if not any(n.startswith(m) for m in moved)}
        assert set(rank["weights_that_stayed"]) == stayed
    # a state of three numbers an element, of an expert each way
    if layout[1] == 2:
        assert [rank["sent_to_others"] for rank in ranks] == [3 * 4 * 3 * F * D] * 2


def test_a_gradient_that_is_not_finite_changes_nothing_on_any_rank(ranks):
    for rank in ranks:
        assert "nan" in rank["nan_error"] and "\n" not in rank["nan_error"]
        assert rank["changed_by_nan"] == []
        assert rank["losses_after_nan"] == rank["losses"][1:]  # nothing is left of that gradient


def test_rows_of_another_shape_are_refused_by_name(ranks):
    names = {n for rank in ranks for n in rank["initial"]}
    for rank in ranks:
        assert rank["shape_error"].split()[0] in names
        assert "expected" in rank["shape_error"] and "\n" not in rank["shape_error"]
