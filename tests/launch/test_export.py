"""Any checkpoint of a run becomes a Hugging Face folder, wherever it lies; a torn one does not."""

from pathlib import Path

import pytest
import torch
from gossamer.comm.names import logical_views
from gossamer.launch.config import RunConfig
from gossamer.launch.export import export_run
from gossamer.launch.recipe import build_config
from gossamer.parallel.dims import ParallelDims
from gossamer.parallel.engine import Owned
from gossamer.trainer.checkpoint import list_checkpoints
from gossamer.trainer.checkpoint_writer import Target, take_snapshot, write_checkpoint
from gossamer.trainer.model import build_model, hf_config
from gossamer.trainer.prepare import load_run_tokenizer, prepare_run
from s3_server import S3Server, s3_environment
from tiny_run import SETTINGS
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def bucket():
    server = S3Server()
    server.put("bucket")
    with s3_environment(server.port):
        yield "s3://bucket/run"
    server.close()


def save(run_dir: Path, config: RunConfig, root: str, step: int) -> dict[str, torch.Tensor]:
    """A checkpoint of random weights from `step`, in files that cut them; returns its masters."""
    train = config.train
    hf = hf_config(train.model, load_run_tokenizer(run_dir).hf_fields())
    alone = ParallelDims(data=1, expert=1, rank=0, expert_group=None)
    model = build_model(train.model, hf, alone, seed=step)
    masters = {n: v.detach() for n, v in logical_views(model.module.named_parameters()).items()}
    rows = [Owned(n, tuple(v.shape), 0, len(v), v, {}) for n, v in masters.items()]
    target = Target(root=root, step=step, epoch=1)
    write_checkpoint(target, take_snapshot(rows, 0), "{}", file_bytes=5000)
    return masters


@pytest.mark.parametrize("place", ["folder", "s3"])
def test_by_step_from_any_store_into_transformers(tmp_path, capsys, request, place):
    url = request.getfixturevalue("bucket") if place == "s3" else None
    settings = {**SETTINGS, "checkpoint": {"url": url}}
    config = build_config(RunConfig, {"name": "test", "train": settings}, "")
    prepare_run(config.train, tmp_path, "test")
    with pytest.raises(FileNotFoundError, match="holds no whole checkpoint to export"):
        export_run(config, tmp_path, tmp_path / "none")

    root = url or str(tmp_path / "checkpoints")
    masters = {step: save(tmp_path, config, root, step) for step in (2, 4)}
    for step, expected in ((2, 2), (None, 4)):
        out = export_run(config, tmp_path, tmp_path / f"out-{step}", step)
        loaded = logical_views(AutoModelForCausalLM.from_pretrained(out).named_parameters())
        assert loaded.keys() == masters[expected].keys()
        for name, master in masters[expected].items():
            assert loaded[name].dtype == torch.bfloat16
            assert torch.equal(loaded[name], master.to(torch.bfloat16)), name
    with pytest.raises(
        FileNotFoundError, match=r"no checkpoint of step 3; expected one of \[2, 4\]"
    ):
        export_run(config, tmp_path, tmp_path / "none", 3)
    assert not (tmp_path / "none").exists()

    if place == "folder":
        path = min(Path(list_checkpoints(root)[-1]).glob("*.safetensors"))  # of weights
        path.write_bytes(path.read_bytes()[:-1])
        capsys.readouterr()
        export_run(config, tmp_path, tmp_path / "whole")
        assert f"passing over {root}/step-00000004-e0001" in capsys.readouterr().err
        two, whole = (tmp_path / n / "model.safetensors" for n in ("out-2", "whole"))
        assert whole.read_bytes() == two.read_bytes()
        with pytest.raises(ValueError, match=f"{path} does not have the bytes"):
            export_run(config, tmp_path, tmp_path / "torn", 4)
