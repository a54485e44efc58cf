"""Gloo is given the interface that holds a node's address, unless its owner named one."""

import os
import socket
from unittest import mock

import ray
from gossamer.launch.gloo import VARIABLE, GlooConfig, interface_of, use_cluster_interface


def test_the_interface_of_an_address():
    assert interface_of("127.0.0.1") in dict(map(reversed, socket.if_nameindex()))
    assert interface_of("192.0.2.1") is None  # for documentation: nobody's


def test_what_the_owner_named_stays_and_nothing_unknown_is_named():
    with mock.patch.dict(os.environ, {VARIABLE: "eth9"}):
        use_cluster_interface()
        assert os.environ[VARIABLE] == "eth9"
        del os.environ[VARIABLE]
        with mock.patch.object(ray.util, "get_node_ip_address", lambda: "192.0.2.1"):
            use_cluster_interface()
        assert VARIABLE not in os.environ
        with mock.patch.object(ray.util, "get_node_ip_address", lambda: "127.0.0.1"):
            use_cluster_interface()
        assert os.environ[VARIABLE] == interface_of("127.0.0.1")


def test_it_is_gloo_by_ray_train():
    assert GlooConfig().backend == "gloo"
