"""What every store owes: whole files or none, and a name that only one writer can create."""

import threading

import pytest
from gossamer.comm.store import STORES, open_store


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    places = {"file": f"file://{tmp_path}/log"}
    return open_store(places[request.param], create=True)


def test_a_file_comes_back_and_can_be_replaced(store):
    store.put("HEAD", b"1")
    store.put("HEAD", b"22")
    assert store.get("HEAD") == b"22"
    assert store.exists("HEAD") and not store.exists("HEA")


def test_a_name_is_created_once(store):
    assert store.create("parts/a", b"first")
    assert not store.create("parts/a", b"second")
    assert store.get("parts/a") == b"first"
    assert store.list("parts/") == ["parts/a"]


def test_one_of_many_creators_wins(store):
    for round_number in range(10):
        name, start, won = f"manifest-{round_number}", threading.Barrier(8), []

        def create(writer, name=name, start=start, won=won):
            start.wait()
            if store.create(name, b"%d" % writer * 1000):
                won.append(writer)

        threads = [threading.Thread(target=create, args=(writer,)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.get(name) == b"%d" % won[0] * 1000


def test_readers_see_whole_files_only(store):
    bodies = [bytes([letter]) * 200_000 for letter in b"ab"]
    store.put("HEAD", bodies[0])
    done = threading.Event()

    def write():
        for turn in range(40):
            store.put("HEAD", bodies[turn % 2])
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert store.get("HEAD") in bodies
        assert store.list("") == ["HEAD"]
    writer.join()


def test_a_missing_file_is_named(store):
    with pytest.raises(FileNotFoundError, match="parts/00000003-e0001-p0.delta"):
        store.get("parts/00000003-e0001-p0.delta")


def test_list_is_sorted_and_keeps_to_the_prefix(store):
    for name in ("manifest-2", "manifest-10", "epoch-1", "parts/x"):
        store.create(name, b"")
    assert store.list("manifest-") == ["manifest-10", "manifest-2"]
    assert store.list("parts/") == ["parts/x"]
    assert store.list("nowhere/") == []


def test_names_stay_inside(store):
    for name in ("../x", "/etc/x", ""):
        with pytest.raises(ValueError, match="leaves store"):
            store.put(name, b"")


def test_an_unknown_scheme_and_a_missing_place_are_refused(tmp_path):
    with pytest.raises(ValueError, match="scheme 'ftp' is not one of file"):
        open_store("ftp://x")
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        open_store(tmp_path / "nowhere")
