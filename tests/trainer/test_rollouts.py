"""What a step learns from when prompts are lost, unscored, or teach nothing; no engine is run."""

from dataclasses import dataclass, field

import pytest
from gossamer.comm.rollout import Request, Sample, VersionSpan
from gossamer.launch.recipe import build_config
from gossamer.trainer.config import TokenizerConfig, TrainConfig
from gossamer.trainer.rl.reward import RewardError
from gossamer.trainer.rl.rollouts import RolloutBatches
from gossamer.trainer.task import Problem, TaskProblems
from gossamer.trainer.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["no merges"], TokenizerConfig(vocab_size=259))
PROBLEMS = [Problem(problem_id=100 + n, question=f"{n}?", answer="a") for n in range(12)]


def by_sample(completion: str, problem: Problem, finished: bool) -> float:
    """Of the first eight problems all samples earn the same; one cannot be judged."""
    if problem.problem_id == 111:
        raise RewardError("111 is beyond the judge")
    return float(completion == "b") if problem.problem_id >= 108 else 0.5


def broken(completion: str, problem: Problem, finished: bool) -> float:
    return float(completion)


@dataclass
class Scripted:
    """A RolloutSource: sample g of a prompt is "a", or "b" where g is 1; some prompts are lost."""

    lost: set[int] = field(default_factory=set)
    asked: dict[str, list[int]] = field(default_factory=dict)

    def submit(self, batch: str, units: list[list[Request]], oldest_version: int) -> None:
        assert batch.startswith("heldout") or all(len(unit) == 4 for unit in units)
        self._units, self._version = units, oldest_version
        self.asked[batch] = [int(r.request_id.split("/")[1]) for unit in units for r in unit[::2]]

    def collect(self, batch: str) -> list[Sample]:
        return [
            Sample(
                request_id=request.request_id,
                token_ids=tuple(TOKENIZER.encode("ab"[int(request.request_id[-1])])),
                logprobs=(-1.0,),
                spans=(VersionSpan(start=0, stop=1, version=self._version - 1),),
                finished=True,
            )
            for unit in self._units
            for request in unit
            if int(request.request_id.split("/")[1]) not in self.lost
        ]

    def audit(self, version: int) -> dict[str, str]:
        return {}


def batches(source: Scripted, **options) -> RolloutBatches:
    rl = {
        "prompts_per_step": 4,
        "samples_per_prompt": 2,
        "prompts_per_unit": 2,
        "reward": "test_rollouts:by_sample",
        "normalise_by_std": False,
        **options,
    }
    settings = {
        "model": {"hf": {"model_type": "qwen3_moe"}},
        "task": {},
        "rl": rl,
        "phases": [{"name": "rl", "kind": "grpo", "max_steps": 9, "lr": 0.1}],
    }
    config = build_config(TrainConfig, settings, "train")
    problems = TaskProblems(train=PROBLEMS, dev=[], heldout=PROBLEMS[:3])
    made = RolloutBatches(source, TOKENIZER, problems, config, rows_multiple=1)
    made.ask_ahead(5, range(0, 9))
    return made


def test_other_prompts_are_asked_until_there_are_enough_that_teach():
    source = Scripted()
    # 111 is unscored, so three of twelve teach: all must have been asked, and none twice
    batch, told = batches(source, refill_rounds=9, drop_unscored=True).collect(0)
    every = [problem for asked in source.asked.values() for problem in asked]
    assert sorted(every) == [100 + n for n in range(12)]
    assert list(source.asked) == ["0", *(f"0+{n}" for n in range(1, told.refills + 1))]
    assert (told.groups, told.groups_learned, told.groups_lost) == (11, 3, 1)
    assert int((batch.weights_BS != 0).sum()) == 6
    assert (told.staleness_mean, told.staleness_max) == (1.0, 1)
    assert told.score_s > 0
    again = Scripted()
    batches(again, refill_rounds=9, drop_unscored=True).collect(0)
    assert again.asked == source.asked


def test_no_more_groups_are_learned_from_than_a_step_has():
    rl = {"prompts_per_step": 2, "refill_rounds": 9, "drop_unscored": True}
    batch, told = batches(Scripted(), **rl).collect(0)
    assert told.groups_learned == 2 and int((batch.weights_BS != 0).sum()) == 4


def test_without_refill_a_step_learns_from_what_is_left():
    batch, told = batches(Scripted(), drop_unscored=True).collect(0)
    assert told.refills == 0 and told.groups + told.groups_lost == 4
    assert int((batch.weights_BS != 0).sum()) == 2 * told.groups_learned


def test_a_lost_prompt_takes_its_group_with_it():
    source = Scripted()
    made = batches(source, drop_unscored=True, drop_constant_groups=False)
    source.lost = set(source.asked["0"][:3])
    _, told = made.collect(0)
    assert told.groups == told.groups_learned == 1 and told.groups_lost == 3
    assert list(told.samples_learned.values()) == [[0, 1]]


def test_a_second_phase_asks_and_samples_otherwise():
    asked = []
    for phase in (0, 1, 1):
        source = Scripted()
        made = batches(source)
        made.ask_ahead(6, range(1, 9), phase)
        asked.append((source.asked["1"], [r.key for unit in source._units for r in unit]))
    assert asked[1] == asked[2] and asked[1][0] != asked[0][0]
    assert not set(asked[0][1]) & set(asked[1][1])
    assert all(key[:2] == (made._config.seed, 1) for key in asked[0][1])


def test_why_no_prompt_was_scored_is_said():
    made = batches(Scripted(), reward="test_rollouts:broken", drop_unscored=True)
    with pytest.raises(RuntimeError, match="none of update 0's .* scored; rl.reward failed at 0/"):
        made.collect(0)


def test_nothing_left_is_said():
    source = Scripted()
    made = batches(source)
    source.lost = set(range(100, 112))
    with pytest.raises(RuntimeError, match="none of update 0's prompts was answered"):
        made.collect(0)
    assert made.heldout_exact_match() == (0.0, 3)


def test_an_unscored_prompt_ends_the_run_unless_told_otherwise():
    source = Scripted()
    made = batches(source, prompts_per_step=12)
    with pytest.raises(RewardError, match="111 is beyond the judge"):
        made.collect(0)
