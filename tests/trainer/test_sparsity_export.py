"""An exported weight has the bits that the forward pass saw and that would be published."""

import json
import math
from pathlib import Path

import pytest
import torch
from gossamer.comm.codec.bits import tensor_bits
from gossamer.parallel.engine import Owned
from gossamer.trainer.checkpoint import MASK, Checkpoint
from gossamer.trainer.checkpoint_writer import Target, take_snapshot, write_checkpoint
from gossamer.trainer.sparsity.export import SparseCheckpoint
from gossamer.trainer.sparsity.flow import Flow

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "flow", [Flow("ste"), Flow("soft", keep=0.25), Flow("soft"), Flow("dense")], ids=repr
)
def test_masked_weights_are_exported_as_the_forward_pass_took_them(tmp_path: Path, flow: Flow):
    master = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    mask = torch.arange(128).view(8, 16) % 3 == 0
    if not flow.keep and flow.kind != "dense":
        master[~mask & (master > 1.0)] = math.nan
    share = 1.0 if flow.kind == "dense" else flow.keep
    state = {"sparsity": {"alive": {NAME: share} if share else {}}}
    rows = [Owned(NAME, (8, 16), 0, 8, master, {MASK: mask})]
    target = Target(root=str(tmp_path), step=1, epoch=1)
    write_checkpoint(target, take_snapshot(rows, 0), json.dumps(state))
    exported = SparseCheckpoint(Checkpoint(target.url)).weight(NAME)
    seen = flow.forward(master, mask)
    assert (tensor_bits(exported) == tensor_bits(seen)).all()
    assert share or not torch.signbit(exported[~mask]).any()
