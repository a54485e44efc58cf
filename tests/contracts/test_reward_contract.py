"""What every Reward keeps. Yours: GOSSAMER_REWARD=my_package.mod:name pytest <this file>."""

import math
import os

import pytest
from gossamer.launch.recipe import build_config
from gossamer.trainer.config import TrainConfig
from gossamer.trainer.rl.config import REWARDS
from gossamer.trainer.rl.reward import build_reward
from gossamer.trainer.task import build_problems
from reward_server import serve_rewards

NAMES = [*REWARDS, *filter(None, [os.environ.get("GOSSAMER_REWARD")])]


@pytest.fixture(scope="module")
def url():
    with serve_rewards() as address:
        yield address


@pytest.fixture(params=NAMES)
def asked(request, url):
    """(reward, a problem of the task it was built for)."""
    settings = {
        "model": {"hf": {"model_type": "qwen3_moe"}},
        "task": {"size": 300, "min_heldout": 1},
        "rl": {"reward": request.param, "http": {"url": url}},
        "phases": [{"name": "rl", "kind": "grpo", "max_steps": 1, "lr": 0.1}],
    }
    config = build_config(TrainConfig, settings, "train")
    return build_reward(config), build_problems(config.task).train[0]


def completions(answer: str) -> list[str]:
    texts = ["", " ", "x" * 1000, "\ufffd\x00", "<eos>", '"}', f"{answer} {answer}", "-" + answer]
    return [f" {answer}", answer, *texts]


@pytest.mark.parametrize("finished", [True, False])
def test_any_text_gives_the_same_finite_number_twice(asked, finished):
    reward, problem = asked
    for completion in completions(problem.answer):
        score = reward(completion, problem, finished)
        assert isinstance(score, float) and math.isfinite(score)
        assert score == reward(completion, problem, finished)


def test_nothing_beats_the_answer(asked):
    reward, problem = asked
    right = reward(f" {problem.answer}", problem, True)
    scores = [reward(completion, problem, True) for completion in completions(problem.answer)]
    assert max(scores) <= right and min(scores) < right
