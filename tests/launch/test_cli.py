"""The command line: quick where it can be, one sentence and an exit code where it must refuse."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from gossamer.launch.cli import main
from gossamer.launch.recipe import dump_config, load_recipe
from synthetic_run import SyntheticRun

HEAVY = ("torch", "ray", "transformers", "deepspeed", "plotly", "wandb")
ASK = f"""
import sys
from gossamer.launch.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
print("loaded", [name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
sys.exit(code)
"""
# a run that is started by mistake ends soon
NO_RUN = ["train.task.dataset=no_such_dataset"]


def ask(*words: str) -> tuple[subprocess.CompletedProcess, float]:
    """A fresh interpreter's answer and the CPU seconds it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", ASK, *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def refused(capsys, *words: str) -> str:
    """The one sentence on stderr of a command that ends with exit code 1."""
    assert main(list(words)) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gossamer: ") and captured.err.count("\n") == 1
    return captured.err


def test_help_is_quick_and_names_every_command():
    done, cpu_s = ask("--help")
    assert done.returncode == 0
    assert done.stderr == "loaded []\n"
    assert cpu_s < 1.0
    for command in ("train", "rl", "resume", "validate", "report", "export"):
        assert f"\n    {command} " in done.stdout


def test_validate_says_what_a_recipe_resolves_to_without_torch():
    done, cpu_s = ask("validate", "demo", "train.seed=9")
    assert done.returncode == 0
    assert done.stderr == "loaded []\n"
    assert cpu_s < 2.0
    shown = json.loads(done.stdout)
    assert shown["train"]["seed"] == 9 and shown["train"]["log"]["anchor_every_versions"] > 0


def test_validate_refuses_with_exit_code_1():
    done, _ = ask("validate", "demo", "train.sede=9")
    assert done.returncode == 1 and done.stdout == ""
    assert "unknown key train.sede; did you mean seed?" in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr


def test_overrides_may_stand_behind_options(capsys, tmp_path):
    (tmp_path / "config.json").touch()
    for words in (
        ["rl", "demo", "--run-dir", str(tmp_path), "train.sede=1"],
        ["rl", "demo", "train.seed=2", "--run-dir", str(tmp_path), "train.sede=1"],
        ["rl", "demo", "train.seed=2", "--overwrite", "train.sede=1", "rollout.engines=1"],
    ):
        assert "unknown key train.sede" in refused(capsys, *words)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["fly"],
        ["validate"],
        ["validate", "demo", "--fast"],
        ["report", "a", "b"],
        ["resume"],
        ["export", "a"],
    ],
)
def test_what_is_no_command_is_refused_with_the_usage(capsys, words):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert "usage: gossamer" in capsys.readouterr().err


def test_each_kind_of_recipe_has_its_command(capsys, tmp_path):
    message = refused(capsys, "train", "demo", "--run-dir", str(tmp_path / "run"), *NO_RUN)
    assert "demo has a grpo phase" in message and "gossamer rl" in message
    message = refused(capsys, "rl", "pretrain_stdlib", "--run-dir", str(tmp_path / "run"))
    assert "pretrain_stdlib has no grpo phase" in message and "gossamer train" in message
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_a_run_is_left_as_it_is(capsys, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    message = refused(capsys, "rl", "demo", "--run-dir", str(tmp_path), *NO_RUN)
    assert f"{tmp_path} already holds a run" in message
    assert f"gossamer resume {tmp_path}" in message and "--overwrite" in message
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert (tmp_path / "config.json").read_text() == "{}"


@pytest.mark.parametrize("command", [["resume"], ["export"]])
def test_a_folder_that_is_not_there_is_named(capsys, tmp_path, command):
    missing = tmp_path / "none"
    message = refused(
        capsys, *command, str(missing), *[str(tmp_path / "out")] * (command == ["export"])
    )
    assert f"{missing}/config.json is missing; expected the folder of a gossamer run" in message
    assert list(tmp_path.iterdir()) == []


def test_report_of_a_folder_that_is_not_there_is_one_sentence(capsys, tmp_path):
    assert str(tmp_path / "none") in refused(capsys, "report", str(tmp_path / "none"))


@pytest.fixture
def run_dir(tmp_path) -> Path:
    """A run that was begun and wrote nothing but its config."""
    dump_config(load_recipe("demo", []), tmp_path / "config.json")
    return tmp_path


def test_a_finished_run_is_not_resumed(capsys, run_dir):
    run = SyntheticRun(run_dir)
    run.start(attempt=1)
    run.add("run_end", reason="finished")
    message = refused(capsys, "resume", str(run_dir))
    assert f"{run_dir} has finished" in message and f"gossamer report {run_dir}" in message


def test_a_broken_config_is_named(capsys, run_dir):
    (run_dir / "config.json").write_text("{")
    assert f"{run_dir}/config.json" in refused(capsys, "resume", str(run_dir))


def test_a_run_without_a_checkpoint_is_not_exported(capsys, run_dir):
    message = refused(capsys, "export", str(run_dir), str(run_dir / "out"))
    assert f"{run_dir}/checkpoints holds no whole checkpoint" in message
    assert not (run_dir / "out").exists()
