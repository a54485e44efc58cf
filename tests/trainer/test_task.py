import hashlib
from dataclasses import replace

import pytest
from gossamer.trainer.config import TaskConfig, TokenizerConfig
from gossamer.trainer.corpus import read_documents
from gossamer.trainer.task import answer_ids, build_problems, prompt_ids, split_of
from gossamer.trainer.tokenizer import BOS_ID, EOS_ID, train_tokenizer

DEFAULT = TaskConfig()
PROBLEMS = build_problems(DEFAULT)


def test_splits_are_disjoint_by_text_and_complete():
    splits = [PROBLEMS.train, PROBLEMS.dev, PROBLEMS.heldout]
    questions = [problem.question for split in splits for problem in split]
    assert len(questions) == len(set(questions)) >= 10_000
    ids = [problem.problem_id for split in splits for problem in split]
    assert sorted(ids) == list(range(len(questions)))
    assert len(PROBLEMS.heldout) >= 500 and len(PROBLEMS.dev) >= 250
    assert 0.05 < len(PROBLEMS.heldout) / len(questions) < 0.07


def test_split_is_sha256_of_the_text():
    for problem in PROBLEMS.heldout[:20]:
        assert int(hashlib.sha256(problem.question.encode()).hexdigest(), 16) % 1000 < 60
    question = PROBLEMS.train[0].question
    place = int(hashlib.sha256(question.encode()).hexdigest(), 16) % 1000
    assert split_of(question, replace(DEFAULT, heldout_permille=place + 1)) == "heldout"
    below = replace(DEFAULT, heldout_permille=place, dev_permille=1)
    assert split_of(question, below) == "dev"
    assert split_of(question, replace(below, dev_permille=0)) == "train"


def test_another_seed_moves_no_question():
    other = build_problems(replace(DEFAULT, seed=12345))
    assert other.train[0].question != PROBLEMS.train[0].question
    train = {problem.question for problem in other.train}
    assert not train & {problem.question for problem in PROBLEMS.heldout + PROBLEMS.dev}


def test_answers_are_right_and_generation_repeats():
    assert build_problems(DEFAULT) == PROBLEMS
    for problem in PROBLEMS.heldout[:100]:
        left, operator, right = problem.question.split(":")[1].removesuffix("=").split()
        result = int(left) + int(right) if operator == "+" else int(left) - int(right)
        assert problem.answer == str(result)


def test_prompt_and_answer_tokens():
    texts = [problem.text for problem in PROBLEMS.train[:2000]]
    tokenizer = train_tokenizer([*texts, *read_documents(None, 200_000)], TokenizerConfig())
    problem = PROBLEMS.train[0]
    prompt, answer = prompt_ids(tokenizer, problem), answer_ids(tokenizer, problem)
    assert prompt[0] == BOS_ID and answer[-1] == EOS_ID
    assert tokenizer.decode(prompt) == problem.question
    assert tokenizer.decode(answer) == f" {problem.answer}"
    assert tokenizer.decode(prompt + answer) == problem.text
    assert len(prompt) <= 20 and len(answer) <= 5


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"dataset": "no_such"}, "no_such"),
        ({"parameters": {"min_words": 3}}, "min_words"),
        ({"parameters": {"min_terms": 0}}, "min_terms must be positive"),
        ({"size": 300}, "expected at least 500 held-out"),
        ({"parameters": {"max_digits": 1, "max_terms": 2}}, "expected at least 500 held-out"),
    ],
)
def test_unusable_task_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=f"^task: .*{sentence}"):
        build_problems(replace(DEFAULT, **changes))
