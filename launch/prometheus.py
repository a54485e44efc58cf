"""`gossamer metrics`: the numbers of a run for Prometheus, over HTTP.

The one idea: a reader of metrics.jsonl like any other, so it may be started late, killed, and run
beside a run that knows nothing of it. Served in Prometheus's text format 0.0.4; no dependency.
"""

from __future__ import annotations

import argparse
import hmac
import re
import threading
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from gossamer.launch.display import EventTail
from gossamer.launch.endpoint import token_for
from gossamer.launch.run_argument import open_here
from gossamer.launch.summary import Event

TOKEN_VARIABLE = "GOSSAMER_METRICS_TOKEN"
PORT = 9470
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

METRICS = {
    "attempts_total": "times that the run was started",
    "ended": "1 once the run has ended, however",
    "last_event_timestamp_seconds": "unix time of the last event; a run that stalls stops it",
    "step": "optimizer steps done",
    "loss": "of the last step",
    "reward_mean": "of the last batch of samples",
    "tokens_total": "tokens trained on, steps done again included",
    "step_seconds_total": "time of all steps",
    "wait_seconds_total": "of that, waiting for a batch and scoring it",
    "version": "of the published weights",
    "wire_bytes_total": "of the published versions, as written to the log",
    "full_bytes_total": "the same versions as full copies",
    "change_density_ratio": "share of the elements that the last delta changed",
    "eval_exact_match_ratio": "of the last evaluation of that name",
    "checkpoint_step": "of the last checkpoint that is whole",
    "engine_up": "1 of an engine that is there, 0 while its place or its server is waited for",
    "engine_version": "that the engine holds",
    "engine_samples_total": "completions sampled",
    "engine_generated_tokens_total": "tokens sampled",
    "engine_generate_seconds_total": "time spent sampling",
    "engine_pause_seconds_total": "time that commits held sampling up",
    "engine_audit_equal": "1 if the proof at the run's end found the trainer's bits, 0 if not",
    "engine_deaths_total": "engines found dead",
    "engine_drains_total": "engines found unfit: not the log's bits, too far behind, other",
}
"""What is served, each with `gossamer_` before its name; *_total are counters."""

OF_AN_ENGINE = ("engine_up", "engine_version", "engine_audit_equal")
"""Gauges that go with it."""
GONE = frozenset({"dead", "lost", "left", "drained"})
BEGINS = frozenset({"waits", "start", "replaced", "reseeded"})
"""What is said first of an engine, or of one of the same name as one that is gone."""
DRAINS = {
    "bits": r"live weights hash to|live tensors that are not those of version \d+: (?!none$)",
    "behind": r"\d+ versions behind",
    "other": "",
}
"""Why an engine is drained, and what is found in the told reason: an audit's, or that of a version
which did not apply; the latter's of `comm/live.py`."""


class Numbers:
    """The metrics of a run, brought up to date event by event."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, float]] = {name: {} for name in METRICS}
        self._gone: set[str] = set()
        """Engines that may yet finish what they do."""
        self._add("engine_deaths_total", 0)  # a series that begins with 1 has no rate
        for cause in DRAINS:
            self._add("engine_drains_total", 0, reason=cause)

    def take(self, event: Event) -> None:
        """Takes one event in; unknown ones only move the time of the last."""
        self._set("last_event_timestamp_seconds", event["time_s"])
        match event["event"]:
            case "run_start":
                self._add("attempts_total", 1)
                self._set("ended", 0)
            case "run_end":
                self._set("ended", 1)
            case "train_step":
                for name in ("step", "loss", "reward_mean"):
                    self._set(name, event.get(name))
                self._add("tokens_total", event.get("tokens"))
                self._add("step_seconds_total", event.get("step_s"))
                self._add("wait_seconds_total", event.get("wait_s"))
            case "publish":
                self._set("version", event["version"])
                self._add("wire_bytes_total", event["frame_bytes"])
                self._add("full_bytes_total", event["full_bytes"])
                if event["kind"] == "delta":
                    self._set("change_density_ratio", event["density"])
            case "eval" if "exact_match" in event:
                self._set("eval_exact_match_ratio", event["exact_match"], name=event["name"])
            case "checkpoint":
                self._set("checkpoint_step", event["step"])
            case "audit":
                self._set("engine_audit_equal", int(event["equal"]), engine=event["engine"])
            case "pools":  # made anew, with engines of its own
                for name in OF_AN_ENGINE:
                    self._values[name].clear()
                self._gone.clear()
            case "engine":
                self._take_engine(event)

    def _take_engine(self, event: Event) -> None:
        what, engine = event["what"], {"engine": event["engine"]}
        if what in GONE:
            self._gone.add(event["engine"])
            for name in OF_AN_ENGINE:
                self._values[name].pop(_labels(engine), None)
        elif what in BEGINS:
            self._gone.discard(event["engine"])
        if event["engine"] not in self._gone:
            self._set("engine_up", int(what != "waits"), **engine)
            self._set("engine_version", event.get("version"), **engine)
        match what:
            case "generate":
                self._add("engine_samples_total", event.get("samples"), **engine)
                self._add("engine_generated_tokens_total", event.get("tokens"), **engine)
                self._add("engine_generate_seconds_total", event.get("generate_s"), **engine)
            case "commit":
                self._add("engine_pause_seconds_total", event.get("pause_s"), **engine)
            case "dead":
                self._add("engine_deaths_total", 1)
            case "drained":
                told = str(event.get("reason"))
                cause = next(cause for cause, words in DRAINS.items() if re.search(words, told))
                self._add("engine_drains_total", 1, reason=cause)

    def text(self, run: str) -> str:
        """All of it as Prometheus reads it; every line has the label `run`."""
        lines = []
        for name, values in self._values.items():
            if values:
                kind = "counter" if name.endswith("_total") else "gauge"
                lines.append(f"# HELP gossamer_{name} {METRICS[name]}")
                lines.append(f"# TYPE gossamer_{name} {kind}")
            for labels, value in values.items():
                lines.append(f"gossamer_{name}{{{_label('run', run)}{labels}}} {value!r}")
        return "\n".join(lines) + "\n"

    def _set(self, name: str, value: float | None, /, **labels: str) -> None:
        if value is not None:
            self._values[name][_labels(labels)] = value

    def _add(self, name: str, value: float | None, /, **labels: str) -> None:
        if value is not None:
            values, key = self._values[name], _labels(labels)
            values[key] = values.get(key, 0) + value


def _labels(labels: Mapping[str, str]) -> str:
    return "".join(f",{_label(label, word)}" for label, word in labels.items())


def _label(name: str, word: str) -> str:
    escaped = word.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    return f'{name}="{escaped}"'


class MetricsServer(ThreadingHTTPServer):
    """Answers GET /metrics about one run folder until `close`."""

    daemon_threads = True

    def __init__(self, run_dir: Path, host: str, port: int) -> None:
        """Port 0: a free one. Raises ValueError for a host that needs a token, OSError for a port
        that is taken."""
        self.token = token_for(host, TOKEN_VARIABLE)
        super().__init__((host, port), _Handler)
        self._run, self._tail, self._numbers = run_dir.name, EventTail(run_dir), Numbers()
        self._reading = threading.Lock()
        self.url = f"http://{host}:{self.server_port}/metrics"
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    def scrape(self) -> str:
        """The numbers as of now."""
        with self._reading:
            for event in self._tail.read():
                self._numbers.take(event)
            return self._numbers.text(self._run)

    def close(self) -> None:
        """Stops listening."""
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    server_version = "gossamer"
    timeout = 60.0

    def do_GET(self) -> None:  # noqa: N802, http.server calls it
        token, said = self.server.token, self.headers.get("Authorization", "")
        if token and not hmac.compare_digest(said.encode(), f"Bearer {token}".encode()):
            return self._answer(HTTPStatus.UNAUTHORIZED, "")
        if self.path.partition("?")[0] != "/metrics":
            return self._answer(HTTPStatus.NOT_FOUND, "")
        return self._answer(HTTPStatus.OK, self.server.scrape())

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, status: HTTPStatus, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def add_metrics_command(command: argparse.ArgumentParser) -> None:
    """Options of `gossamer metrics`; nothing heavy is imported."""
    command.add_argument("run_dir", metavar="RUN_DIR", help="its folder, or s3://, ...")
    command.add_argument(
        "--host", default="127.0.0.1", help=f"others than this machine need ${TOKEN_VARIABLE}"
    )
    command.add_argument("--port", type=int, default=PORT, help="0: a free one")
    command.set_defaults(run=run_metrics)


def run_metrics(arguments: argparse.Namespace) -> None:
    """Serves until Ctrl-C."""
    run_dir = open_here(arguments.run_dir)
    if not run_dir.is_dir():
        raise ValueError(f"{arguments.run_dir} is no folder; expected the folder of a run")
    server = MetricsServer(run_dir, arguments.host, arguments.port)
    print(f"metrics of {arguments.run_dir} at {server.url}", flush=True)
    try:
        threading.Event().wait()
    finally:
        server.close()
