"""How the ranks of a gang find each other when they are on several hosts.

The one idea: gloo listens where the host's own name points to, which on many hosts is loopback; the
cluster knows an address of every node by which the others reach it, so gloo is given the interface
that holds it: loopback, in a cluster of this machine alone. Whoever sets GLOO_SOCKET_IFNAME where
the node is started is obeyed.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from dataclasses import dataclass

import ray
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

VARIABLE = "GLOO_SOCKET_IFNAME"
SIOCGIFADDR = 0x8915


@dataclass
class GlooConfig(TorchConfig):
    """TorchConfig for gloo, over the cluster's own links."""

    backend: str | None = "gloo"

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Gloo


class _Gloo(_TorchBackend):
    def on_start(  # type: ignore[override]
        self, worker_group: BaseWorkerGroup, backend_config: TorchConfig
    ) -> None:
        addresses = set(worker_group.execute(ray.util.get_node_ip_address))
        if len(addresses) > 1 or addresses == {"127.0.0.1"}:
            worker_group.execute(use_cluster_interface)
        super().on_start(worker_group, backend_config)


def use_cluster_interface() -> None:
    """In a rank's process: names the interface for gloo, where it is known and not named yet."""
    name = interface_of(ray.util.get_node_ip_address())
    if name is not None:
        os.environ.setdefault(VARIABLE, name)


def interface_of(address: str) -> str | None:
    """The network interface of this host that holds an IPv4 address; None where none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode())
            try:
                answer = fcntl.ioctl(asked.fileno(), SIOCGIFADDR, request)
            except OSError:  # it has no such address
                continue
            if socket.inet_ntoa(answer[20:24]) == address:
                return name
    return None
