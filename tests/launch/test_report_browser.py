"""report.html and the placement page in a real browser: every chart is drawn, nothing complains."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from gossamer.launch.cli import main
from gossamer.launch.report import write_report
from synthetic_run import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH (make test-browser)"),
]


def opened(page: Path, profile: Path, width: int = 1240) -> str:
    """The page as a browser makes it, once its scripts have run; none may complain."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu"]
    command += [f"--user-data-dir={profile}", f"--window-size={width},2000"]
    command += ["--enable-logging=stderr", "--virtual-time-budget=8000", "--dump-dom"]
    done = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr  # script errors, refused requests
    return done.stdout


def drawn(dom: str, key: str) -> str:
    """The SVG of a chart."""
    section = re.search(rf'<div id="{key}".*?</section>', dom, re.S)
    assert section and 'class="main-svg"' in section[0], key
    return section[0]


def test_every_chart_of_a_report_is_drawn(tmp_path):
    write_run(tmp_path / "run")
    dom = opened(write_report(tmp_path / "run"), tmp_path / "profile")
    for key, words in {
        "loss": "cross-entropy",
        "reward": "reward (share",
        "gantt": "share of the time",
        "wire": "bytes per version",
        "timeline": "engine-2",
        "pauses": "pause of the commit",
        "density": "changed elements",
        "throughput": "tokens/s",
        "experts": "busiest expert",
    }.items():
        assert words in drawn(dom, key)
    assert drawn(dom, "gantt").count('class="point"') > 200  # bars: hundreds of activities
    assert drawn(dom, "loss").count('class="js-line"') == 2
    assert "<image" in drawn(dom, "experts")  # the heat map


def test_the_browser_refuses_what_the_policy_forbids(tmp_path):
    """That a console with a complaint is noticed at all."""
    write_run(tmp_path / "run")
    page = write_report(tmp_path / "run")
    page.write_text(page.read_text().replace("</main>", '<img src="http://127.0.0.1:9/x"></main>'))
    with pytest.raises(AssertionError, match="Content Security Policy"):
        opened(page, tmp_path / "profile")


def test_the_placement_page_is_drawn(tmp_path):
    experts = [[t % 8, (t + 1 + t % 7) % 8] for t in range(200)]
    record = {"step": 0, "rank": 0, "num_tokens": 200, "topk": 2, "top_indices": experts}
    lines = [json.dumps(record | {"layer": layer}) for layer in (0, 1)]
    (tmp_path / "router_trace_rank0.jsonl").write_text("\n".join(lines) + "\n")
    page = tmp_path / "place.html"
    words = f"place {tmp_path} --time-limit 2 --nodes 2 --gpus-per-node 2 --html {page}".split()
    assert main(words) == 0
    dom = opened(page, tmp_path / "profile")
    keys = re.findall(r'<section[^>]*><h2>.*?<div id="(\w+)"', dom, re.S)
    assert len(keys) == 3
    assert all(drawn(dom, key) for key in keys)
