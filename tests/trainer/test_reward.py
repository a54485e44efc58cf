import pytest
from gossamer.comm.rollout import Sample
from gossamer.trainer.config import TokenizerConfig
from gossamer.trainer.rl.reward import exact_match, score_samples
from gossamer.trainer.tokenizer import EOS_ID, train_tokenizer

TOKENIZER = train_tokenizer(["no merges"], TokenizerConfig(vocab_size=259))


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
    assert exact_match(completion, "17", finished) == reward
    sample = _sample(completion, finished)
    assert score_samples(exact_match, TOKENIZER, [sample], ["17"]) == [reward]


def test_a_reward_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="rl.reward gave nan for 0/1/2"):
        score_samples(lambda *_: float("nan"), TOKENIZER, [_sample("1", True)], ["1"])
