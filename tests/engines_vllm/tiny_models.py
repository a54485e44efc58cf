"""Tiny random models as Hugging Face folders, a log that moves their weights, what vLLM answers."""

import os

import torch
from gossamer.comm.codec.part import Rows
from gossamer.comm.config import LogConfig
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher
from gossamer.comm.rollout import Request
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = {"max_model_len": 128, "kv_cache_memory_bytes": 1 << 24, "max_num_seqs": 8}
EOS = 1
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "initializer_range": 0.2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
# experts first: an engine without any leaves its process without groups for those that have some;
# vLLM's CPU kernel pads a width of 40, not one of 96
MODELS = {
    "qwen3_moe": {
        **SHAPE,
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 40,
        "num_experts": 4,
        "num_experts_per_tok": 2,
    },
    "mixtral": {
        **SHAPE,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "qwen3": {**SHAPE, "model_type": "qwen3", "tie_word_embeddings": True},
}


class Trained:
    """A model, the log of its versions, and a trainer that moves 2 % of its weights a step."""

    def __init__(self, name, folder):
        torch.manual_seed(0)
        self.config = MODELS[name]
        self.folder = folder / "model"
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**self.config), dtype=torch.bfloat16
        )
        model.save_pretrained(self.folder)
        self.state = load_file(self.folder / "model.safetensors")
        self.log = WeightLog.open(folder / "log", create=True)
        self.publisher = Publisher(self.log, config=LogConfig(anchor_every_versions=8))
        self.publish()

    def publish(self):
        rows = [Rows(name, tuple(each.shape), 0, each) for name, each in self.state.items()]
        self.publisher.publish(rows, step=0)

    def step(self):
        for tensor in self.state.values():
            here = torch.rand(tensor.shape) < 0.02
            tensor[here] = (tensor[here].float() * 1.25 + 0.02).to(tensor.dtype)
        self.publish()

    def save(self):
        """The folder with the newest weights, as a checkpoint of the trainer would be."""
        save_file(self.state, self.folder / "model.safetensors", metadata={"format": "pt"})
        return os.fspath(self.folder)


def requests(count=4):
    return [
        Request(
            request_id=f"{i}",
            prompt_ids=tuple(range(3, 7 + 2 * i)),
            max_new_tokens=24,
            temperature=0.0,
            key=(i,),
        )
        for i in range(count)
    ]


def answers(samples):
    return [(sample.token_ids, sample.logprobs) for sample in samples]


def start_llm(folder, **options):
    """vLLM's own offline engine on the checkpoint in `folder`."""
    from gossamer.comm.engines.vllm_offline import out_of_sight
    from vllm import LLM

    with out_of_sight("llvmlite.binding.ffi"):
        return LLM(
            model=folder,
            dtype="bfloat16",
            skip_tokenizer_init=True,
            enforce_eager=True,
            enable_prefix_caching=False,
            **(SMALL | options),
        )


def answers_of_llm(llm):
    """What `answers` of VLLMEngine.generate are to be."""
    from vllm import SamplingParams

    outputs = llm.generate(
        [{"prompt_token_ids": list(each.prompt_ids)} for each in requests()],
        SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    found = []
    for output in (each.outputs[0] for each in outputs):
        pairs = zip(output.token_ids, output.logprobs, strict=True)
        logprobs = tuple(each[token].logprob for token, each in pairs)
        found.append((tuple(output.token_ids), logprobs))
    return found
