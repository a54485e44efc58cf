"""Tokenizers of Hugging Face folders, against what transformers makes of the same folder."""

import json
from pathlib import Path

import hf_tokenizers
import pytest
from gossamer.trainer.config import ModelConfig, PhaseConfig, TokenizerConfig, TrainConfig
from gossamer.trainer.data.config import DataConfig
from gossamer.trainer.prepare import load_run_tokenizer, prepare_run
from gossamer.trainer.tokenizer import load_tokenizer
from transformers import AutoTokenizer

KINDS = [hf_tokenizers.qwen_like, hf_tokenizers.llama_like, hf_tokenizers.mistral_like]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def folder(request, tmp_path) -> Path:
    return request.param(tmp_path / "hf")


def test_tokens_are_those_of_transformers(folder):
    ours, theirs = load_tokenizer(folder / "tokenizer.json"), AutoTokenizer.from_pretrained(folder)
    for text in (*hf_tokenizers.TEXTS, "", "  two  blanks\n\n", "a quite long text " * 9):
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.start_ids + ours.encode(text) == theirs(text, truncation=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(ours.encode(text))
    assert ours.eos_id == theirs.eos_token_id and ours.pad_id == theirs.pad_token_id
    assert ours.vocab_size == len(theirs)
    assert ours.chat_template == theirs.chat_template


def test_a_text_cannot_spell_a_special_token(folder):
    ours = load_tokenizer(folder / "tokenizer.json")
    specials = {ours.eos_id, *ours.start_ids}
    text = "".join(ours.special_tokens.values())
    assert not specials & set(ours.encode(text))
    assert ours.decode(ours.encode(text)) == text
    assert specials & set(ours.encode_spelled([text])[0][0])


def test_a_run_and_its_export_keep_the_tokenizer(folder, tmp_path):
    config = TrainConfig(
        phases=(PhaseConfig(name="a", kind="next_token", max_steps=1, lr=0.1),),
        model=ModelConfig(hf={"model_type": "qwen3_moe"}),
        tokenizer=TokenizerConfig(path=str(folder)),
        data=DataConfig(task_share=0.0),
    )
    prepare_run(config, tmp_path / "run", "test")
    ours = load_run_tokenizer(tmp_path / "run")
    assert ours.fingerprint() == load_tokenizer(folder / "tokenizer.json").fingerprint()
    (tmp_path / "out").mkdir()
    ours.write_hf(tmp_path / "out")
    first, last = (AutoTokenizer.from_pretrained(f) for f in (folder, tmp_path / "out"))
    text = "What is naïve? 你好"
    assert first(text, truncation=False)["input_ids"] == last(text)["input_ids"]
    assert first.special_tokens_map == last.special_tokens_map
    assert first.chat_template == last.chat_template


def test_a_template_may_be_given_and_names_of_several_are_read(tmp_path):
    folder = hf_tokenizers.llama_like(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    several = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": several}))
    assert load_tokenizer(folder / "tokenizer.json").chat_template == "d"
    (folder / "chat_template.jinja").write_text("j")
    assert load_tokenizer(folder / "tokenizer.json").chat_template == "j"


@pytest.mark.parametrize(
    ("file", "content", "sentence"),
    [
        ("tokenizer.json", "{}", "tokenizer.json: expected a tokenizer of gossamer's or"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("tokenizer_config.json", "[]", "tokenizer_config.json is a list; expected an object"),
        ("tokenizer_config.json", "{}", "tokenizer.json: the eos_token is None; expected"),
        ("tokenizer_config.json", '{"eos_token": "<no>"}', "the eos_token is '<no>'; expected"),
    ],
)
def test_a_folder_that_cannot_be_right_is_named(tmp_path, file, content, sentence):
    folder = hf_tokenizers.qwen_like(tmp_path)
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        load_tokenizer(folder / "tokenizer.json")
