"""What `gossamer submit` sends, and what it refuses to send."""

from types import SimpleNamespace

import pytest
from gossamer.launch import submit
from gossamer.launch.cli import main
from gossamer.launch.recipe import load_recipe


class FakeHead:
    """Remembers what was submitted; the job ends as it is told."""

    def __init__(self, status="SUCCEEDED", code=0):
        self.sent, self.status, self.code, self.is_young = [], status, code, True

    def submit_job(self, **job):
        if self.is_young:  # what Ray says until the head's agent is up
            self.is_young = False
            raise RuntimeError("Request failed with status code 500: No available agent to submit")
        work = job["runtime_env"]["working_dir"]
        files = {path.name: path.read_text() for path in submit.Path(work).iterdir()}
        self.sent.append(job | {"files": files})
        return job["submission_id"]

    async def tail_job_logs(self, _):
        yield "step 1\n"

    def get_job_status(self, _):
        return _Status(self.status)

    def get_job_info(self, _):
        return SimpleNamespace(message="it died", driver_exit_code=self.code)


class _Status(str):
    def is_terminal(self):
        return True


@pytest.fixture
def head(monkeypatch):
    head = FakeHead()
    monkeypatch.setattr(submit, "_client", lambda address: head)
    return head


def test_the_resolved_recipe_travels_and_no_environment(head, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    assert main(["submit", "demo", "train.seed=4", "--run-dir", "/shared/my runs/x"]) == 0
    (job,) = head.sent
    assert job["entrypoint"] == (
        "python -m gossamer.launch.cli rl recipe.json --run-dir '/shared/my runs/x'"
    )
    (tmp_path / "r.json").write_text(job["files"]["recipe.json"])
    assert load_recipe(str(tmp_path / "r.json"), []) == load_recipe("demo", ["train.seed=4"])
    assert set(job["runtime_env"]) == {"working_dir", "py_modules"}
    assert "hunter2" not in str(job)
    assert "step 1" in capsys.readouterr().out


def test_the_default_folder_is_in_the_home_over_there(head):
    main(["submit", "pretrain_stdlib", "--overwrite", "--detach"])
    (job,) = head.sent
    assert job["entrypoint"].endswith(
        'train recipe.json --run-dir "$HOME"/gossamer/runs/pretrain_stdlib --overwrite'
    )


def test_a_resume_sends_no_recipe(head):
    assert main(["submit", "--resume", "~/runs/x", "rollout.engines=4"]) == 0
    assert head.sent[0]["entrypoint"].endswith('cli resume "$HOME"/runs/x rollout.engines=4')
    assert head.sent[0]["files"] == {}


def test_a_job_that_failed_fails_here(head, capsys):
    head.status, head.code = "FAILED", 3
    assert main(["submit", "demo"]) == 3
    assert "the job is FAILED: it died" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["demo", "train.data.corpus_path=here"],
            "train.data.corpus_path is here; expected an abs",
        ),
        (["demo", "train.checkpoint.url=ck"], "train.checkpoint.url is ck; expected an absolute"),
        (["demo", "--run-dir", "runs/x"], "run folder runs/x: expected an absolute path"),
        ([], "expected a recipe, or --resume RUN_DIR"),
        (["demo", "--resume", "/x"], "takes overrides, no recipe"),
        (
            ["--resume", "/x", "train.outer.url=https://u:hunter2@h"],
            "train.outer.url holds a secret; expected a plain URL",
        ),
    ],
)
def test_what_would_mean_something_else_there_is_refused(head, capsys, words, reason):
    assert main(["submit", *words]) == 1
    said = capsys.readouterr().err
    assert reason in said and "hunter2" not in said
    assert not head.sent


def test_paths_of_the_cluster_are_left_alone():
    submit.check_paths(load_recipe("demo", ["train.checkpoint.url=s3://b/c"]))
    submit.check_paths(load_recipe("demo", ["train.data.corpus_path=/data"]))


def test_headers_that_are_no_json_are_not_shown(monkeypatch, capsys):
    monkeypatch.setenv("RAY_JOB_HEADERS", "Bearer hunter2")
    assert main(["status"]) == 1
    said = capsys.readouterr().err
    assert "$RAY_JOB_HEADERS is no JSON" in said and "hunter2" not in said
