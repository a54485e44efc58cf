"""Losses and gradients of every family do not depend on EP, DP or ZeRO stage (DECISIONS 11)."""

import pytest
from gloo_world import run_world
from test_equal_under_topology import train_on, whole_tensors
from tiny_families import FAMILIES, hf_fields


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen3_moe"}))
def test_same_loss_and_gradients_as_one_rank(family):
    fields = hf_fields(family)
    reference = run_world(train_on, 1, 1, 1, 0, 8, 8, 1, fields)
    expected = whole_tensors(reference, 4)
    for data, expert, zero_stage in ((1, 2, 0), (1, 2, 2), (2, 2, 1)):
        ranks = run_world(train_on, data * expert, data, expert, zero_stage, 8, 8, 1, fields)
        for rank in ranks:
            assert rank["losses"] == pytest.approx(reference[0]["losses"], rel=1e-6)
            assert rank["load"].equal(reference[0]["load"])
        gradients = whole_tensors(ranks, 4)
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            difference = (gradients[name] - gradient).norm()
            assert difference <= 1e-5 * gradient.norm(), (name, data, expert, zero_stage)
