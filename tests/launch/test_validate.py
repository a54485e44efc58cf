"""`gossamer validate`: names without meaning and rows that are too short are told beforehand."""

import pytest
from gossamer.launch.cli import main

SMALL = ["train.task.size=900", "train.task.min_heldout=10", "train.tokenizer.vocab_size=300"]

RARE = "{kind: linear, density: 0.5, every_steps: 9999}"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["train.model.router=topk"], "model.router is 'topk'; expected one of ["),
        (["train.model.router=no.such:Router"], "there is no module no.such"),
        (["train.sparsity={method: 'no.such:Plan'}"], "there is no module no.such"),
        (["train.sparsity={rules: [{criterion: 'no.such:f'}]}"], "there is no module no.such"),
        ([f"train.sparsity={{rules: [{{schedule: {RARE}}}]}}"], "schedule.every_steps is 9999, so"),
        (["train.model.hf.model_type=qwen3"], "model.hf.model_type is qwen3; expected one whose"),
        (["train.rl.reward=exact"], "rl.reward is 'exact'; expected one of ['exact_match', "),
        (["train.rl.reward=no_such:f"], "rl.reward is 'no_such:f', but there is no module"),
        (["--data", *SMALL, "train.rl.seq_len=12"], "rl.seq_len is 12; expected at least"),
        (["--data", *SMALL, "train.data.seq_len=12"], "data.seq_len is 12; expected at least"),
    ],
)
def test_what_cannot_run_is_refused_by_name(arguments, sentence, capsys):
    assert main(["validate", "demo", *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_what_can_run_is_printed(capsys):
    assert main(["validate", "demo", "--data", *SMALL, "train.model.router=smoe_dropout"]) == 0
    assert '"router": "smoe_dropout"' in capsys.readouterr().out
