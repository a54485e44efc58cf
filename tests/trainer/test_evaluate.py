"""Exact match by one forward pass against decoding for real, token by token."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from gossamer.parallel.dims import ParallelDims
from gossamer.trainer.batch import Document, TokenBatch
from gossamer.trainer.config import DataConfig, HeldoutConfig, ModelConfig, PhaseConfig, TrainConfig
from gossamer.trainer.evaluate import greedy_exact_match
from gossamer.trainer.model import MoEModel, build_model, hf_config
from gossamer.trainer.step.heldout import HeldoutText

ALONE = ParallelDims(data=1, expert=1, rank=0, expert_group=None)
EOS, VOCAB = 2, 12
HF = {
    "model_type": "qwen3_moe",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "intermediate_size": 16,
    "vocab_size": VOCAB,
    "initializer_range": 0.5,
}


@dataclass
class Documents:
    """The part of a Source that evaluation looks at."""

    documents: list[Document]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("gloo") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def model(alone) -> MoEModel:
    config = ModelConfig(hf=HF)
    return build_model(config, hf_config(config, {}), ALONE, seed=2)


@torch.no_grad()
def decode(model: MoEModel, prompt: list[int], max_tokens: int) -> list[int]:
    """Greedy, the whole prefix again for every token, until <eos> or max_tokens."""
    ids, model.context.is_real_T = list(prompt), None
    while len(ids) < len(prompt) + max_tokens and (len(ids) == len(prompt) or ids[-1] != EOS):
        logits = model.module(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


def prompts(num: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(4)
    lengths = torch.randint(1, 6, (num,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


@pytest.mark.parametrize("seq_len", [9, 20, 64])
def test_the_share_is_that_of_decoding(model, seq_len):
    """Answers: the model's own, or with one token changed, at any place, packed side by side."""
    documents, right = [], 0
    for number, prompt in enumerate(prompts(40)):
        answer = decode(model, prompt, max_tokens=4)
        if number % 3 == 0:
            place = number % len(answer)
            answer[place] = (answer[place] + 1) % VOCAB
        right += decode(model, prompt, max_tokens=len(answer)) == answer
        documents.append(Document(token_ids=[*prompt, *answer], learn_from=len(prompt)))
    assert 0 < right < len(documents)
    share = greedy_exact_match(model, ALONE, Documents(documents), seq_len)
    assert share == right / len(documents)


def test_a_corpus_too_small_to_hold_anything_out_is_refused():
    class EmptyFeed:
        def heldout(self, kind: str) -> TokenBatch:
            raise ValueError(f"source {kind!r} holds no documents")

    phase = PhaseConfig(name="p", kind="next_token", max_steps=1, lr=1.0)
    config = TrainConfig(
        phases=(phase,),
        model=ModelConfig(hf=HF),
        data=DataConfig(task_share=0.0),
        heldout=HeldoutConfig(every_steps=5, permille=3),
    )
    with pytest.raises(ValueError, match="heldout.permille is 3: source 'next_token' holds no"):
        HeldoutText(config, EmptyFeed())
    off = HeldoutText(replace(config, heldout=HeldoutConfig()), EmptyFeed())
    assert off.measure(None, ALONE, phase, step=5) is None


def test_all_and_none(model):
    answers = [(prompt, decode(model, prompt, 3)) for prompt in prompts(6)]
    own = [Document(token_ids=p + a, learn_from=len(p)) for p, a in answers]
    wrong = [
        Document(token_ids=[*p, *a[:-1], (a[-1] + 1) % VOCAB], learn_from=len(p))
        for p, a in answers
    ]
    assert greedy_exact_match(model, ALONE, Documents(own), 16) == 1.0
    assert greedy_exact_match(model, ALONE, Documents(wrong), 16) == 0.0


def test_it_leaves_no_gradient(model):
    document = Document(token_ids=[3, 4, 5], learn_from=1)
    greedy_exact_match(model, ALONE, Documents([document]), 8)
    assert all(parameter.grad is None for parameter in model.module.parameters())
