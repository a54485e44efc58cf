"""What every store owes: whole files or none, and a name that only one writer can create."""

import threading

import pytest
from gossamer.comm.store import STORES, open_store


@pytest.fixture(params=STORES)
def store(request, tmp_path):
    places = {"file": f"file://{tmp_path}/log"}
    return open_store(places[request.param], create=True)


def test_a_file_comes_back_and_can_be_replaced(store):
    store.put("HEAD", b"1", overwrite=True)
    store.put("HEAD", b"22", overwrite=True)
    assert store.get("HEAD") == b"22"
    assert store.size("HEAD") == 2 and store.size("HEA") is None
    store.delete("HEAD")
    store.delete("HEAD")
    assert store.size("HEAD") is None


def test_a_range_of_a_file(store):
    store.put("a", bytes(range(100)))
    assert store.get("a", 10, 20) == bytes(range(10, 20))
    assert store.get("a", 90) == bytes(range(90, 100))
    assert store.get("a", 95, 200) == bytes(range(95, 100))


def test_a_name_is_created_once(store):
    assert store.put("parts/a", b"first")
    assert not store.put("parts/a", b"second")
    assert store.get("parts/a") == b"first"
    assert store.list("parts/") == ["parts/a"]


def test_one_of_many_creators_wins(store):
    for round_number in range(10):
        name, start, won = f"manifest-{round_number}", threading.Barrier(8), []

        def create(writer, name=name, start=start, won=won):
            start.wait()
            if store.put(name, b"%d" % writer * 1000):
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
    store.put("HEAD", bodies[0], overwrite=True)
    done = threading.Event()

    def write():
        for turn in range(40):
            store.put("HEAD", bodies[turn % 2], overwrite=True)
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
        store.put(name, b"")
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
