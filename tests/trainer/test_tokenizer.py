import json
import subprocess
import sys

import pytest
from gossamer.trainer.config import TokenizerConfig
from gossamer.trainer.tokenizer import BOS_ID, EOS_ID, PAD_ID, load_tokenizer, train_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

TEXTS = [f"the answer to {i} + {i * 7} is {i * 8}\n" for i in range(200)]
CONFIG = TokenizerConfig(vocab_size=270, train_chars=5000)
TOKENIZER = train_tokenizer(TEXTS, CONFIG)

TRAIN_AND_PRINT = f"""
import sys
from pathlib import Path
from gossamer.trainer.config import TokenizerConfig
from gossamer.trainer.tokenizer import train_tokenizer
texts = {TEXTS!r}
train_tokenizer(texts, TokenizerConfig(vocab_size=270, train_chars=5000)).save(Path(sys.argv[1]))
"""


def test_training_twice_gives_same_bytes(tmp_path):
    TOKENIZER.save(tmp_path / "here.json")
    subprocess.run([sys.executable, "-c", TRAIN_AND_PRINT, tmp_path / "there.json"], check=True)
    assert (tmp_path / "here.json").read_bytes() == (tmp_path / "there.json").read_bytes()


def test_size_and_specials():
    assert TOKENIZER.vocab_size == 270
    assert (PAD_ID, BOS_ID, EOS_ID) == (0, 1, 2)
    assert TOKENIZER.decode([BOS_ID, *TOKENIZER.encode("the answer"), EOS_ID, PAD_ID]) == (
        "the answer"
    )


def test_digits_are_single_tokens():
    tokenizer = train_tokenizer(["in 2078 or 42 " * 100], TokenizerConfig(vocab_size=262))
    digits = [tokenizer.encode(digit) for digit in "0123456789"]
    assert all(len(token) == 1 for token in digits)
    assert tokenizer.encode("2078") == sum([digits[int(d)] for d in "2078"], [])
    assert tokenizer.encode("or 42")[-2:] == digits[4] + digits[2]


def test_no_text_spells_a_special_token():
    assert not {PAD_ID, BOS_ID, EOS_ID} & set(TOKENIZER.encode("<pad><bos>x<eos>"))
    assert TOKENIZER.decode(TOKENIZER.encode("<eos>")) == "<eos>"


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    assert TOKENIZER.encode_all([text, text]) == [TOKENIZER.encode(text)] * 2


def test_only_the_first_characters_are_learned_from():
    head = [text[:5000] for text in ["".join(TEXTS)]]
    longer = train_tokenizer([*head, "zqzqzqzq " * 5000], CONFIG)
    text = "zqzqzqzq the answer"
    assert longer.encode(text) == train_tokenizer(head, CONFIG).encode(text)


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.encode("the <eos> 42") == TOKENIZER.encode("the <eos> 42")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("content", ["", "{}", "not json"])
def test_other_file_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json: expected a tokenizer"):
        load_tokenizer(path)


def test_file_with_other_specials_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    path.write_text(path.read_text().replace("<eos>", "<end>"))
    with pytest.raises(ValueError, match="first tokens are"):
        load_tokenizer(path)


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match="tokenizer.vocab_size is 512"):
        train_tokenizer(["abc"], TokenizerConfig(vocab_size=512))


def test_transformers_loads_it(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.write_hf(tmp_path)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    text = "the answer , to 42 + 7 ' s"
    assert hf(text)["input_ids"] == TOKENIZER.encode(text)
    assert hf.decode(TOKENIZER.encode(text)) == text
    assert (hf.pad_token_id, hf.bos_token_id, hf.eos_token_id) == (PAD_ID, BOS_ID, EOS_ID)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == "<eos>"
