"""What every Reward keeps. Yours: GOSSAMER_REWARD=my_package.mod:name pytest <this file>."""

import math
import os

import pytest
from gossamer.trainer.import_path import resolve
from gossamer.trainer.rl.config import REWARDS

NAMES = [*REWARDS, *filter(None, [os.environ.get("GOSSAMER_REWARD")])]
COMPLETIONS = [" 17", "17", "", " ", "-3", "x" * 1000, "\ufffd\x00", "17 17", "<eos>"]


@pytest.fixture(params=NAMES)
def reward(request):
    return resolve(request.param, REWARDS, "rl.reward")


@pytest.mark.parametrize("finished", [True, False])
def test_any_text_gives_the_same_finite_number_twice(reward, finished):
    for completion in COMPLETIONS:
        score = reward(completion, "17", finished)
        assert isinstance(score, float) and math.isfinite(score)
        assert score == reward(completion, "17", finished)


def test_nothing_beats_the_answer(reward):
    right = reward(" 17", "17", True)
    assert all(reward(completion, "17", True) <= right for completion in COMPLETIONS)
    assert any(reward(completion, "17", True) < right for completion in COMPLETIONS)
