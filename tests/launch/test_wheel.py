"""The wheel that travels with a job: all of the four rooms, no dependency, one name a content."""

import subprocess
import sys
import zipfile
from pathlib import Path

from gossamer.launch.wheel import ROOMS, build_wheel

ROOT = Path(__file__).parents[2]


def test_it_holds_the_rooms_and_asks_for_nothing(tmp_path):
    path = build_wheel(tmp_path)
    with zipfile.ZipFile(path) as wheel:
        held = {name for name in wheel.namelist() if name.endswith((".py", ".yaml"))}
        info = path.name.rsplit("-", 3)[0] + ".dist-info"
        metadata = wheel.read(f"{info}/METADATA").decode()
        entries = wheel.read(f"{info}/entry_points.txt").decode()
    tree = [p for room in ROOMS for p in (ROOT / room).rglob("*") if p.suffix in (".py", ".yaml")]
    assert held == {f"gossamer/{p.relative_to(ROOT)}" for p in tree}
    assert "Requires" not in metadata
    assert "gossamer = gossamer.launch.cli:main" in entries and "vllm.general_plugins" in entries


def test_the_same_files_have_the_same_name(tmp_path):
    first = build_wheel(tmp_path)
    again = tmp_path / "again"
    again.mkdir()
    second = build_wheel(again)
    assert (first.name, first.read_bytes()) == (second.name, second.read_bytes())
    assert first.name.startswith("gossamer-") and "+" in first.name  # Ray caches by name


def test_pip_takes_it_and_python_runs_it(tmp_path):
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--target", target]
    subprocess.run([*pip, build_wheel(tmp_path)], check=True)
    found = subprocess.run(
        [sys.executable, "-m", "gossamer.launch.cli", "validate", "demo", "train.seed=9"],
        env={"PYTHONPATH": str(target)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0 and '"seed": 9' in found.stdout, found.stderr
    assert {p.name for p in target.glob("*")} >= {"gossamer"}
