"""Experts that move in the middle of training change no bit of what is learned."""

from pathlib import Path

import numpy as np
import pytest
import torch
from gloo_world import run_world
from gossamer.parallel.config import DispatchConfig, ParallelConfig
from gossamer.parallel.dims import ParallelDims, build_dims
from gossamer.parallel.placement.config import PlacementConfig
from gossamer.parallel.placement.placement import Placement, contiguous, save_placement
from gossamer.parallel.placement.problem import Topology, build_problem
from gossamer.parallel.placement.score import count_bytes, score
from gossamer.parallel.placement.trace import load_trace
from gossamer.parallel.placement.worth import Speed
from gossamer.trainer import replacement
from gossamer.trainer.batch import TokenBatch
from gossamer.trainer.config import DataConfig, ModelConfig, OptimConfig, PhaseConfig, TrainConfig
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.moe.trace import RoutingTrace
from gossamer.trainer.placement import PlacedExperts
from gossamer.trainer.replacement import LivePlacement
from gossamer.trainer.update import update

E, LAYERS = 8, 2
RUNS = {"still": {}, "moved": {0: 5, 1: 1, 3: 2}}
"""Before which step experts move, by which seed."""
HF = {
    "model_type": "qwen3_moe",
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": E,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "intermediate_size": 48,
    "tie_word_embeddings": False,
    "vocab_size": 96,
    "initializer_range": 0.2,
}


def shuffled(seed: int, ranks: int, experts: int = E, layers: int = LAYERS) -> Placement:
    random = np.random.default_rng(seed)
    slots_LS = np.stack([random.permutation(experts) for _ in range(layers)])
    return Placement(slots_LS=slots_LS, ranks=ranks, layers=tuple(range(layers)))


def fixed_batch(seed: int, rows: int = 8, length: int = 12) -> TokenBatch:
    """Each row has words of its own, so that experts have a place where they belong."""
    generator = torch.Generator().manual_seed(seed)
    words_BS = torch.randint(0, 11, (rows, length), generator=generator)
    return TokenBatch(
        token_ids_BS=8 + 11 * torch.arange(rows).unsqueeze(1) + words_BS,
        position_ids_BS=torch.arange(length).repeat(rows, 1),
        weights_BS=torch.ones(rows, length),
    )


class World:
    """One rank, with its model, its engine and where its experts live."""

    def __init__(self, parallel: ParallelConfig, **model: object) -> None:
        from gossamer.trainer.engine import build_engine

        self.config = TrainConfig(
            phases=(PhaseConfig(name="p", kind="next_token", max_steps=9, lr=1e-2),),
            model=ModelConfig(**{"hf": HF, "balance_loss_coef": 0.01, **model}),
            data=DataConfig(task_share=0.0),
            optim=OptimConfig(max_norm=0.5),
            parallel=parallel,
        )
        self.dims = build_dims(parallel)
        self.model = build_model(self.config.model, hf_config(self.config.model, {}), self.dims, 3)
        self.engine = build_engine(self.model, self.dims, parallel, self.config.optim)
        self.experts = PlacedExperts(self.model, self.engine, self.dims)

    def update(self, seed: int, trace: RoutingTrace | None = None) -> dict:
        """Numbers of a step on a batch of its own."""
        result = update(
            self.model, self.engine, self.dims, fixed_batch(seed), 1e-2, self.config, trace
        )
        return {
            "loss": result.loss,
            "balance": result.balance_loss,
            "norm": result.grad_norm,
            "load": torch.tensor(result.expert_load),
            "dropped": result.layers["dropped_share"],
            "bytes": [int(sum(result.layers[f"bytes_{link}"])) for link in ("in_node", "across")],
        }

    def rows(self) -> dict[str, torch.Tensor]:
        """What this rank owns, by kind|name|first row."""
        return {
            f"{kind}|{owned.name}|{owned.row_start}": values.clone()
            for owned in self.engine.owned(with_moments=True)
            for kind, values in {"master": owned.master, **owned.moments}.items()
        }


def train(folder: str, parallel: dict, dispatch: dict, model: dict, moves: dict[int, int]) -> dict:
    """Four steps; before step s, experts move to the placement of seed moves[s], or where live
    placement wants them if links are fast."""
    config = ParallelConfig(**parallel, dispatch=DispatchConfig(**dispatch))
    world, steps, sent, decisions = World(config, **model), [], 0, []
    live = LivePlacement(config, world.experts, world.dims)
    live._speed = Speed(pair_s=1.0, bytes_per_s=1e9)
    if config.placement.objective == "bytes":  # and the experts' state is nothing to send
        live._speed, replacement.STATE_BYTES = Speed(pair_s=0.0, bytes_per_s=1.0), 0
    if not config.placement.is_contiguous:
        moves = {}
    trace = RoutingTrace(Path(folder), world.dims.rank, 4)
    for step in range(4):
        if step in moves:
            now = world.experts.placement
            then = shuffled(moves[step], now.ranks, now.experts, len(now.layers))
            sent += world.experts.place(then)["bytes"]
        steps.append(world.update(step, trace))
        decision = live.after_update(step + 1, steps[-1]["load"].tolist())
        if decision is not None:
            decisions.append(decision)
            sent += decision.get("bytes", 0)
    return {"steps": steps, "rows": world.rows(), "sent": sent, "decisions": decisions}


def train_each(folder: str, cases: dict[str, list[dict]]) -> dict:
    """In each case: undisturbed, and with experts moved before the first step and twice later."""
    return {
        name: {
            which: train(f"{folder}/{name}/{which}", *_of(which, case), moves)
            for which, moves in RUNS.items()
        }
        for name, case in cases.items()
    }


def _of(which: str, case: list[dict]) -> list[dict]:
    """The case, without live placement where experts are to stay."""
    return case if which == "moved" else [case[0] | {"placement": PlacementConfig()}, *case[1:]]


def whole(ranks: list[dict]) -> dict[str, torch.Tensor]:
    """Tensors by kind|name from the rows of all ranks, each row once."""
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    for rank in ranks:
        for key, values in rank["rows"].items():
            stem, _, start = key.rpartition("|")
            assert int(start) not in pieces.setdefault(stem, {})
            pieces[stem][int(start)] = values
    return {stem: torch.cat([rows[s] for s in sorted(rows)]) for stem, rows in pieces.items()}


def assert_same(ranks: list[dict], name: str) -> None:
    """The run `name` ends as the undisturbed one, bit by bit, and had the same numbers."""
    for rank in ranks:
        for still, moved in zip(rank["still"]["steps"], rank[name]["steps"], strict=True):
            for key in still.keys() - {"bytes"}:
                found, value = moved[key], still[key]
                same = torch.equal(found, value) if key == "load" else found == value
                assert same, (name, key, found, value)
    expected, found = (whole([rank[which] for rank in ranks]) for which in ("still", name))
    assert expected.keys() == found.keys()
    for key, values in expected.items():
        assert torch.equal(found[key], values), (name, key)
    assert sum(rank[name]["sent"] for rank in ranks) > 0


def assert_each_same(folder: Path, world_size: int, cases: dict[str, list[dict]]) -> list[dict]:
    ranks = run_world(train_each, world_size, str(folder), cases)
    for name in cases:
        of_case = [rank[name] for rank in ranks]
        assert len({step["loss"] for step in of_case[0]["still"]["steps"]}) == 4
        assert_same(of_case, "moved")
    return ranks


def test_a_run_whose_experts_move_is_the_run_in_which_they_stay(tmp_path):
    """With a bias that follows the load, and pairs dropped at random."""
    drops = {"capacity_factor": 1.0, "drop_policy": "random"}
    live = {"expert": 2, "placement": PlacementConfig(every_steps=2)}
    cases: dict[str, list[dict]] = {
        "EP=2 ZeRO-1": [{"expert": 2}, drops, {"router": "sigmoid_bias"}],
        "live": [live, {}, {}],
    }
    ranks = assert_each_same(tmp_path, 2, cases)
    assert max(ranks[0]["EP=2 ZeRO-1"]["moved"]["steps"][0]["dropped"]) > 0
    decisions = ranks[0]["live"]["moved"]["decisions"]
    assert len(decisions) == 2 and decisions[0]["is_moved"]
    assert decisions[0]["max_over_mean_after"] < decisions[0]["max_over_mean"]
    assert decisions[0]["bytes"] > 0 and ranks[1]["live"]["moved"]["decisions"][0]["is_moved"]


def test_so_it_is_on_four_ranks_and_bytes_are_those_foretold(tmp_path):
    """And four ranks as two nodes: what dispatch counts is what the trace and the placement say."""
    # of three experts a rank, ZeRO's cut goes through a matrix
    odd = {"hf": {**HF, "num_experts": 6, "num_hidden_layers": 1}}
    cases: dict[str, list[dict]] = {"EP=2 DP=2 ZeRO-1": [{"expert": 2, "data": 2}, {}, odd]}
    for levels in (1, 2):
        cases[f"levels={levels}"] = [{"expert": 4}, {"levels": levels, "ranks_per_node": 2}, {}]
    live = PlacementConfig(every_steps=2, objective="bytes")
    cases["live"] = [{"expert": 4, "placement": live}, {"levels": 2, "ranks_per_node": 2}, {}]
    ranks = assert_each_same(tmp_path, 4, cases)
    still, moved = (ranks[0]["live"][which] for which in RUNS)
    assert moved["decisions"][0]["is_moved"]
    across = [run["steps"][2]["bytes"][1] for run in (still, moved)]  # later on routing has changed
    assert across[1] < across[0]
    topology = Topology(nodes=2, ranks_per_node=2)
    for name, dispatch in {"levels=1": "one_level", "levels=2": "two_level"}.items():
        found = set()
        for which, moves in RUNS.items():
            trace, placement = load_trace(tmp_path / name / which, E), contiguous(LAYERS, E, 4)
            counts = [LAYERS * count for count in count_bytes(topology, E, dispatch)]
            for step in range(4):
                if step in moves:
                    placement = shuffled(moves[step], 4)
                problem = build_problem(
                    trace.between(step, step + 1),
                    topology,
                    objective="bytes",
                    dispatch=dispatch,
                    row_bytes=4 * HF["hidden_size"],
                )
                foretold = score(problem, placement)
                counted = ranks[0][name][which]["steps"][step]["bytes"]
                expected = [foretold.in_node_bytes, foretold.across_bytes]
                assert counted == [a + b for a, b in zip(expected, counts, strict=True)]
                found.add(tuple(counted))
        assert len(found) > 4  # a placement makes a difference


@pytest.mark.slow
def test_so_it_is_at_other_zero_stages_and_with_other_routers(tmp_path):
    cases: dict[str, list[dict]] = {
        f"EP={expert} DP={4 // expert} ZeRO-{stage}": [
            {"expert": expert, "data": 4 // expert, "zero_stage": stage},
            {},
            {},
        ]
        for expert in (2, 4)
        for stage in (0, 2)
    }
    for router in ("dense_to_sparse", "smoe_dropout"):
        cases[router] = [{"expert": 4}, {}, {"router": router}]
    assert_each_same(tmp_path, 4, cases)


def test_a_file_that_does_not_fit_is_refused_in_a_sentence(tmp_path):
    dims = ParallelDims(data=1, expert=2, rank=0, expert_group=None)
    config = ModelConfig(hf=HF)
    model = build_model(config, hf_config(config, {}), dims, 3)
    experts = PlacedExperts(model, None, dims)  # which no move is asked of
    fitting = contiguous(LAYERS, E, 2)
    for wrong, expected in {
        contiguous(LAYERS, 4, 2): "experts 4; expected 8",
        contiguous(3, E, 2): r"layers \(0, 1, 2\); expected \(0, 1\)",
        contiguous(LAYERS, E, 4): "ranks 4; expected 2",
    }.items():
        save_placement(wrong, tmp_path / "p.json")
        with pytest.raises(ValueError, match=f"^{tmp_path}/p.json has {expected} as in the model$"):
            experts.place_file(tmp_path / "p.json")
    (tmp_path / "p.json").write_text('{"format"')
    with pytest.raises(ValueError, match="^.*/p.json is not a placement: .*$"):
        experts.place_file(tmp_path / "p.json")
    with pytest.raises(FileNotFoundError, match="^parallel.placement.path=.*/none.json is no file"):
        experts.place_file(tmp_path / "none.json")
    assert (experts.placement.slots_LS == fitting.slots_LS).all()
    assert experts.blocks[0].physical_E is None


def test_one_rank_has_nothing_to_place():
    with pytest.raises(ValueError, match="parallel.placement needs parallel.expert above 1"):
        ParallelConfig(placement=PlacementConfig(every_steps=10))
    for wrong in ({"every_steps": -1}, {"objective": "luck"}, {"time_limit_s": 0.0}):
        with pytest.raises(ValueError, match=f"parallel.placement.{next(iter(wrong))} is"):
            PlacementConfig(**wrong)
