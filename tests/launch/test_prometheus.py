"""What Prometheus gets: parsed by its own parser, summed as the report sums, to whom it is due."""

import urllib.error
import urllib.request

import pytest
from gossamer.launch.endpoint import is_loopback
from gossamer.launch.prometheus import METRICS, TOKEN_VARIABLE, MetricsServer
from gossamer.launch.summary import of_kind, read_events, summarise
from prometheus_client.parser import text_string_to_metric_families
from synthetic_run import write_run


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
