"""One run through one codec, the way PartEncoder takes it there."""

import dataclasses

import numpy as np
from gossamer.comm.codec import build_codec
from gossamer.comm.codec.bits import find_changed
from gossamer.comm.codec.model import build_model, count_changes, count_elements

DTYPES = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32, "int8": np.uint8,
          "uint8": np.uint8, "float8_e4m3fn": np.uint8, "int32": np.uint32}  # fmt: skip


def coded(codec, run, old, new):
    """`run` with its payload, the way PartEncoder makes it."""
    positions, before, after = find_changed(old, new)
    run = dataclasses.replace(run, codec=codec, count=len(positions))
    if codec == "dense":
        run, positions, after = dataclasses.replace(run, count=len(new)), None, new
    elif codec == "entropy":
        model = build_model(count_changes(count_elements(old, run.dtype), before, after, run.dtype))
        run = dataclasses.replace(run, model=model)
    blocks = build_codec(codec).encode(run, old, positions, after)
    assert len(blocks) == run.num_blocks
    return dataclasses.replace(run, block_nbytes=tuple(map(len, blocks)), payload=b"".join(blocks))
