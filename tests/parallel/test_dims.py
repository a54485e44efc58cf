"""Sizes of the mesh: what is refused, in one sentence, and who holds which experts."""

import pytest
from gossamer.parallel.config import ParallelConfig
from gossamer.parallel.dims import ParallelDims, build_dims


def test_a_product_that_is_not_the_world_is_refused():
    with pytest.raises(ValueError) as refused:
        build_dims(ParallelConfig(data=2, expert=3))
    assert str(refused.value) == (
        "parallel.data=2 x parallel.expert=3 = 6 ranks, but the world has 1"
    )


@pytest.mark.parametrize("expert", [3, 16])
def test_expert_parallelism_that_does_not_divide_the_experts_is_refused(expert):
    dims = ParallelDims(data=1, expert=expert, rank=0, expert_group=None)
    with pytest.raises(ValueError) as refused:
        dims.local_experts(8)
    assert str(refused.value) == (f"parallel.expert={expert} does not divide the model's 8 experts")


def test_zero_stage_3_is_refused_and_why():
    with pytest.raises(ValueError, match=r"^parallel.zero_stage=3 is refused: .*expert") as refused:
        ParallelConfig(zero_stage=3)
    assert "use 0, 1 or 2" in str(refused.value)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"data": 0}, "parallel.data"),
        ({"expert": -1}, "parallel.expert"),
        ({"reduce_bucket_elements": 0}, "parallel.reduce_bucket_elements"),
        ({"zero_stage": 4}, "parallel.zero_stage"),
        ({"zero_stage": -1}, "parallel.zero_stage"),
        ({"compute_dtype": "float16"}, "parallel.compute_dtype"),
        ({"compute_dtype": "bfloat16", "zero_stage": 0}, "parallel.compute_dtype=bfloat16"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(fields, name):
    with pytest.raises(ValueError, match=name):
        ParallelConfig(**fields)


@pytest.mark.parametrize(("data", "expert"), [(1, 1), (1, 4), (2, 2), (3, 2)])
def test_each_expert_is_on_data_ranks_once_per_data_rank(data, expert):
    held: dict[int, list[int]] = {}
    for rank in range(data * expert):
        dims = ParallelDims(data=data, expert=expert, rank=rank, expert_group=None)
        assert dims.rank == dims.data_rank * expert + dims.expert_rank
        assert dims.world_size == data * expert
        for e in dims.local_experts(8):
            held.setdefault(e, []).append(dims.data_rank)
    assert held == {e: list(range(data)) for e in range(8)}
