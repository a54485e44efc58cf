import pytest
from gossamer.trainer.rl.config import RLConfig
from gossamer.trainer.rl.prompts import phase_seed, prompt_batch, requests_for
from hypothesis import given
from hypothesis import strategies as st


@given(st.integers(0, 2**40), st.integers(1, 9), st.integers(0, 30), st.integers(0, 3))
def test_an_epoch_asks_nothing_twice(seed, num_prompts, extra, epoch):
    num_problems = num_prompts + extra
    steps = num_problems // num_prompts
    asked = [
        problem
        for step in range(epoch * steps, (epoch + 1) * steps)
        for problem in prompt_batch(seed, step, num_prompts, num_problems)
    ]
    assert len(asked) == len(set(asked)) == steps * num_prompts
    assert set(asked) <= set(range(num_problems))


def test_order_depends_on_seed_and_epoch():
    first = prompt_batch(0, 0, 50, 50)
    assert first == prompt_batch(0, 0, 50, 50)
    assert sorted(first) == sorted(prompt_batch(0, 1, 50, 50)) == list(range(50))
    assert first != prompt_batch(0, 1, 50, 50)
    assert first != prompt_batch(1, 0, 50, 50)


def test_each_phase_has_a_seed_of_its_own_and_the_first_the_runs():
    seeds = [phase_seed(seed, phase) for seed in (0, 1) for phase in range(20)]
    assert seeds[0] == 0 and seeds[20] == 1 and len(set(seeds)) == 40
    assert phase_seed(11, 1) == phase_seed(11, 1) < 2**48


def test_too_few_problems_are_refused():
    with pytest.raises(ValueError, match="rl.prompts_per_step is 8, but the task has 7"):
        prompt_batch(0, 0, 8, 7)


def test_requests_by_hand():
    config = RLConfig(
        prompts_per_step=3,
        samples_per_prompt=2,
        prompts_per_unit=1,
        max_new_tokens=4,
        temperature=0.9,
    )
    units = requests_for(5, 11, {7: [1, 2], 3: [1, 9], 8: [1]}, config)
    assert [[request.request_id for request in unit] for unit in units] == [
        ["5/7/0", "5/7/1"],
        ["5/3/0", "5/3/1"],
        ["5/8/0", "5/8/1"],
    ]
    request = units[1][1]
    assert request.prompt_ids == (1, 9)
    assert request.key == (11, 5, 3, 1)
    assert (request.max_new_tokens, request.temperature) == (4, 0.9)


def test_units_are_fixed_by_the_config():
    prompts = {i: [1, i] for i in range(8)}
    config = RLConfig(prompts_per_step=8, prompts_per_unit=4, samples_per_prompt=5)
    units = requests_for(0, 0, prompts, config)
    assert [len(unit) for unit in units] == [20, 20]
    keys = [request.key for unit in units for request in unit]
    assert len(set(keys)) == 40
    assert units == requests_for(0, 0, prompts, config)
