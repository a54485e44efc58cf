import dataclasses

import pytest
from gossamer.trainer.config import DataConfig, TaskConfig, TokenizerConfig
from gossamer.trainer.rl.config import RLConfig


@pytest.mark.parametrize(
    ("config", "fields", "sentence"),
    [
        (TokenizerConfig, {"vocab_size": 258}, "tokenizer.vocab_size is 258; .*at least 259"),
        (TokenizerConfig, {"train_chars": 0}, "tokenizer.train_chars is 0"),
        (TaskConfig, {"dataset": ""}, "task.dataset is empty"),
        (TaskConfig, {"parameters": {"seed": 3}}, "task.parameters holds .'seed'"),
        (TaskConfig, {"size": 0}, "task.size is 0"),
        (TaskConfig, {"seed": -1}, "task.seed is -1"),
        (TaskConfig, {"dev_permille": -1}, "task.dev_permille is -1"),
        (TaskConfig, {"heldout_permille": 980}, "is 1010; expected less than 1000"),
        (DataConfig, {"seq_len": 1}, "data.seq_len is 1; expected at least 2"),
        (DataConfig, {"num_rows": 0}, "data.num_rows is 0"),
        (DataConfig, {"task_share": 1.5}, "data.task_share is 1.5"),
        (DataConfig, {"corpus_chars": 0}, "data.corpus_chars is 0"),
        (RLConfig, {"temperature": 0.0}, "rl.temperature is 0.0"),
        (RLConfig, {"samples_per_prompt": 1}, "rl.samples_per_prompt is 1"),
        (RLConfig, {"prompts_per_step": 12}, "rl.prompts_per_unit is 8; .*divisor.*12"),
        (RLConfig, {"seq_len": 8}, "rl.seq_len is 8; .*max_new_tokens"),
        (RLConfig, {"clip_low": 1.0}, "rl.clip_low is 1.0"),
        (RLConfig, {"clip_high": -0.1}, "rl.clip_high is -0.1"),
        (RLConfig, {"importance_cap": 0.0}, "rl.importance_cap is 0.0"),
        (RLConfig, {"baseline": "mean"}, "rl.baseline is mean; expected one of"),
        (RLConfig, {"loss_mean": "token"}, "rl.loss_mean is token; expected one of"),
        (RLConfig, {"baseline": "leave_one_out"}, "rl.normalise_by_std is true with .*leave_one"),
        (RLConfig, {"refill_rounds": -1}, "rl.refill_rounds is -1"),
        (RLConfig, {"refill_rounds": 1, "drop_constant_groups": False}, "rl.refill_rounds is 1"),
        (RLConfig, {"kl_coef": -0.1}, "rl.kl_coef is -0.1"),
        (RLConfig, {"reward_workers": 0}, "rl.reward_workers is 0"),
    ],
)
def test_what_cannot_be_right_is_refused(config, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        config(**fields)


@pytest.mark.parametrize("config", [DataConfig, RLConfig, TaskConfig, TokenizerConfig])
def test_configs_are_frozen(config):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(config(), dataclasses.fields(config)[0].name, 1)
