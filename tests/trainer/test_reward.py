import threading

import pytest
from gossamer.comm.rollout import Sample
from gossamer.trainer.config import TokenizerConfig
from gossamer.trainer.rl.reward import RewardError, exact_match, score_samples
from gossamer.trainer.task import Problem
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


def test_a_reward_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="rl.reward gave nan for 0/1/2"):
        score_samples(lambda *_: float("nan"), TOKENIZER, [_sample("1", True)], [PROBLEM])


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
