"""Masks on sharded training state: the plain loop over whole tensors is the reference."""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from gloo_world import run_world
from gossamer.comm.names import logical_views
from gossamer.parallel.config import ParallelConfig
from gossamer.parallel.deepspeed_engine import DeepSpeedEngine
from gossamer.parallel.dims import ParallelDims, build_dims
from gossamer.parallel.dispatch import Dispatcher
from gossamer.parallel.engine import Owned
from gossamer.parallel.flat_layout import FlatLayout, Segment
from gossamer.parallel.flat_state import StateGroup
from gossamer.parallel.masks import Masks
from gossamer.trainer.config import OptimConfig
from gossamer.trainer.moe.block import MoEBlock, StepContext
from gossamer.trainer.moe.experts import GroupedExperts
from gossamer.trainer.moe.router import RouterSpec
from gossamer.trainer.moe.routers.topk_softmax import TopKSoftmaxRouter
from gossamer.trainer.optim import build_adamw, decays
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

D, F, E, ROWS, LR, MAX_NORM = 16, 72, 4, 8, 1e-2, 0.05
OPTIM = OptimConfig(weight_decay=0.1)
LAYOUTS = {
    "EP=2 ZeRO-1": (1, 2, 1, "float32"),
    "DP=2 ZeRO-0": (2, 1, 0, "float32"),
    "DP=2 ZeRO-2": (2, 1, 2, "float32"),
    "DP=2 ZeRO-1 bf16": (2, 1, 1, "bfloat16"),
}


@dataclass(frozen=True)
class ToyFlow:
    """One of each thing a flow may do."""

    keeps_dense: bool = False
    replaces_adamw: bool = False
    soft: float = 0.0
    decay: float = 0.0

    def forward(self, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, weight, weight * self.soft)

    def gradient(self, gradient: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask, gradient, gradient + self.decay * weight)

    def adamw(
        self, weight, gradient, exp_avg, exp_avg_sq, mask, lr, betas, eps, weight_decay, step
    ) -> None:
        """Not Adam at all, so that one sees who stepped: counts steps in a moment."""
        weight.sub_(lr * torch.where(mask, gradient, 0.0))
        exp_avg.add_(1.0)
        exp_avg_sq.fill_(float(step))


FLOWS = {
    "up.": ToyFlow(),
    "gate_proj.": ToyFlow(),
    "up_proj.": ToyFlow(keeps_dense=True, soft=0.25, decay=0.3),
    "down_proj.": ToyFlow(keeps_dense=True, replaces_adamw=True),
}
"""By the name's last part but one; every kind in one world."""


class TinyMoE(nn.Module):
    def __init__(self, dims: ParallelDims) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.up, self.norm, self.down = nn.Linear(D, 150), nn.LayerNorm(150), nn.Linear(150, D)
        gate_ED, gate_up_EFD, down_EDF = (
            torch.randn(shape) / 4 for shape in [(E, D), (E, 2 * F, D), (E, D, F)]
        )
        mine = dims.local_experts(E)
        local = slice(mine.start, mine.stop)
        experts = GroupedExperts(gate_up_EFD[local].clone(), down_EDF[local].clone())
        router = TopKSoftmaxRouter(gate_ED, RouterSpec(top_k=2, is_renormalised=True))
        self.mlp = MoEBlock(router, experts, Dispatcher(dims, E), StepContext(), False)

    def forward(self, x_RD: Tensor) -> Tensor:
        h_RD = x_RD + self.down(self.norm(self.up(x_RD)).relu())
        return h_RD + self.mlp(h_RD)


def share(module: nn.Module, dims: ParallelDims, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    x_RD, y_RD = torch.randn(2, ROWS, D, generator=generator).to(dtype).unbind()
    mine = torch.arange(ROWS).chunk(dims.world_size)[dims.rank]
    return (module(x_RD[mine]) - y_RD[mine]).square().sum() / ROWS


def mask_of(name: str, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(len(name) + sum(map(ord, name)))
    return torch.rand(shape, generator=generator) < 0.4


def flow_of(name: str) -> ToyFlow | None:
    return FLOWS.get(".".join(name.split(".")[-2:-1]) + ".") if name.endswith("weight") else None


def plain(steps: int) -> dict[str, Tensor]:
    """The same training, by whole tensors: a model, its true weights, masks and AdamW."""
    dims = build_dims(ParallelConfig())
    model = TinyMoE(dims)
    parameters = dict(model.named_parameters())
    seen = logical_views(parameters.items())
    flows = {n: f for n in seen if (f := flow_of(n)) is not None}
    masks = {n: mask_of(n, tuple(seen[n].shape)) for n in flows}
    groups = [
        {"params": [p], "weight_decay": OPTIM.weight_decay if decays(n, p) else 0.0, "lr": LR}
        for n, p in parameters.items()
    ]
    optimizer = build_adamw(groups, OPTIM)
    true = {n: seen[n].clone() for n in flows}
    for n, flow in flows.items():
        if not flow.keeps_dense:
            true[n] = torch.where(masks[n], true[n], 0.0)
    windows = {n: torch.zeros_like(w) for n, w in true.items()}
    norm = 0.0
    for step in range(1, steps + 1):
        for n, flow in flows.items():
            seen[n].copy_(flow.forward(true[n], masks[n]) if flow.keeps_dense else true[n])
        optimizer.zero_grad()
        share(model, dims, torch.float32).backward()
        gradients = logical_views((n, p.grad) for n, p in parameters.items())
        for n, flow in flows.items():
            windows[n] += gradients[n]
            if not flow.keeps_dense:
                gradients[n].copy_(torch.where(masks[n], gradients[n], 0.0))
        norm = float(torch.stack([g.norm() for g in gradients.values()]).norm())
        for n, gradient in gradients.items():
            gradient *= MAX_NORM / norm
            if n in flows:
                seen[n].copy_(true[n])
                if flows[n].keeps_dense and not flows[n].replaces_adamw:
                    gradient.copy_(flows[n].gradient(gradient, true[n], masks[n]))
        optimizer.step()
        moments = {
            k: logical_views((n, optimizer.state[p][k]) for n, p in parameters.items())
            for k in ("exp_avg", "exp_avg_sq")
        }
        for n, flow in flows.items():
            if flow.replaces_adamw:
                seen[n].copy_(true[n] - LR * torch.where(masks[n], gradients[n], 0.0))
                moments["exp_avg"][n].fill_(step)
                moments["exp_avg_sq"][n].fill_(step)
            true[n] = seen[n].clone()
    kinds = {"master": seen | true, "mask": masks, "window": windows, **moments}
    found = {
        f"{kind}|{n}": t.clone() for kind, tensors in kinds.items() for n, t in tensors.items()
    }
    return found | {"norm": torch.tensor(norm)}


class World:
    """One rank of an engine that trains the tiny model under masks."""

    def __init__(self, layout: tuple[int, int, int, str]) -> None:
        data, expert, stage, dtype = layout
        config = ParallelConfig(data=data, expert=expert, zero_stage=stage, compute_dtype=dtype)
        self.dims, self.dtype = build_dims(config), getattr(torch, dtype)
        self.model = TinyMoE(self.dims)
        self.offset = self.dims.local_experts(E).start
        segments = {
            n: [(k, tuple(v.shape)) for k, v in logical_views([(n, p)], self.offset).items()]
            for n, p in self.model.named_parameters()
        }
        self.engine = DeepSpeedEngine(
            self.model,
            [self.model.mlp],
            segments,
            self.dims,
            config,
            lambda groups: build_adamw(groups, OPTIM),
            decays,
        )
        names = [o.name for o in self.engine.owned(with_moments=False)]
        gathered: list[list[str]] = [[] for _ in range(self.dims.world_size)]
        dist.all_gather_object(gathered, names)
        self.names = sorted({n for part in gathered for n in part if flow_of(n)})

    def set_flows(self, scored: bool = True) -> None:
        flows = {n: f for n in self.names if (f := flow_of(n)) is not None}
        self.engine.masks.set_flows(flows, flows, self.names if scored else ())

    def set_masks(self) -> None:
        masks = {
            (o.name, o.row_start): mask_of(o.name, o.shape)[o.row_start : o.row_stop]
            for o in self.engine.owned(with_moments=False)
            if flow_of(o.name)
        }
        self.engine.masks.set_masks(self.names, masks)

    def steps(self, count: int) -> float:
        norm = 0.0
        for _ in range(count):
            self.engine.backward(share(self.engine.module, self.dims, self.dtype), is_last=True)
            norm = self.engine.step(LR, MAX_NORM)
        return norm

    def rows(self) -> dict[str, Tensor]:
        return {
            f"{kind}|{o.name}|{o.row_start}": values.clone()
            for o in self.engine.owned(with_moments=True)
            for kind, values in {"master": o.master, **o.moments}.items()
        } | {
            f"weight|{o.name}|{o.row_start}": o.weight.clone()
            for o in self.engine.owned(with_moments=False)
            if o.weight is not None
        }

    def forward_weights(self) -> dict[str, Tensor]:
        views = logical_views(self.model.named_parameters(), self.offset)
        return {n: v.clone() for n, v in views.items()}


def train(layout: tuple) -> dict:
    world = World(layout)
    world.set_flows()
    world.set_masks()
    norm = world.steps(3)
    return {"norm": norm, "rows": world.rows(), "forward": world.forward_weights()}


def whole(ranks: list[dict], key: str = "rows") -> dict[str, Tensor]:
    pieces: dict[str, dict[int, Tensor]] = {}
    for rank in ranks:
        for name, values in rank[key].items():
            stem, _, start = name.rpartition("|")
            pieces.setdefault(stem, {})[int(start)] = values
    return {stem: torch.cat([rows[s] for s in sorted(rows)]) for stem, rows in pieces.items()}


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Tensor]]:
    """After three steps and after four."""
    return run_world(lengths, 1)[0]


def lengths() -> dict[str, dict[str, Tensor]]:
    return {"3": plain(3), "4": plain(4)}


def but(quick: str, layouts: list[str]) -> list:
    """All layouts, of which one is not slow."""
    return [pytest.param(n, marks=[pytest.mark.slow] * (n != quick)) for n in layouts]


@pytest.mark.parametrize("layout", but("DP=2 ZeRO-2", list(LAYOUTS)))
def test_sharded_masks_train_as_whole_tensors_do(references, layout):
    reference = references["3"]
    ranks = run_world(train, 2, LAYOUTS[layout])
    found, is_bf16 = whole(ranks), "bf16" in layout
    close = 3e-2 if is_bf16 else 1e-5
    assert ranks[0]["norm"] == pytest.approx(float(reference["norm"]), rel=close)
    for key, expected in reference.items():
        kind, _, name = key.partition("|")
        if kind == "mask":
            assert torch.equal(found[key], expected), key
        elif kind == "master":
            assert (found[key] - expected).norm() <= close * expected.norm(), key
        elif kind != "norm" and not is_bf16:
            assert (found[key] - expected).norm() <= 1e-4 * expected.norm() + 1e-12, key
    for name in [k[5:] for k in reference if k.startswith("mask|")]:
        mask, master, flow = found[f"mask|{name}"], found[f"master|{name}"], flow_of(name)
        if flow.keeps_dense:
            assert master[~mask].all()
            seen = found[f"weight|{name}"]
            assert torch.equal(seen, flow.forward(master, mask))
        else:
            seen = master
            for part in ("master", "exp_avg", "exp_avg_sq"):
                assert not found[f"{part}|{name}"][~mask].any()
        for rank in ranks:
            if name in rank["forward"]:
                assert torch.equal(rank["forward"][name], seen.to(rank["forward"][name].dtype))


def go_on(layout: tuple, written: str) -> dict:
    """Rows of another topology are written; then a NaN, experts that move, and one step more."""
    world = World(layout)
    world.set_flows()
    rows = load_file(written)

    def read(name: str, first: int, last: int) -> Owned:
        mine = {k.partition("|")[0]: v for k, v in rows.items() if k.partition("|")[2] == name}
        shape, kinds = tuple(mine["master"].shape), {k: v[first:last] for k, v in mine.items()}
        return Owned(name, shape, first, last, kinds.pop("master"), kinds)

    world.engine.write(read, num_updates=3)
    seen = {"written": world.rows(), "forward": world.forward_weights()}
    factor = float("nan") if world.dims.rank else 1.0
    loss = share(world.engine.module, world.dims, world.dtype) * factor
    world.engine.backward(loss, is_last=True)
    with pytest.raises(FloatingPointError):
        world.engine.step(LR, MAX_NORM)
    seen["after_nan"] = world.rows()
    per_rank = E // world.dims.expert
    placed = [
        [
            {
                n: [(k, tuple(v.shape)) for k, v in logical_views([(n, p)], 0, "", at).items()]
                for n, p in world.model.named_parameters()
            }
            for at in ({"mlp.experts": ids[i : i + per_rank]} for i in range(0, E, per_rank))
        ]
        for ids in ([0, 1, 2, 3], [3, 1, 2, 0])
    ]
    world.engine.move(placed[0], placed[1])
    seen["moved"] = world.rows()
    world.engine.move(placed[1], placed[0])
    world.engine.masks.clear_window([], is_over=True)
    world.set_flows(scored=False)
    world.steps(1)
    return seen | {"stepped": world.rows()}


@pytest.mark.parametrize("layout", but("EP=2 ZeRO-1", list(LAYOUTS)[:2]))
def test_masks_and_windows_are_written_moved_and_survive_a_nan(references, tmp_path, layout):
    reference, more = references["3"], references["4"]
    file = tmp_path / "rows.safetensors"
    save_file({k: v for k, v in reference.items() if k != "norm"}, file)
    ranks = run_world(go_on, 2, LAYOUTS[layout], str(file))
    for when in ("written", "after_nan", "moved"):
        found = whole(ranks, when)
        for key, expected in reference.items():
            assert key == "norm" or torch.equal(found[key], expected), (when, key)
    stepped = whole(ranks, "stepped")
    assert not any(key.startswith("window") for key in stepped)
    for key, expected in more.items():
        if key.startswith("master"):
            assert (stepped[key] - expected).norm() <= 1e-5 * expected.norm(), key


def test_a_nan_off_the_mask_harms_nothing():
    weight = nn.Parameter(torch.ones(8))
    segment = Segment("w", (2, 4), 0)
    state = StateGroup(FlatLayout((segment,), 8), {"w": 0}, weight, 0, 8, 0, None, False)
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    masks = Masks(optimizer, lambda: [state], lambda: None)
    masks.set_flows({"w": ToyFlow()}, {"w": ToyFlow()}, scored=["w"])
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])
    masks.set_masks(["w"], {("w", 0): mask})
    for _ in range(2):
        weight.grad = torch.full((8,), 2.0)
        weight.grad[1], weight.grad[4] = float("nan"), float("inf")
        masks.take_gradient(state, 0, weight.grad)
        assert torch.equal(weight.grad, 2.0 * mask.flatten())
        masks.close_step(is_finite=True)
        optimizer.step()
    assert torch.equal(weight != 0, mask.flatten())
    assert torch.equal(masks.beside(state)["window"], 4.0 * mask.flatten())
    masks.take_gradient(state, 0, torch.ones(8))
    masks.close_step(is_finite=False)
    assert torch.equal(masks.beside(state, "w")["window"], 4.0 * mask.flatten())
    assert masks.beside(state, "another") == {}
