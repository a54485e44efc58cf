"""Records traces of real training: two models, a warm phase, then a few steps at each rate.

The one idea: what is recorded is what a publisher would publish, the round-to-nearest-even bf16
cast of fp32 masters that AdamW (0.9, 0.95) has moved. After the warm phase at a usual rate, with
the moments that it left, the rate is switched and a few consecutive steps are recorded; then the
next rate goes on from there. Weight decay and clipping stay as they are.

    python -m gossamer.launch.bench.record NAME FOLDER      NAME: own, hf, own-quick or hf-quick
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from gossamer.launch.bench.traces import Trace, save_trace
from gossamer.launch.recipe import load_recipe
from gossamer.trainer.config import DataConfig, OptimConfig, PhaseConfig, TokenizerConfig
from rich.console import Console
from rich.progress import track
from torch import Tensor

MODELS = ("own", "hf")
LEARNING_RATES, STEPS = (1e-4, 1e-5, 1e-6, 1e-7), 3
"""Recorded in this order; so many consecutive steps of each."""
QUICK_LEARNING_RATES, QUICK_STEPS = (1e-5, 1e-6), 1
WARM_STEPS, QUICK_WARM_STEPS = 70, 15

RECIPE = "pretrain_stdlib"
ONE_PROCESS = ("train.parallel.expert=1", "train.metrics.wandb_mode=disabled")
QUICK_RECIPE = (
    "train.model.hf.hidden_size=64",
    "train.model.hf.num_hidden_layers=2",
    "train.model.hf.num_attention_heads=2",
    "train.model.hf.moe_intermediate_size=64",
    "train.tokenizer={vocab_size: 1024, train_chars: 400000}",
    "train.data={seq_len: 64, num_rows: 8, task_share: 0.0, corpus_chars: 500000}",
)


@dataclass(frozen=True, slots=True)
class Training:
    """A model in training that can be stepped and looked at."""

    what: str
    warm: PhaseConfig
    step: Callable[[PhaseConfig], None]
    """One optimizer step of a phase."""
    weights: Callable[[], dict[str, Tensor]]
    """The bf16 cast of the masters, by Hugging Face name."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HfShape:
    """Sizes of the dense model and of what it reads."""

    hidden_size: int = 512
    layers: int = 14
    vocab_size: int = 8192
    corpus_chars: int = 6_000_000
    num_rows: int = 8
    seq_len: int = 128


QUICK_HF = HfShape(hidden_size=256, layers=2, vocab_size=1024, corpus_chars=500_000, seq_len=64)


def record(
    name: str, training: Training, folder: Path, warm_steps: int, rates: Sequence[float], steps: int
) -> None:
    """Warms up, then writes one trace a rate."""
    for _ in track(range(warm_steps), f"{name}: warm steps", console=Console(stderr=True)):
        training.step(training.warm)
    for lr in rates:
        phase = replace(training.warm, lr=lr, warmup_steps=0, final_lr_share=1.0)
        snapshots = [training.weights()]
        for _ in track(range(steps), trace_name(name, lr), console=Console(stderr=True)):
            training.step(phase)
            snapshots.append(training.weights())
        how = f"{training.what}; {warm_steps} warm steps at lr {training.warm.lr:g}, then lr {lr:g}"
        save_trace(Trace(trace_name(name, lr), how, snapshots), folder)


def trace_name(model: str, lr: float) -> str:
    """`own-lr-1e-06`, also the name of the file."""
    return f"{model}-lr-{lr:.0e}"


@contextmanager
def own_training(overrides: Sequence[str]) -> Iterator[Training]:
    """A shipped recipe as one rank of one replica, by the trainer's own session."""
    import torch.distributed as dist
    from gossamer.trainer.prepare import prepare_run
    from gossamer.trainer.session import RunPlace, Session

    config = load_recipe(RECIPE, [*ONE_PROCESS, *overrides]).train
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # DeepSpeed asks for them
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/gloo", rank=0, world_size=1)
        prepare_run(config, Path(folder), RECIPE)
        session = Session(config, RunPlace(run_dir=Path(folder), name=RECIPE), None, lambda _: None)

        def step(phase: PhaseConfig) -> None:
            session.update(phase)

        def weights() -> dict[str, Tensor]:
            bands: dict[str, list[Tensor]] = {}
            for owned in session.engine.owned(with_moments=False):
                bands.setdefault(owned.name, []).append(owned.master.bfloat16())
            return {name: torch.cat(bands[name]) for name in sorted(bands)}

        size = session.model.num_parameters()[0] / 1e6
        what = f"our trainer in one process, recipe {RECIPE}, Qwen3-MoE of {size:.1f}M parameters"
        yield Training(f"{what}, fp32", config.phases[0], step, weights)


@contextmanager
def hf_training(sizes: HfShape) -> Iterator[Training]:
    """A random-initialised dense Qwen3 of transformers on the standard library's source."""
    from gossamer.trainer.corpus import read_documents
    from gossamer.trainer.data.mixture import corpus_source
    from gossamer.trainer.data.stream import TokenStream
    from gossamer.trainer.losses import next_token_loss_sum
    from gossamer.trainer.optim import build_adamw, decays, lr_at
    from gossamer.trainer.tokenizer import token_fields, train_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    texts = list(read_documents(None, sizes.corpus_chars))
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocab_size=sizes.vocab_size))
    source = corpus_source(tokenizer, texts, 1.0, sizes.seq_len)
    data = DataConfig(seq_len=sizes.seq_len, num_rows=sizes.num_rows, task_share=0.0)
    stream = TokenStream([source], data, seed=1)
    hf = AutoConfig.for_model(
        "qwen3",
        hidden_size=sizes.hidden_size,
        num_hidden_layers=sizes.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=3 * sizes.hidden_size,
        tie_word_embeddings=False,
        **token_fields(tokenizer.vocab_size),
    )
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(hf, dtype=torch.float32, attn_implementation="sdpa")
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for n, p in named.items() if decays(n, p) is yes], "weight_decay": decay}
        for yes, decay in ((True, 0.1), (False, 0.0))
    ]
    optimizer = build_adamw(groups, OptimConfig())
    warm = PhaseConfig(name="warm", kind="next_token", max_steps=1000, lr=6e-4, warmup_steps=10)
    done = 0

    def step(phase: PhaseConfig) -> None:
        nonlocal done
        batch = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            logits_BSV = model(
                input_ids=batch.token_ids_BS, position_ids=batch.position_ids_BS, use_cache=False
            ).logits
        (next_token_loss_sum(logits_BSV, batch) / batch.weights_BS.sum()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(phase, done)
        optimizer.step()
        optimizer.zero_grad()
        done += 1

    def weights() -> dict[str, Tensor]:
        return {name: parameter.detach().bfloat16() for name, parameter in named.items()}

    size = sum(parameter.numel() for parameter in named.values()) / 1e6
    what = f"transformers' dense Qwen3, random-initialised, {size:.1f}M parameters, bf16 autocast"
    yield Training(what, warm, step, weights)


def main(name: str, folder: Path) -> None:
    """Records all traces of one model."""
    model, _, quick = name.partition("-")
    if model == "own":
        context = own_training(QUICK_RECIPE if quick else ())
    else:
        context = hf_training(QUICK_HF if quick else HfShape())
    with context as training:
        if quick:
            record(name, training, folder, QUICK_WARM_STEPS, QUICK_LEARNING_RATES, QUICK_STEPS)
        else:
            record(name, training, folder, WARM_STEPS, LEARNING_RATES, STEPS)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
    sys.stderr.flush()
    os._exit(0)  # gloo's and DeepSpeed's threads would go on
