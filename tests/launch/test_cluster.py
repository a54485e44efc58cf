"""A run's own cluster is nobody else's business."""

import json
import os
import subprocess
import sys

import pytest

CLUSTER = """
import json, sys
from pathlib import Path
import psutil
from gossamer.launch.cluster import connect
from gossamer.launch.recipe import load_recipe

run_dir = Path(sys.argv[1])
(run_dir / "logs").mkdir()
with connect(load_recipe("pretrain_stdlib", []), run_dir):
    import ray
    found = []
    for process in psutil.Process().children(recursive=True):
        for each in process.net_connections("tcp"):
            if each.status == psutil.CONN_LISTEN:
                found.append((process.name(), each.laddr.ip))
    print(json.dumps([ray.util.get_node_ip_address(), found]))
"""


@pytest.mark.slow
def test_a_local_cluster_listens_on_loopback_alone(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name[:4] != "RAY_"}
    command = [sys.executable, "-c", CLUSTER, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    address, listening = json.loads(done.stdout.splitlines()[-1])
    assert address == "127.0.0.1" and any(name == "gcs_server" for name, _ in listening)
    others = [each for each in listening if each[1] not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]
    assert others == []
