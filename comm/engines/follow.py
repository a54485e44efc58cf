"""Keeps a running `vllm serve` at the head of a weight log. Speaks HTTP; needs no vLLM.

The one idea: the server is passive and whatever can be lost is asked for again. Staging is begun by
a call that returns at once and is waited for outside of the pause; a failure on any rank takes the
update back on all; a server that comes back empty, or whose log was begun anew (a run that was
overwritten), is told of the log and loads an anchor.

The server is started with `--weight-transfer-config '{"backend": "gossamer"}'` and, because these
routes exist only then, VLLM_SERVER_DEV_MODE=1: let it listen on a loopback address alone.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.comm.log import WeightLog
from gossamer.comm.manifest import LogError

PAUSE_MODES = ("keep", "wait", "abort")
LONGEST_WAIT_S = 5.0
STATUS_S = 0.02
"""Time between two looks at how far staging is."""
SAME_LOG_S = 5.0
"""Time between two looks whether the log is still the one that was opened."""


class EngineError(RuntimeError):
    """A server that is away, refuses a call, or failed at one."""


def weight_label(version: int, run_id: str) -> str:
    """What the server calls the weights of a version: numbers alone are those of any log."""
    return f"{version}@{run_id}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress:
    """Something that happened."""

    event: str
    """`started` (the engine knows the log now), `committed`, or `failed` (tried again)."""
    version: int | None = None
    """The live version, after a failure the last one known."""
    detail: str = ""
    """What failed; for a commit, the audit that made it necessary to load an anchor."""
    fetched_bytes: int = 0
    """Read from the log for this version by all ranks together."""
    num_changed: int = 0
    """Elements that the commit wrote."""
    stage_s: float = 0.0
    """Fetching, decoding and proving beside the running engine."""
    commit_s: float = 0.0
    """Writing the weights, on the slowest rank."""
    pause_s: float = 0.0
    """From asking for the pause to being told of the resumption."""


def follow(
    log_url: str,
    engine_url: str,
    *,
    public_key: str | Path | None = None,
    mode: str = "keep",
    audit_every_versions: int = 0,
    poll_s: float = 0.2,
    timeout_s: float = 600.0,
    on_progress: Callable[[Progress], None] | None = None,
    until: Callable[[int | None], bool] | None = None,
) -> int | None:
    """Brings every new version of the log into the server, until `until(live version)` holds.

    `log_url` and `public_key` must mean the same on this host and the engine's. Requests in flight
    are kept over a commit (their KV is computed anew), waited for, or aborted, by `mode`. Failures
    are told to `on_progress` and tried again. `timeout_s` is for a call. Returns the live version.
    """
    if mode not in PAUSE_MODES:
        raise ValueError(f"mode must be one of {', '.join(PAUSE_MODES)}, not {mode!r}")
    server = Server(engine_url, timeout_s)
    init = {
        "log_url": str(log_url),
        "public_key": public_key and str(public_key),
        "audit_every_versions": audit_every_versions,
    }
    log: WeightLog | None = None
    live: int | None = None
    attached, failures, told, looked_s = False, 0, "", 0.0
    while True:
        done: Progress | None = None
        try:
            if not attached or time.monotonic() - looked_s > SAME_LOG_S:
                found, looked_s = WeightLog.open(log_url, public_key=public_key), time.monotonic()
                if log is None or log.run_id != found.run_id:
                    log, live, attached = found, None, False
            assert log is not None  # not attached at first
            if not attached:
                done = _attach(log, server, init)
                attached = True
            else:
                live, done = _catch_up(log, server, mode)
            failures, told = 0, ""
        except (EngineError, LogError, OSError) as error:
            attached, failures = False, failures + 1
            if str(error) != told:
                done = Progress(event="failed", version=live, detail=str(error))
            told = str(error)
        if done and on_progress:
            on_progress(done)
        if until and until(live):
            return live
        if not done or failures:
            time.sleep(min(poll_s * 2 ** max(failures - 1, 0), LONGEST_WAIT_S))


def _attach(log: WeightLog, server: Server, init: dict[str, Any]) -> Progress | None:
    """Tells a server that is new where the log is, ends what another driver left behind."""
    ranks = server.rpc("gossamer_status")
    if any(rank.get("run_id") != log.run_id for rank in ranks):
        if log.head() is None:
            raise LogError(f"the log at {log.url} holds no version yet")
        server.post("/init_weight_transfer_engine", {"init_info": init})
        return Progress(event="started")
    if any(rank["updating"] for rank in ranks):
        server.rpc("gossamer_roll_back")
    if _live_version(server.rpc("gossamer_status")) is not None:
        server.post("/resume")
    return None


def _live_version(ranks: list[dict[str, Any]]) -> int | None:
    """The version of all ranks. Those that differ, or failed an audit, have to load an anchor."""
    versions = {rank["version"] for rank in ranks}
    return versions.pop() if len(versions) == 1 else None


def _catch_up(log: WeightLog, server: Server, mode: str) -> tuple[int | None, Progress | None]:
    """Brings the next version in, if there is one; the live version, and what it took."""
    ranks = server.rpc("gossamer_status")
    if not all(ranks):
        raise EngineError(f"the engine at {server.url} began anew")
    live = _live_version(ranks)
    audits = [rank["audit_failure"] for rank in ranks if rank["audit_failure"]]
    version = log.next_version(live)
    if version is None:
        return live, None
    _stage(log, server, live, version)
    started_s = time.perf_counter()
    server.post(f"/pause?mode={mode}&clear_cache=true")
    try:
        server.post("/start_weight_update")
        server.post("/update_weights", {"update_info": {"version": version}})
        server.post("/finish_weight_update", {"weight_version": weight_label(version, log.run_id)})
    except EngineError:
        server.rpc("gossamer_roll_back")
        if live is not None:  # a first load has no way back: the ranks may differ
            server.post("/resume")
        raise
    server.post("/resume")
    pause_s = time.perf_counter() - started_s
    ranks = server.rpc("gossamer_status")
    return version, Progress(
        event="committed",
        version=version,
        detail="; ".join(audits),
        fetched_bytes=sum(rank["fetched_bytes"] for rank in ranks),
        num_changed=ranks[0]["num_changed"],
        stage_s=max(rank["stage_s"] for rank in ranks),
        commit_s=max(rank["commit_s"] for rank in ranks),
        pause_s=pause_s,
    )


def _stage(log: WeightLog, server: Server, live: int | None, version: int) -> None:
    """Returns when every rank has staged `version`. Raises EngineError when one cannot."""
    server.rpc("gossamer_stage", version)
    while True:
        ranks = server.rpc("gossamer_status")
        failed = [rank.get("failure", "the engine began anew") for rank in ranks]
        if any(failed):
            hop = log.hop(live, version)
            if hop and any(rank.get("is_unsound") for rank in ranks):
                log.avoid(hop.refs)
            raise EngineError(f"version {version} was not staged: {next(filter(None, failed))}")
        if all(rank["staged"] == version for rank in ranks):
            return
        time.sleep(STATUS_S)


class Server:
    """A vLLM server's routes for weight updates."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s

    def rpc(self, method: str, *args: Any) -> list[dict[str, Any]]:  # noqa: ANN401
        """What each rank's worker answers."""
        return self.post("/collective_rpc", {"method": method, "args": list(args)})["results"]

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:  # noqa: ANN401
        """The answer, JSON. Raises EngineError."""
        request = urllib.request.Request(
            self.url + path,
            data=json.dumps(body or {}).encode(),
            headers={"Content-Type": "application/json"},
            method="POST",
        )
        try:
            with urllib.request.urlopen(request, timeout=self._timeout_s) as answer:
                return json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            raise EngineError(_explain(self.url + path, error)) from error
        except (OSError, ValueError) as error:
            raise EngineError(f"no answer from {self.url}{path}: {error}") from error


def _explain(url: str, error: urllib.error.HTTPError) -> str:
    if error.code == 404:
        return f"{url} is not there: start vLLM with VLLM_SERVER_DEV_MODE=1"
    text = error.read().decode(errors="replace")
    if "gossamer_" in text and ("no attribute" in text or "not implemented" in text):
        return f'{url}: start vLLM with --weight-transfer-config \'{{"backend": "gossamer"}}\''
    return f"{url} answered {error.code}: {text[:500]}"
