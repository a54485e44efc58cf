"""A run leaves no secret behind: in config, metrics, report, its logs, Ray's or wandb's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from gossamer.launch.cli import main
from tiny_run import SETTINGS

SECRETS = (
    *("WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "GOSSAMER_LOG_TOKEN"),
    *("GOSSAMER_METRICS_TOKEN", "GOSSAMER_REWARD_TOKEN", "GOSSAMER_ENGINE_TOKEN"),
    "RAY_JOB_HEADERS",
)
TESTS = Path(__file__).parent.parent


def files_with(folder: Path, word: bytes) -> list[Path]:
    """Files under a folder, links into Ray's logs followed, that hold the word."""
    walked = (
        Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names
    )
    return [path for path in walked if path.is_file() and word in path.read_bytes()]


@pytest.mark.slow
def test_no_file_of_a_run_holds_a_secret(tmp_path, capsys):
    run_dir, key = tmp_path / "run", tmp_path / "key"
    assert main(["log", "keygen", str(key)]) == 0
    train = {
        **SETTINGS,
        "log": {"signing_key_path": str(key)},
        "metrics": {"wandb_mode": "offline"},
    }
    recipe = tmp_path / "tiny.json"
    recipe.write_text(json.dumps({"name": "tiny", "train": train, "rollout": {"engines": 1}}))
    secrets = {name: f"secret-of-{name.lower()}-7c41" for name in SECRETS}
    command = [sys.executable, "-m", "gossamer.launch.cli", "rl", recipe, "--run-dir", run_dir]
    done = subprocess.run(
        command, env={**os.environ, **secrets, "PYTHONPATH": str(TESTS)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"secret-of" not in done.stdout + done.stderr
    assert len(files_with(run_dir, b"tiny")) > 5  # it looks where it should: Ray's logs and wandb's
    assert any("ray" in path.parts for path in files_with(run_dir, b"raylet"))
    assert any("wandb" in path.parts for path in files_with(run_dir, b"moe_intermediate_size"))
    assert files_with(run_dir, b"secret-of") == []
    private = key.read_text().splitlines()
    assert [word for word in private if files_with(run_dir, word.encode())] == []
    # signed all along, and by this key
    assert main(["log", "verify", str(run_dir / "log"), "--public-key", f"{key}.pub"]) == 0
    assert "all sound, signed by" in capsys.readouterr().out
