"""Runs on a Ray cluster somewhere else: `gossamer submit`, `status`, `logs` and `stop`.

The one idea: a submitted run is a Ray job and nothing else, so the cluster keeps its books: this
side may detach, be closed, or be another machine tomorrow. The resolved recipe travels with the
job, and so does Gossamer itself (a wheel without dependencies). No secret does: Ray shows a job's
environment to whoever asks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import shlex
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.launch.config import RunConfig
from gossamer.launch.quantities import MISSING, format_duration
from gossamer.launch.recipe import refuse_secrets
from gossamer.trainer.run_folder import is_url

if TYPE_CHECKING:
    from ray.job_submission import JobStatus, JobSubmissionClient

ADDRESS_VARIABLE, HEADERS_VARIABLE = "RAY_API_SERVER_ADDRESS", "RAY_JOB_HEADERS"
"""Ray's own: where jobs are sent by default, and HTTP headers (JSON) for a head behind a proxy."""
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
RUN_KEY, FOLDER_KEY = "gossamer_run", "gossamer_run_dir"
POLL_S = 0.5
YOUNG_S = 60.0
"""A cluster that has just been started answers before it takes jobs; it is asked so long."""


def add_submit_commands(commands: Any) -> None:  # noqa: ANN401, argparse has no public type for it
    """Adds submit, status, logs and stop; nothing heavy is imported."""
    submit = commands.add_parser("submit", help="run a recipe on a Ray cluster, as a Ray job")
    submit.add_argument("recipe", nargs="?", help="a YAML file, or the name of a shipped recipe")
    submit.add_argument("overrides", nargs="*", metavar="a.b=c", help="train.seed=2, and so on")
    submit.add_argument(
        "--run-dir",
        metavar="RUN_DIR",
        help="a folder that every node of the cluster sees, or s3://, ... that it reaches;"
        " default: ~/gossamer/runs/NAME there",
    )
    submit.add_argument("--overwrite", action="store_true", help="delete an earlier run there")
    submit.add_argument("--resume", metavar="RUN_DIR", help="go on with a run of the cluster's")
    submit.add_argument("--detach", action="store_true", help="do not wait for its end")
    submit.set_defaults(run=_submit)
    status = commands.add_parser("status", help="how submitted runs stand")
    status.add_argument("name", nargs="?", metavar="RUN", help="default: all")
    status.set_defaults(run=_status)
    logs = commands.add_parser("logs", help="what a submitted run prints, as it goes on")
    logs.add_argument("name", metavar="RUN", help="its name, or its submission id")
    logs.set_defaults(run=_logs)
    stop = commands.add_parser("stop", help="end a submitted run; it may be resumed")
    stop.add_argument("name", metavar="RUN", help="its name, or its submission id")
    stop.set_defaults(run=_stop)
    for command in (submit, status, logs, stop):
        command.add_argument(
            "--address",
            default=os.environ.get(ADDRESS_VARIABLE, DEFAULT_ADDRESS),
            help=f"of the cluster's head; default: ${ADDRESS_VARIABLE}, or {DEFAULT_ADDRESS}",
        )


def check_paths(config: RunConfig) -> None:
    """Raises ValueError for a path that would mean something else on the cluster."""
    from gossamer.launch.recipe import with_absolute_paths

    def differing(ours: Any, absolute: Any, where: str) -> str | None:  # noqa: ANN401, plain data
        if ours == absolute:
            return None
        if isinstance(ours, dict):
            inner = [(f"{where}.{key}", ours[key], absolute[key]) for key in ours]
        elif isinstance(ours, list | tuple):
            pairs = enumerate(zip(ours, absolute, strict=True))
            inner = [(f"{where}[{i}]", *pair) for i, pair in pairs]
        else:
            return f"{where} is {ours}"
        return next(filter(None, (differing(a, b, name) for name, a, b in inner)))

    plain, absolute = asdict(config), asdict(with_absolute_paths(config))
    for key in plain:
        if found := differing(plain[key], absolute[key], key):
            raise ValueError(f"{found}; expected an absolute path, one of the cluster's")


def submit_run(
    client: JobSubmissionClient, name: str, words: list[str], run_dir: str, recipe: str | None
) -> str:
    """Sends one job that runs `gossamer WORDS`; returns its submission id.

    recipe: what `recipe.json` in the job's working folder holds.
    """
    from gossamer.launch.wheel import build_wheel

    submission = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        work.mkdir()
        if recipe is not None:
            (work / "recipe.json").write_text(recipe)
        job: dict[str, Any] = {
            "entrypoint": " ".join(["python", "-m", "gossamer.launch.cli", *words]),
            "submission_id": submission,
            "metadata": {RUN_KEY: name, FOLDER_KEY: run_dir},
            "runtime_env": {
                "working_dir": str(work),
                "py_modules": [str(build_wheel(Path(folder)))],
            },
        }
        deadline_s = time.monotonic() + YOUNG_S
        while True:
            try:
                return client.submit_job(**job)
            except RuntimeError as error:
                is_young = "No available agent" in str(error)
                if not is_young or time.monotonic() > deadline_s:
                    raise
                time.sleep(POLL_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmittedRun:
    """A job of the cluster's that `gossamer submit` sent."""

    name: str
    folder: str
    submission: str
    status: JobStatus
    start_s: float
    """Unix time; 0 before it starts."""
    end_s: float | None

    @property
    def age(self) -> str:
        """How long it has run, or ran."""
        return (
            format_duration((self.end_s or time.time()) - self.start_s) if self.start_s else MISSING
        )


def submitted(client: JobSubmissionClient) -> list[SubmittedRun]:
    """Runs that were submitted, oldest first."""
    runs = [
        SubmittedRun(
            name=job.metadata[RUN_KEY],
            folder=job.metadata[FOLDER_KEY],
            submission=job.submission_id,
            status=job.status,
            start_s=(job.start_time or 0) / 1000,
            end_s=job.end_time / 1000 if job.end_time else None,
        )
        for job in client.list_jobs()
        if job.submission_id and job.metadata and RUN_KEY in job.metadata
    ]
    return sorted(runs, key=lambda run: run.start_s or time.time())


def find_run(client: JobSubmissionClient, name: str) -> SubmittedRun:
    """The newest submitted run of that name, or the one with that submission id."""
    runs = submitted(client)
    found = [run for run in runs if name in (run.submission, run.name)]
    if not found:
        known = sorted({run.name for run in runs})
        there = f"its runs are {', '.join(known)}" if known else "it has no run of gossamer's"
        raise ValueError(f"{name} is no run of {client.get_address()}; {there}")
    return found[-1]


def follow(client: JobSubmissionClient, submission: str) -> int:
    """Prints what the job prints until it ends; its exit code, 0 for a job that ended well."""

    async def tail() -> None:
        async for text in client.tail_job_logs(submission):
            print(text, end="", flush=True)

    asyncio.run(tail())
    while not (status := client.get_job_status(submission)).is_terminal():
        time.sleep(POLL_S)
    info = client.get_job_info(submission)
    if status != "SUCCEEDED":
        print(f"gossamer: the job is {status}: {_last(info.message)}", file=sys.stderr)
    return 0 if status == "SUCCEEDED" else info.driver_exit_code or 1


def _client(address: str) -> JobSubmissionClient:
    has_token = any(name in os.environ for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if has_token or (Path.home() / ".ray" / "auth_token").is_file():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # else Ray sends none
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)
    try:
        headers = json.loads(os.environ.get(HEADERS_VARIABLE, "null"))
        return JobSubmissionClient(address, headers=headers)
    except json.JSONDecodeError:  # whatever it holds may be a secret
        raise ValueError(f"${HEADERS_VARIABLE} is no JSON; expected an object") from None
    except AuthenticationError:
        raise RuntimeError(
            f"{address} wants a token; expected the cluster's in $RAY_AUTH_TOKEN or in"
            " ~/.ray/auth_token"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        raise RuntimeError(
            f"no Ray cluster answers at {address} ({_last(str(error))}); expected the address of"
            " its dashboard, such as http://head:8265"
        ) from error


def _last(text: str | None) -> str:
    lines = [line.strip() for line in (text or "").splitlines() if line.strip()]
    return lines[-1] if lines else MISSING


def _submit(arguments: argparse.Namespace) -> int:
    recipe = None
    if arguments.resume is not None:
        overrides = [*filter(None, [arguments.recipe]), *arguments.overrides]
        if arguments.overwrite or arguments.run_dir or any("=" not in o for o in overrides):
            raise ValueError(
                "submit --resume RUN_DIR takes overrides, no recipe and no other folder"
            )
        for override in overrides:  # they go into the job's command, which Ray shows
            key, _, value = override.partition("=")
            refuse_secrets(value, key)
        run_dir = arguments.resume
        words = ["resume", _of_its_home(run_dir), *map(shlex.quote, overrides)]
        name = Path(run_dir).name
    else:
        from gossamer.launch.recipe import load_recipe

        if arguments.recipe is None:
            raise ValueError("expected a recipe, or --resume RUN_DIR")
        config = load_recipe(arguments.recipe, arguments.overrides)
        check_paths(config)
        name, recipe = config.name, json.dumps(asdict(config), indent=1)
        run_dir = arguments.run_dir or f"~/gossamer/runs/{name}"
        command = "rl" if config.has_rollouts else "train"
        words = [command, "recipe.json", "--run-dir", _of_its_home(run_dir)]
        words += ["--overwrite"] if arguments.overwrite else []
    if is_url(run_dir):
        refuse_secrets(run_dir, "--run-dir")
    elif not run_dir.startswith(("/", "~/")):
        raise ValueError(f"run folder {run_dir}: expected an absolute path, one of the cluster's")
    client = _client(arguments.address)
    submission = submit_run(client, name, words, run_dir, recipe)
    print(f"submitted {submission} to {arguments.address}; run folder {run_dir}", flush=True)
    return 0 if arguments.detach else _follow(client, submission, name)


def _of_its_home(run_dir: str) -> str:
    """As the head's shell reads it."""
    return f'"$HOME"/{shlex.quote(run_dir[2:])}' if run_dir[:2] == "~/" else shlex.quote(run_dir)


def _follow(client: JobSubmissionClient, submission: str, name: str) -> int:
    try:
        return follow(client, submission)
    except KeyboardInterrupt:
        print(f"\ndetached; it goes on: `gossamer status|logs|stop {name}`", file=sys.stderr)
        return 0


def _status(arguments: argparse.Namespace) -> None:
    client = _client(arguments.address)
    if arguments.name is None:
        for run in submitted(client):
            print(f"{run.name:20} {run.status.value:10} {run.age:>14}  {run.submission}")
        return
    run = find_run(client, arguments.name)
    facts = {
        "run": run.name,
        "state": run.status.value,
        "for": run.age,
        "folder": run.folder,
        "submission": run.submission,
        "last line": _last(client.get_job_logs(run.submission)),
    }
    print("\n".join(f"{name:>10}  {value}" for name, value in facts.items()))


def _logs(arguments: argparse.Namespace) -> int:
    client = _client(arguments.address)
    return _follow(client, find_run(client, arguments.name).submission, arguments.name)


def _stop(arguments: argparse.Namespace) -> None:
    client = _client(arguments.address)
    run = find_run(client, arguments.name)
    if run.status.is_terminal():
        raise ValueError(f"{run.submission} has ended already: {run.status.value}")
    client.stop_job(run.submission)
    while not (status := client.get_job_status(run.submission)).is_terminal():
        time.sleep(POLL_S)
    print(f"{run.submission} {status.value}; `gossamer submit --resume {run.folder}` goes on")
