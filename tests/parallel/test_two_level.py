"""Two-level dispatch: the bits of one level, fewer rows across nodes, and every byte foretold.

One world of four ranks runs every layout; rank 3 has no token.
"""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gloo_world import run_world
from gossamer.parallel.config import DispatchConfig, ParallelConfig
from gossamer.parallel.dims import build_dims
from gossamer.parallel.dispatch import Dispatcher
from gossamer.trainer.moe.experts import GroupedExperts

D, F, E, K = 8, 4, 8, 3
TOKENS = (9, 14, 7, 0)
LAYOUTS = {"2 nodes x 2": (1, 4, 2), "4 nodes x 1": (1, 4, 1), "2 replicas": (2, 2, 1)}
"""(data, expert, ranks_per_node)"""
CAPACITY = (None, 1.0)
KEYS = ("y", "x", "gate_up", "down", "weight")


def given(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    total = sum(TOKENS)
    shapes = {"x": (total, D), "dy": (total, D), "gate_up": (E, 2 * F, D), "down": (E, D, F)}
    drawn = {n: torch.randn(s, generator=generator).to(dtype) for n, s in shapes.items()}
    # uneven on purpose: low experts are liked
    scores_TE = torch.rand(total, E, generator=generator) - torch.arange(E) / 10
    drawn["weight"], drawn["expert"] = scores_TE.softmax(-1).to(dtype).topk(K)
    return drawn


def layer(layout: tuple[int, int, int], levels: int, capacity: float | None, dtype: torch.dtype):
    data, expert, per_node = layout
    config = DispatchConfig(levels=levels, ranks_per_node=per_node, capacity_factor=capacity)
    dims = build_dims(ParallelConfig(data=data, expert=expert, dispatch=config))
    dispatcher, all_of = Dispatcher(dims, E), given(dtype)
    first, local = sum(TOKENS[: dims.rank]), dims.local_experts(E)
    mine, held = slice(first, first + TOKENS[dims.rank]), slice(local.start, local.stop)
    experts = GroupedExperts(all_of["gate_up"][held].clone(), all_of["down"][held].clone())
    x_TD = all_of["x"][mine].clone().requires_grad_()
    weight_TK = all_of["weight"][mine].clone().requires_grad_()
    expert_TK = all_of["expert"][mine]
    kept_TK = dispatcher.kept(expert_TK, weight_TK, step=3)
    x_RD, count_e, route = dispatcher.dispatch(x_TD, expert_TK, kept_TK)
    y_TD = dispatcher.combine(experts(x_RD, count_e), weight_TK, route)
    (y_TD * all_of["dy"][mine]).sum().backward()
    sent = dispatcher.traffic.take()
    assert dispatcher.traffic.forward_across == 0
    return {
        "y": y_TD.detach(),
        "x": x_TD.grad,
        "weight": weight_TK.grad,
        "gate_up": experts.gate_up_proj.grad,
        "down": experts.down_proj.grad,
        "rows": x_RD.detach(),
        "kept": torch.ones_like(expert_TK, dtype=torch.bool) if kept_TK is None else kept_TK,
        "sent": {name: getattr(sent, name) for name in type(sent).__slots__},
        "ranks": [
            sorted(dist.get_process_group_ranks(group)) if group else None
            for group in (dims.expert_group, dims.node_group, dims.rail_group)
        ],
    }


def every_case() -> dict:
    return {
        f"{name}/{levels}/{capacity}": layer(layout, levels, capacity, torch.float32)
        for name, layout in LAYOUTS.items()
        for levels in (1, 2)
        for capacity in CAPACITY
    }


@pytest.fixture(scope="module")
def ranks() -> list[dict]:
    return run_world(every_case, 4)


@pytest.mark.parametrize("capacity", CAPACITY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_levels_give_the_bits_of_one(ranks, layout, capacity):
    for rank in ranks:
        one, two = (rank[f"{layout}/{levels}/{capacity}"] for levels in (1, 2))
        for key in (*KEYS, "rows"):
            assert torch.equal(one[key], two[key]), key
        assert one["ranks"][1:] == [None, None]
        assert two["rows"].isfinite().all()


def predicted(layout: str, levels: int, kept: np.ndarray, itemsize: int) -> list[dict]:
    """Bytes that each rank sends, from the experts chosen and the layout alone."""
    _, expert_size, per_node = LAYOUTS[layout]
    expert_TK = given(torch.float32)["expert"].numpy()
    sums = [dict.fromkeys(("f_in", "f_across", "b_in", "b_across", "i_across"), 0) for _ in TOKENS]
    owner_of = lambda e, rank: rank - rank % expert_size + e // (E // expert_size)  # noqa: E731
    first, row = 0, D * itemsize
    for rank, tokens in enumerate(TOKENS):
        for t in range(first, first + tokens):
            chosen = [owner_of(e, rank) for e, k in zip(expert_TK[t], kept[t], strict=True) if k]
            away = [o for o in chosen if o // per_node != rank // per_node]
            once = {o // per_node for o in away}
            for owner in chosen:
                # with two levels the sender's place on the owner's node hands the row on
                at = owner // per_node * per_node + rank % per_node if levels == 2 else rank
                if owner // per_node == at // per_node and owner != at:
                    sums[at]["f_in"] += row  # dispatch
                    sums[owner]["f_in"] += row  # combine
                    sums[at]["b_in"] += row
                    sums[owner]["b_in"] += row
            sums[rank]["f_across"] += row * (len(once) if levels == 2 else len(away))
            sums[rank]["b_across"] += row * len(away)
            sums[rank]["i_across"] += 4 * len(away) if levels == 2 else 0
            for owner in away:
                back = owner // per_node * per_node + rank % per_node if levels == 2 else owner
                sums[back]["f_across"] += row
                sums[back]["b_across"] += row
        first += tokens
    return sums


@pytest.mark.parametrize("capacity", CAPACITY)
@pytest.mark.parametrize("levels", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_those_foretold(ranks, layout, levels, capacity):
    found = [rank[f"{layout}/{levels}/{capacity}"] for rank in ranks]
    kept_TK = torch.cat([rank["kept"] for rank in found]).numpy()
    _, expert_size, per_node = LAYOUTS[layout]
    nodes, local = expert_size // per_node, E // expert_size
    for rank, expected in zip(found, predicted(layout, levels, kept_TK, 4), strict=True):
        sent = rank["sent"]
        assert sent["forward_in_node"] == expected["f_in"]
        assert sent["forward_across"] == expected["f_across"]
        assert sent["backward_in_node"] == expected["b_in"]
        assert sent["backward_across"] == expected["b_across"]
        if levels == 1:  # a count for each expert of another rank
            assert sent["index_in_node"] == 8 * local * (per_node - 1)
            assert sent["index_across"] == 8 * local * (expert_size - per_node)
        else:  # counts by expert and of tokens over the rail; counts by source inside the node
            heads = 8 * (nodes - 1) * (per_node * local + 1)
            assert sent["index_in_node"] == 8 * (per_node - 1) * nodes * local
            assert sent["index_across"] == heads + expected["i_across"]


def test_a_token_crosses_to_a_node_once(ranks):
    one, two = (
        sum(r[f"2 nodes x 2/{levels}/None"]["sent"]["forward_across"] for r in ranks)
        for levels in (1, 2)
    )
    expert_TK, node_size = given(torch.float32)["expert"], E // 2
    home_T = torch.arange(4).repeat_interleave(torch.tensor(TOKENS)) // 2
    off_TK = expert_TK // node_size != home_T.unsqueeze(1)
    assert one == int(2 * off_TK.sum()) * D * 4
    assert two == int(off_TK.any(1).sum() + off_TK.sum()) * D * 4 < one


def test_groups_are_nodes_and_rails(ranks):
    groups = [rank["2 nodes x 2/2/None"]["ranks"] for rank in ranks]
    assert [g[1] for g in groups] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [g[2] for g in groups] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert [rank["2 replicas/2/None"]["ranks"][2] for rank in ranks] == [[0, 1]] * 2 + [[2, 3]] * 2


def test_dropped_pairs_contribute_nothing(ranks):
    for rank in ranks:
        whole, cut = (rank[f"2 nodes x 2/2/{capacity}"] for capacity in CAPACITY)
        dropped = ~cut["kept"]
        assert cut["sent"]["dropped"] == int(dropped.sum())
        assert cut["sent"]["pairs"] == dropped.numel()
        assert (cut["weight"][dropped] == 0).all()
        untouched = ~dropped.any(1)
        torch.testing.assert_close(cut["y"][untouched], whole["y"][untouched])
    assert sum(rank["2 nodes x 2/2/1.0"]["sent"]["dropped"] for rank in ranks) > 5
