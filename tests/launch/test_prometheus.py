"""What Prometheus gets: parsed by its own parser, summed as the report sums, to whom it is due."""

import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
from gossamer.launch.endpoint import is_loopback
from gossamer.launch.engine_actor import EngineActor
from gossamer.launch.prometheus import DRAINS, METRICS, TOKEN_VARIABLE, MetricsServer, Numbers
from gossamer.launch.summary import of_kind, read_events, summarise
from prometheus_client.parser import text_string_to_metric_families
from synthetic_run import write_run

NOT_APPLIED = (
    "ApplyError: part 1 of version 47 decodes to other values than its writer hashed; live tensors"
    " that are not those of version 46"
)
"""As tests/comm/test_log_faults.py has it."""


@pytest.fixture
def server(tmp_path, monkeypatch, request):
    for name, value in getattr(request, "param", {}).items():
        monkeypatch.setenv(name, value)
    write_run(tmp_path)
    started = MetricsServer(tmp_path, "127.0.0.1", 0)
    yield started
    started.close()


def get(url, token=None):
    request = urllib.request.Request(url)
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def samples(text):
    families = text_string_to_metric_families(text)
    return {(s.name, s.labels.get("engine")): s.value for f in families for s in f.samples}


def test_the_numbers_are_those_of_the_summary(server, tmp_path):
    found, events, summary = samples(get(server.url)), read_events(tmp_path), summarise(tmp_path)
    assert {name.removeprefix("gossamer_") for name, _ in found} == set(METRICS)
    assert found["gossamer_wire_bytes_total", None] == summary["wire_bytes"]
    assert found["gossamer_version", None] == summary["version_last"]
    assert found["gossamer_engine_deaths_total", None] == 1
    assert found["gossamer_engine_up", "engine-1"] == 1  # of the second attempt
    assert (found["gossamer_ended", None], found["gossamer_attempts_total", None]) == (1, 2)
    steps = of_kind(events, "train_step")
    assert found["gossamer_tokens_total", None] == sum(e["tokens"] for e in steps)
    assert found["gossamer_wait_seconds_total", None] == pytest.approx(
        sum(e["wait_s"] for e in steps)
    )


def test_it_goes_on_with_the_run(server, tmp_path):
    before = samples(get(server.url))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"event": "checkpoint", "time_s": 2e9, "step": 777}\n{"event": "train_st')
    after = samples(get(server.url))
    assert after["gossamer_checkpoint_step", None] == 777
    changed = {name for (name, _), value in after.items() if before[name, _] != value}
    assert changed == {"gossamer_checkpoint_step", "gossamer_last_event_timestamp_seconds"}


def engines_told(*told):
    """The numbers after (engine, what, version, reason) events; pools made anew are a None."""
    numbers = Numbers()
    for each in told:
        if each is None:
            numbers.take({"event": "pools", "time_s": 1.0, "pools": ["engine"]})
            continue
        engine, what, version, *reason = each
        event = {"event": "engine", "engine": engine, "what": what, "version": version}
        numbers.take(event | {"time_s": 1.0, "reason": "".join(reason)})
    families = text_string_to_metric_families(numbers.text("r"))
    found = [sample for family in families for sample in family.samples]
    return {(s.name.removeprefix("gossamer_"), *[*s.labels.values()][1:]): s.value for s in found}


def test_an_engine_that_is_gone_leaves_no_gauge_behind():
    lived = [("engine-0", "start", None), ("engine-0", "commit", 4), ("engine-1", "commit", 5)]
    for what in ("dead", "left", "lost", "drained"):
        # one that is drained may finish its unit
        found = engines_told(*lived, ("engine-0", what, None), ("engine-0", "generate", 4))
        assert ("engine_version", "engine-0") not in found
        assert ("engine_up", "engine-0") not in found
        assert found["engine_version", "engine-1"] == 5
    # a server comes back under its name; a new driver's engines are others
    again = [("engine-0", "dead", None), ("engine-0", "waits", None)]
    assert engines_told(*lived, *again)["engine_up", "engine-0"] == 0
    up = engines_told(*lived, *again, ("engine-0", "replaced", None), ("engine-0", "ready", 9))
    assert (up["engine_up", "engine-0"], up["engine_version", "engine-0"]) == (1, 9)
    found = engines_told(*lived, None, ("engine-0", "ready", 7))
    assert ("engine_up", "engine-1") not in found and found["engine_version", "engine-0"] == 7


def test_a_failed_audit_while_the_run_goes_is_counted():
    actor = object.__new__(EngineActor)
    actor._version, actor._fault = 3, None
    actor._engine = SimpleNamespace(audit=lambda: "beef")
    actor._log = SimpleNamespace(manifest=lambda version: SimpleNamespace(state_hash="cafe"))
    actor._check_bits()
    assert engines_told() == {
        ("engine_deaths_total",): 0,
        **{("engine_drains_total", cause): 0 for cause in DRAINS},
    }
    found = engines_told(
        ("engine-0", "drained", None, actor._fault),
        ("engine-1", "drained", None, "5 versions behind, rollout.max_behind is 4"),
        ("engine-2", "drained", None, "LogError: frame 3 is damaged"),
        ("engine-3", "drained", None, f"{NOT_APPLIED}: lm_head.weight"),
        ("engine-4", "drained", None, f"{NOT_APPLIED}: none"),
    )
    assert [found["engine_drains_total", c] for c in ("bits", "behind", "other")] == [2, 1, 2]


@pytest.mark.parametrize("server", [{TOKEN_VARIABLE: "s3cret"}], indirect=True)
def test_a_token_is_asked_for(server):
    for token in (None, "", "S3cret", "s3cret "):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            get(server.url, token)
    assert "gossamer_step" in get(server.url, "s3cret")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        get(server.url.replace("/metrics", "/etc"), "s3cret")


def test_other_machines_need_a_token(tmp_path, monkeypatch):
    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    with pytest.raises(
        ValueError, match=rf"0\.0\.0\.0 can be reached .* token in \${TOKEN_VARIABLE}"
    ):
        MetricsServer(tmp_path, "0.0.0.0", 0)
    monkeypatch.setenv(TOKEN_VARIABLE, "s3cret")
    MetricsServer(tmp_path, "0.0.0.0", 0).close()


def test_what_is_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(
        map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "", "head", "localhost.evil.org"))
    )
