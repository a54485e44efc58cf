"""Links of a given rate between replicas on one machine: as fast as they say, and no faster."""

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from gossamer.comm.store import open_store
from gossamer.launch import thin_link
from gossamer.launch.testbed import TestbedError, unusable
from gossamer.launch.thin_link import thin_links

DATA = bytes(1_000_000)  # 80 ms at 100 Mbit/s


def check_rate(folder, mbit):
    least_s = len(DATA) * 8 / (mbit * 1e6)
    with thin_links(folder, 2, mbit) as links:
        stores = [open_store(url) for url in links.urls]
        stores[0].put("warm", b"")
        for way, move in (
            ("up", lambda store, i: store.put(f"rounds/0/{i}", DATA)),
            ("down", lambda store, i: store.get("rounds/0/0")),
        ):
            start_s = time.monotonic()
            move(stores[0], 0)
            took_s = time.monotonic() - start_s
            # bounds that hold on a loaded machine; a burst may pass at once
            assert 0.8 * least_s < took_s < 5 * least_s + 1.0, (way, took_s, least_s)
        # one link's bytes are no burden on the other's
        start_s = time.monotonic()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda i: stores[i].get("rounds/0/0"), range(2)))
        assert time.monotonic() - start_s < 6 * least_s + 1.0
        assert open_store(folder).get("rounds/0/0") == DATA
        return links.shaped_by


def test_without_root_a_proxy_keeps_the_rate(tmp_path, monkeypatch):
    def refuse(n, mbit):
        raise TestbedError("the network test bed needs root; run it as root")

    monkeypatch.setattr(thin_link, "hosts", refuse)
    assert check_rate(tmp_path, 40).startswith("a proxy (the network test bed needs root")


def test_a_link_serves_many_connections_at_once_at_one_rate(tmp_path, monkeypatch):
    def refuse(n, mbit):
        raise TestbedError("no root")

    monkeypatch.setattr(thin_link, "hosts", refuse)
    with thin_links(tmp_path, 1, 40) as links:
        store = open_store(links.urls[0])
        start_s = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            sent = list(pool.map(lambda i: store.put(f"{i}", DATA), range(4)))
        assert sent == [True] * 4
        assert time.monotonic() - start_s > 0.8 * 4 * len(DATA) * 8 / 40e6


@pytest.mark.testbed
def test_with_root_the_kernel_keeps_the_rate(tmp_path):
    if reason := unusable():
        pytest.skip(reason)
    assert check_rate(tmp_path, 100) == "the kernel, in network namespaces"


def test_a_rate_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="above 0 Mbit/s, not 0"), thin_links(tmp_path, 1, 0):
        pass
