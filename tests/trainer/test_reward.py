import threading

import pytest
from gossamer.comm.rollout import Sample
from gossamer.launch.recipe import build_config
from gossamer.trainer.config import TokenizerConfig, TrainConfig
from gossamer.trainer.rl.gym_reward import GymReward
from gossamer.trainer.rl.reward import RewardError, exact_match, score_samples
from gossamer.trainer.task import Problem, build_problems
from gossamer.trainer.tokenizer import EOS_ID, train_tokenizer

TOKENIZER = train_tokenizer(["no merges"], TokenizerConfig(vocab_size=259))
PROBLEM = Problem(problem_id=3, question="8 + 9 =", answer="17")


def _sample(text, finished):
    token_ids = (*TOKENIZER.encode(text), *([EOS_ID] if finished else []))
    return Sample(
        request_id="0/1/2",
        token_ids=token_ids,
        logprobs=(0.0,) * len(token_ids),
        spans=(),
        finished=finished,
    )


@pytest.mark.parametrize(
    ("completion", "finished", "reward"),
    [
        (" 17", True, 1.0),
        ("17\n", True, 1.0),
        (" 17", False, 0.0),
        (" 171", True, 0.0),
        (" 17 17", True, 0.0),
        (" -17", True, 0.0),
        ("", True, 0.0),
    ],
)
def test_exact_match(completion, finished, reward):
    assert exact_match(completion, PROBLEM, finished) == reward
    sample = _sample(completion, finished)
    assert score_samples(exact_match, TOKENIZER, [sample], [PROBLEM]) == [reward]


@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        (lambda *_: float("nan"), "rl.reward gave nan for 0/1/2; expected a finite number"),
        (lambda *_: None, "rl.reward failed at 0/1/2: TypeError: float"),
        (lambda text, *_: int(text), "rl.reward failed at 0/1/2: ValueError: invalid literal"),
        (lambda text, *_: 1 / 0, "rl.reward failed at 0/1/2: ZeroDivisionError: division by zero"),
    ],
)
def test_what_a_model_says_does_not_end_a_run(reward, sentence):
    samples = [_sample("the answer is 17", True), _sample("17", True)]
    first, second = score_samples(reward, TOKENIZER, samples, [PROBLEM] * 2)
    assert isinstance(first, RewardError) and str(first).startswith(sentence)
    assert second == 17.0 or isinstance(second, RewardError)


def test_a_scorer_that_cannot_read_a_completion_gives_nothing_for_it():
    settings = {
        "model": {"hf": {"model_type": "qwen3_moe"}},
        "task": {"dataset": "prime_factorization", "parameters": {}, "size": 300, "min_heldout": 1},
        "phases": [{"name": "rl", "kind": "grpo", "max_steps": 1, "lr": 0.1}],
    }
    config = build_config(TrainConfig, settings, "train")
    reward, problem = GymReward(config), build_problems(config.task).train[0]
    assert reward("the answer is 7", problem, True) == 0.0
    assert reward(f" {problem.answer}", problem, True) == 1.0


def test_workers_judge_at_a_time_and_keep_the_order():
    together = threading.Barrier(4, timeout=10)

    def slow(completion, problem, finished):
        together.wait()  # goes on only when four are judged at once
        if completion == "2":
            raise RewardError("busy")
        return float(completion)

    samples = [_sample(str(number), True) for number in range(4)]
    found = score_samples(slow, TOKENIZER, samples, [PROBLEM] * 4, workers=4)
    assert found[:2] + found[3:] == [0.0, 1.0, 3.0] and isinstance(found[2], RewardError)
