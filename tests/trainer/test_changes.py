"""Change masks beside sets of positions, over rows that are cut in any way."""

import pytest
import torch
from gossamer.comm.publisher import Rows
from gossamer.trainer.changes import MEASURES, ChangeMasks, _by_number, group_of
from hypothesis import given, settings
from hypothesis import strategies as st

NAMES = ["model.layers.0.mlp.experts.1.up_proj.weight", "model.layers.0.mlp.experts.1.w", "lm_head"]


@st.composite
def histories(draw):
    """Values of three tensors [rows, 3] over some steps, few different ones so that some return."""
    sizes = [draw(st.integers(1, 5)) for _ in NAMES]
    values = st.sampled_from([0.0, -0.0, 1.0, float("nan")])
    steps = draw(st.integers(1, 5))
    return [
        [
            torch.tensor(draw(st.lists(values, min_size=3 * n, max_size=3 * n))).view(n, 3)
            for n in sizes
        ]
        for _ in range(steps + 1)
    ]


def cut(tensors, at):
    """Rows of every tensor, cut behind row `at`, as ranks may own them."""
    for name, tensor in zip(NAMES, tensors, strict=True):
        for start, part in ((0, tensor[:at]), (at, tensor[at:])):
            if len(part):
                yield Rows(name, tuple(tensor.shape), start, part.bfloat16().contiguous())


def changed(before, after):
    bits = [t.bfloat16().view(torch.int16).flatten() for t in (before, after)]
    return set((bits[0] != bits[1]).nonzero().flatten().tolist())


@settings(deadline=None, max_examples=60)
@given(histories(), st.integers(1, 5))
def test_counts_equal_those_of_sets(history, at):
    masks = ChangeMasks(cut(history[0], at))
    ever = [set() for _ in NAMES]
    last = [set() for _ in NAMES]
    for step in range(1, len(history)):
        expected: dict[str, list[int]] = {}
        for i, name in enumerate(NAMES):
            now = changed(history[step - 1][i], history[step][i])
            net = changed(history[0][i], history[step][i])
            sizes = [history[0][i].numel(), len(now), len(now & last[i]), len(now & ever[i])]
            ever[i], last[i] = ever[i] | now, now
            numbers = [*sizes, len(ever[i]), len(net)]
            before = expected.get(group_of(name), [0] * len(MEASURES))
            expected[group_of(name)] = [a + b for a, b in zip(before, numbers, strict=True)]
        assert masks.measure(cut(history[step], at)) == expected


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.layers.3.mlp.experts.17.down_proj.weight", "3/expert 17"),
        ("model.layers.3.block_sparse_moe.experts.2.w1.weight", "3/expert 2"),
        ("model.layers.3.mlp.gate.weight", "3/router"),
        ("model.layers.3.block_sparse_moe.gate.weight", "3/router"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "3/router"),
        ("model.layers.12.self_attn.q_norm.weight", "12/attention"),
        ("model.layers.12.input_layernorm.weight", "12/norms"),
        ("model.layers.0.mlp.shared_experts.up_proj.weight", "0/shared"),
        ("model.layers.0.mlp.gate_proj.weight", "0/mlp"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
    ],
)
def test_groups(name, group):
    assert group_of(name) == group


def test_groups_come_in_the_order_of_their_numbers():
    groups = ["10/expert 2", "2/expert 10", "2/expert 9", "lm_head.weight", "2/attention"]
    ordered = sorted(groups, key=_by_number)
    assert ordered == ["lm_head.weight", "2/attention", "2/expert 9", "2/expert 10", "10/expert 2"]
