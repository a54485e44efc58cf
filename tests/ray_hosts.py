"""A Ray cluster whose nodes are hosts of the test bed: each its own network, /tmp and /dev/shm.

The one idea: a process of a host sees the host's own folders at /tmp and /dev/shm and, if there is
one, a folder that all hosts see at SHARED; so nothing crosses between hosts but by a link or there.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gossamer.launch.testbed import Host, hosts

SHARED = "/tmp/shared"
PORT, JOBS_PORT = 6379, 8265
START_S = 120.0
BIN = Path(sys.executable).parent
TESTS = Path(__file__).parent
ENTER = 'mount --bind "$1" /dev/shm && mount --rbind "$2" /tmp && shift 2 && cd /tmp && exec "$@"'
ENTER_SHARED = 'mount --bind "$1" "$3/shared" && set -- "$2" "$3" "${@:4}" && ' + ENTER


class RayHosts:
    """The first host is the head's."""

    def __init__(self, made: list[Host], folder: Path, cpus: Sequence[int], shared: Path | None):
        """folder: for all that the hosts write; cpus: of each, logical; shared: seen at SHARED."""
        self.hosts, self._folder, self._cpus, self._shared = made, folder, cpus, shared
        self._processes: dict[int, subprocess.Popen] = {}
        self.environment = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "PYTHONPATH": str(TESTS),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",  # without it a node does not show the head's token
            "RAY_AUTH_TOKEN": "of-the-test-bed",
            "RAY_JOB_STOP_WAIT_TIME_S": "30",
            "RAY_raylet_start_wait_time_s": "120",  # of a busy machine
            "RAY_API_SERVER_ADDRESS": f"http://{made[0].address}:{JOBS_PORT}",
        }
        for i in range(len(made)):
            (folder / f"host-{i}" / "tmp" / "shared").mkdir(parents=True)
            (folder / f"host-{i}" / "shm").mkdir()
            memory = Path("/dev/shm") / f"{made[i].namespace}"
            memory.mkdir()
            subprocess.run(["mount", "--bind", memory, folder / f"host-{i}" / "shm"], check=True)

    def own(self, i: int) -> Path:
        """Of host i: what its processes see as /tmp, from outside."""
        return self._folder / f"host-{i}" / "tmp"

    def command(self, i: int, *words: object) -> list[str]:
        """The words as a command that runs in host i."""
        own = self._folder / f"host-{i}"
        places = [own / "shm", own / "tmp"]
        script = ENTER
        if self._shared is not None:
            places, script = [self._shared, *places], ENTER_SHARED
        named = [f"{name}={value}" for name, value in self.environment.items()]
        enter = ["ip", "netns", "exec", self.hosts[i].namespace, "bash", "-c", script, "bash"]
        return [*enter, *map(str, places), "env", *named, *map(str, words)]

    def where(self, pid: int) -> int | None:
        """Number of the host that a process runs in; None when it is over."""
        words = ["ip", "netns", "identify", str(pid)]
        name = subprocess.run(words, capture_output=True, text=True).stdout.strip()
        return next((i for i, host in enumerate(self.hosts) if host.namespace == name), None)

    def call(self, i: int, *words: object, timeout_s: float = 400) -> subprocess.CompletedProcess:
        """Runs a command in host i to its end."""
        command = self.command(i, *words)
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)

    def start(self, i: int) -> None:
        """`ray start` on host i; returns once the cluster lists it. The head comes first."""
        host = self.hosts[i]
        words = ["ray", "start", "--block", "--disable-usage-stats", f"--num-cpus={self._cpus[i]}"]
        words += [f"--node-ip-address={host.address}", f"--labels=host=host-{i}"]
        if i == 0:
            words += ["--head", f"--port={PORT}", f"--dashboard-host={host.address}"]
        else:
            words += [f"--address={self.hosts[0].address}:{PORT}"]
        # else Ray looks for the cluster that was here, among processes of other test beds, too
        (self.own(i) / "ray" / "ray_current_cluster").unlink(missing_ok=True)
        with (self._folder / f"host-{i}" / "ray.log").open("a") as log:
            self._processes[i] = subprocess.Popen(
                self.command(i, *words), stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        deadline_s = time.monotonic() + START_S
        while True:
            for started in {0, i}:
                assert self._processes[started].poll() is None, self.log(started)
            said = self.call(0, "timeout", 30, "ray", "list", "nodes")
            if not said.returncode and self._is_listed(host.address, said.stdout):
                return
            assert time.monotonic() < deadline_s, said.stdout + said.stderr
            time.sleep(0.5)

    @staticmethod
    def _is_listed(address: str, text: str) -> bool:
        return any(f" {address} " in line and "ALIVE" in line for line in text.splitlines())

    def log(self, i: int) -> str:
        """What `ray start` printed on host i."""
        return (self._folder / f"host-{i}" / "ray.log").read_text()

    def is_running(self, i: int) -> bool:
        """Whether `ray start --block` is; it ends when its raylet does."""
        return i in self._processes and self._processes[i].poll() is None

    def kill(self, i: int) -> None:
        """SIGKILL to all that runs on host i, as a power cut does."""
        words = ["ip", "netns", "pids", self.hosts[i].namespace]
        while pids := subprocess.run(words, capture_output=True, text=True).stdout.split():
            for pid in pids:
                try:
                    os.kill(int(pid), signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.05)
        if i in self._processes:
            self._processes.pop(i).wait()

    def carried(self, i: int) -> int:
        """Bytes that have crossed the link of host i so far, both ways, headers included."""
        folder = Path("/sys/class/net/eth0/statistics")
        words = ["cat", folder / "rx_bytes", folder / "tx_bytes"]
        return sum(map(int, self.call(i, *words).stdout.split()))


@contextmanager
def ray_hosts(
    folder: Path, cpus: Sequence[int], mbit: float | None = None, shared: Path | None = None
) -> Iterator[RayHosts]:
    """A cluster of len(cpus) hosts, none started yet; at the end all is killed and deleted."""
    with hosts(len(cpus), mbit) as made:
        cluster = RayHosts(made, folder, cpus, shared)
        try:
            yield cluster
        finally:
            for i, host in enumerate(made):
                cluster.kill(i)
                subprocess.run(["umount", folder / f"host-{i}" / "shm"], check=True)
                shutil.rmtree(Path("/dev/shm") / host.namespace)
