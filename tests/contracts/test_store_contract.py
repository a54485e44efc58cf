"""What every store owes: whole files or none, and a name that only one writer can create."""

import threading

import pytest
from gossamer.comm.store import STORES, open_store
from gossamer.comm.store.serve import serve
from s3_server import S3Server, s3_environment

NOT_RUN = {"gs", "az"}  # the class of s3; no server that speaks their protocols is at hand
SCHEMES = [
    pytest.param(scheme, marks=pytest.mark.slow) if scheme == "ray" else scheme
    for scheme in STORES
    if scheme not in NOT_RUN | {"https"}  # test_http_store.py runs http's class over TLS
]


def s3_store(tmp_path, s3_server):
    bucket = tmp_path.name.replace("_", "-")
    s3_server.put(bucket)
    with s3_environment(s3_server.port):
        yield open_store(f"s3://{bucket}/run/log", create=True)


def served_store(tmp_path):
    behind = open_store(tmp_path / "log", create=True)
    server = serve(behind, writable=True)
    yield open_store(server.url)
    server.close()


@pytest.fixture(scope="module")
def s3_server():
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def ray_cluster():
    import ray

    # without an address it is whatever cluster RAY_ADDRESS or this machine has
    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(params=SCHEMES)
def store(request, tmp_path):
    if request.param == "s3":
        yield from s3_store(tmp_path, request.getfixturevalue("s3_server"))
    elif request.param == "http":
        yield from served_store(tmp_path)
    elif request.param == "ray":
        request.getfixturevalue("ray_cluster")
        yield open_store(f"ray://{tmp_path.name}", create=True)
    else:
        yield open_store(f"{request.param}://{tmp_path}/log", create=True)


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
    assert store.get("a", 100) == store.get("a", 200, 300) == store.get("a", 30, 30) == b""
    store.put("empty", b"")
    assert store.get("empty") == store.get("empty", 0, 10) == b"" and store.size("empty") == 0
    with pytest.raises(FileNotFoundError):
        store.get("b", 30, 30)


def test_a_large_file_and_its_ranges(store):
    data = bytes(range(256)) * 20_000
    store.put("parts/large", data)
    assert store.get("parts/large") == data and store.size("parts/large") == len(data)
    assert store.get("parts/large", 3_000_000, 3_000_300) == data[3_000_000:3_000_300]
    assert store.get("parts/large", len(data) - 7) == data[-7:]


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
    for name in ("../x", "/etc/x", "", "a/../../x", "a//b", "./a", "a\n"):
        for call in (lambda n: store.put(n, b""), store.get, store.size, store.delete):
            with pytest.raises(ValueError, match="leaves store"):
                call(name)


def test_an_unknown_scheme_and_a_missing_place_are_refused(tmp_path):
    with pytest.raises(ValueError, match="scheme 'ftp' is not one of file"):
        open_store("ftp://x")
    with pytest.raises(FileNotFoundError, match="nowhere is not a directory"):
        open_store(tmp_path / "nowhere")


@pytest.mark.slow
def test_a_ray_store_is_found_by_its_name(ray_cluster):
    with pytest.raises(FileNotFoundError, match="ray://other is not in the Ray cluster"):
        open_store("ray://other")
    open_store("ray://one", create=True).put("a", bytes(200_000))
    again = open_store("ray://one", create=True)
    assert not again.put("a", b"") and open_store("ray://one").size("a") == 200_000
