"""A toy model's weights in a log, for tests: random bit patterns, moved a little or a lot."""

import torch
from gossamer.comm.config import LogConfig
from gossamer.comm.log import WeightLog
from gossamer.comm.publisher import Publisher, Rows

SHAPES = {
    "model.embed_tokens.weight": (150, 24),
    "model.layers.0.mlp.experts.0.down_proj.weight": (64, 40),
    "model.layers.0.mlp.experts.1.down_proj.weight": (64, 40),
    "model.layers.0.mlp.gate.weight": (3, 24),
    "model.norm.weight": (24,),
}
# for tests that make hundreds of versions
SMALL = {"model.layers.0.mlp.gate.weight": (70, 8), "model.norm.weight": (24,)}
CONFIG = LogConfig(anchor_every_versions=4, part_timeout_s=10.0, poll_s=0.002)


def random_patterns(shape, seed):
    """bf16 of uniformly random bits: NaN payloads, infinities, -0.0 and subnormals among them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-(2**15), 2**15, shape, generator=generator, dtype=torch.int16)
    flat = values.view(-1)
    # -0.0, +-inf, quiet and signalling NaNs
    odd = torch.tensor([-(2**15), 0x7F80, -0x80, 0x7FC1, 0x7F81], dtype=torch.int16)
    flat[: len(odd)] = odd
    return values.view(torch.bfloat16)


def toy_state(seed=0, shapes=SHAPES):
    return {
        name: random_patterns(shape, seed + i) for i, (name, shape) in enumerate(shapes.items())
    }


def moved(state, density, seed):
    """A copy with about `density` of the elements replaced by random patterns."""
    generator = torch.Generator().manual_seed(seed)
    after = {}
    for i, (name, values) in enumerate(state.items()):
        mask = torch.rand(values.shape, generator=generator) < density
        fresh = random_patterns(values.shape, seed + 1000 + i)
        after[name] = torch.where(mask, fresh.view(torch.int16), values.view(torch.int16)).view(
            torch.bfloat16
        )
    return after


def rows_of(state, part=0, num_parts=1):
    """This part's rows: matrices in bands of 64 rows, dealt round; vectors to part 0."""
    dealt = 0
    for name, values in state.items():
        if values.dim() == 1:
            if part == 0:
                yield Rows(name, tuple(values.shape), 0, values)
            continue
        for start in range(0, len(values), 64):
            if dealt % num_parts == part:
                yield Rows(name, tuple(values.shape), start, values[start : start + 64])
            dealt += 1


def zeros(shapes=SHAPES):
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


def same_bits(left, right):
    return left.keys() == right.keys() and all(
        torch.equal(left[name].view(torch.int16), right[name].view(torch.int16)) for name in left
    )


def new_writer(folder, config=CONFIG):
    """A log in `folder` and the only part of a new writer."""
    log = WeightLog.open(folder, create=True)
    return log, Publisher(log, 0, 1, log.claim_epoch(), config)
