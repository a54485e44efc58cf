"""Runs a recipe from start to proof: its folder, attempts on a cluster, display, summary, report.

The one idea: everything worth knowing is in the run's folder. The controller shows what the metrics
file says and judges the run by it; a run that was stopped, or whose driver died, goes on from what
the folder holds.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from gossamer.launch.config import RunConfig
from gossamer.launch.display import LiveDisplay
from gossamer.launch.pool_wishes import forget_wishes
from gossamer.launch.recipe import dump_config, load_recipe, with_absolute_paths
from gossamer.launch.replicas_members import prepare_member
from gossamer.launch.report import write_report
from gossamer.launch.summary import of_kind, read_events, write_summary
from gossamer.trainer.metrics import METRICS_FILE, EventLog, drop_torn_lines, has_events
from gossamer.trainer.run_folder import (
    CONFIG_FILE,
    URL_FILE,
    claim,
    delete_run,
    has_begun,
    inside,
    put_beside,
    url_of,
    where_of,
)

REFRESH_S = 0.5
GAVE_UP = "gave up"
"""In the last words of a driver that would fail again."""


class RunError(RuntimeError):
    """A run that cannot start or did not end well; one sentence for the user."""


def start_run(config: RunConfig, run_dir: Path, overwrite: bool, takes_over: bool = False) -> None:
    """Runs a recipe in a new folder. Raises RunError when the folder holds a run already.

    `takes_over`: as a replica that was, or is, somewhere else.
    """
    config = with_absolute_paths(config)
    run_dir.mkdir(parents=True, exist_ok=True)
    with sole_driver(run_dir):
        make_room(run_dir, overwrite)
        _clear_checkpoints(config, run_dir, overwrite)
        dump_config(config, run_dir / CONFIG_FILE)
        if not claim(run_dir):
            raise RunError(f"another driver has begun a run at {where_of(run_dir)} just now")
        _attempt(config, run_dir, number=1 + takes_over, resume_from=None)


def resume_run(config: RunConfig, run_dir: Path, has_new_pools: bool = False) -> None:
    """Goes on from the newest whole checkpoint, or from the start when there is none.

    `has_new_pools`: from now on the run has the engines of `config`, whatever was wished for.
    """
    with sole_driver(run_dir):
        drop_torn_lines(run_dir)
        events = read_events(run_dir) if has_events(run_dir) else []
        if of_kind(events, "run_end", reason="finished"):
            where = where_of(run_dir)
            raise RunError(f"{where} has finished; see `gossamer report {where}`")
        if has_new_pools:
            _keep_pools(config, run_dir)
        # 1 even where the first attempt died before it could say so: it may have claimed the log
        last = max((e["attempt"] for e in of_kind(events, "run_start")), default=1)
        resume_from = newest_checkpoint(run_dir, config.train.checkpoint.url)
        _attempt(config, run_dir, number=last + 1, resume_from=resume_from)


def _keep_pools(config: RunConfig, run_dir: Path) -> None:
    """Writes down what the run was told of its engines, for `gossamer engines` and a resume."""
    forget_wishes(run_dir)
    kept = replace(load_recipe(str(run_dir / CONFIG_FILE), []), rollout=config.rollout)
    dump_config(kept, run_dir / CONFIG_FILE)
    put_beside(run_dir, CONFIG_FILE)


def newest_checkpoint(run_dir: Path, url: str | None = None) -> str | None:
    """URL of the checkpoint to resume from: latest attempt, then latest step."""
    from gossamer.trainer.checkpoint import list_checkpoints
    from gossamer.trainer.saving import checkpoint_root

    found = list_checkpoints(checkpoint_root(url, run_dir))
    return found[-1] if found else None


def _clear_checkpoints(config: RunConfig, run_dir: Path, overwrite: bool) -> None:
    """A new run would go on from another's checkpoints where it finds them."""
    from gossamer.trainer.checkpoint import list_checkpoints, list_unfinished
    from gossamer.trainer.checkpoint_writer import remove_checkpoint
    from gossamer.trainer.saving import checkpoint_root

    root = checkpoint_root(config.train.checkpoint.url, run_dir)
    found = list_checkpoints(root) + list_unfinished(root)
    if found and not overwrite:
        raise RunError(
            f"{root} holds another run's checkpoints; expected an empty checkpoint.url, or"
            " --overwrite to delete them"
        )
    for url in found:
        remove_checkpoint(url)


def make_room(run_dir: Path, overwrite: bool) -> None:
    """The folder holds no run, or none any more. Raises RunError."""
    if has_begun(run_dir):
        if not overwrite:
            where = where_of(run_dir)
            raise RunError(
                f"{where} already holds a run: continue it with `gossamer resume {where}`,"
                " or start anew with --overwrite"
            )
        empty_run(run_dir)
    elif url_of(run_dir) is not None:
        _empty_folder(run_dir)  # of this host: it may be of a run that was deleted there


@contextmanager
def sole_driver(run_dir: Path) -> Iterator[None]:
    """Holds the run's folder against other drivers on this machine, until this process ends.

    Writer epochs fence writers wherever they are, but only when they come to write; so it is with
    drivers on other hosts, of a run at a URL.
    """
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            where = where_of(run_dir)
            raise RunError(f"{where} is being run by another gossamer process") from None
        except OSError:
            pass  # some network file systems lock no folders; epochs fence there too
        yield
    finally:
        os.close(descriptor)


def empty_run(run_dir: Path) -> None:
    """Deletes a run, and nothing that is none."""
    if url_of(run_dir) is not None:
        delete_run(run_dir)
    elif not (run_dir / METRICS_FILE).exists():
        raise RunError(
            f"{run_dir} holds a {CONFIG_FILE} but no {METRICS_FILE}, so it is no run of gossamer's"
            " to overwrite; give another --run-dir"
        )
    _empty_folder(run_dir)


def _empty_folder(run_dir: Path) -> None:
    for path in run_dir.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != URL_FILE:
            path.unlink()


def _attempt(config: RunConfig, run_dir: Path, number: int, resume_from: str | None) -> None:
    with quiet_console(run_dir) as console:
        events = EventLog(run_dir)
        display = LiveDisplay(run_dir, console=rich_console(console))
        display.start()
        try:
            prepare_member(config, run_dir)
            _run_on_ray(config, run_dir, number, resume_from, display)
        except KeyboardInterrupt:
            _write_end(events, "stopped by its user")
            raise KeyboardInterrupt(f"`gossamer resume {where_of(run_dir)}` goes on") from None
        except BaseException as error:
            _write_end(events, str(error) or type(error).__name__)
            raise
        finally:
            display.stop()
        drop_torn_lines(run_dir)  # nobody is left who could append
        summary = json.loads(write_summary(run_dir).read_text())
        write_report(run_dir)
        _print_outcome(console, summary, inside(run_dir, "report.html"))


def _write_end(events: EventLog, reason: str) -> None:
    with suppress(OSError):  # or a full disk, or a store that is away, would hide the reason
        events.write("run_end", {"reason": reason})
        events.flush()


def _run_on_ray(
    config: RunConfig, run_dir: Path, number: int, resume_from: str | None, display: LiveDisplay
) -> None:
    from gossamer.launch.cluster import connect
    from gossamer.launch.engine_actor import write_pid

    write_pid(run_dir, "driver")
    with connect(config, run_dir):
        from gossamer.launch.attempts import Attempts  # imports Ray, which reads its settings then

        attempts = Attempts(config, run_dir, number, display.refresh)
        if (why := attempts.run(resume_from)) is not None:
            raise RunError(
                f"{GAVE_UP} the trainer ({why}); see {run_dir / 'logs'} and go on with"
                f" `gossamer resume {where_of(run_dir)}`"
            )
        display.refresh()


@contextmanager
def quiet_console(run_dir: Path) -> Iterator[IO[str]]:
    """Sends what libraries print to RUN_DIR/logs/driver.log; yields the user's own console."""
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with (run_dir / "logs" / "driver.log").open("a") as log, os.fdopen(os.dup(1), "w") as console:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        try:
            yield console
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for target, source in enumerate(saved, start=1):
                os.dup2(source, target)
                os.close(source)


def rich_console(file: IO[str]) -> Any:  # noqa: ANN401
    from rich.console import Console

    return Console(file=file)


def _print_outcome(console: IO[str], summary: dict[str, Any], report: str) -> None:
    known = {key: value for key, value in summary.items() if value is not None}
    lines = [f"{key:>20}  {_short(value)}" for key, value in known.items()]
    proof = summary.get("engines_bit_exact")
    if proof is not None:
        verdict = "equal the trainer's bit for bit" if proof else "DIFFER from the trainer's"
        lines.append(f"every engine's live weights {verdict} at the last version")
    lines.append(f"report: {report}")
    print("\n".join(lines), file=console, flush=True)
    if proof is False:
        raise RunError("an engine's weights differ from the trainer's; see the audit events")


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
