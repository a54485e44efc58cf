"""HttpStore and the server it reads from: what is cut goes on, what lies is refused."""

import datetime
import ipaddress
import json
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest
from bad_link import BadLink
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from gossamer.comm.store import StoreError, http, open_store, patience
from gossamer.comm.store.serve import serve
from scripted_server import head, scripted

LARGE = bytes(range(256)) * 40_000
IMMUTABLE = "Cache-Control: public, immutable"


@pytest.fixture
def behind(tmp_path):
    return open_store(tmp_path / "log", create=True)


@pytest.fixture
def server(behind):
    started = serve(behind)
    yield started
    started.close()


@pytest.fixture
def hasty(monkeypatch):
    """What is opened in this test gives up soon."""
    monkeypatch.setenv("GOSSAMER_STORE_PATIENCE_S", "0.2")
    monkeypatch.setattr(http, "SILENCE_S", 0.2)


def test_a_cut_body_goes_on_where_it_stopped(behind, server):
    behind.put("parts/large", LARGE)
    link = BadLink(server.server_port)
    store = open_store(f"http://127.0.0.1:{link.port}")
    link.cuts += [3_000_000, 10, 500, 4_000_000]
    assert store.get("parts/large") == LARGE
    assert not link.cuts
    assert link.passed < len(LARGE) + 500_000  # socket buffers that were lost
    link.cuts.append(1_000_000)
    assert store.get("parts/large", 5, 2_000_000) == LARGE[5:2_000_000]
    link.close()


def test_a_file_that_may_change_is_read_from_its_start(behind, server):
    link = BadLink(server.server_port)
    store = open_store(f"http://127.0.0.1:{link.port}")
    behind.put("HEAD", LARGE, overwrite=True)
    link.cuts.append(3_000_000)
    other = LARGE[::-1]
    changer = threading.Timer(0.0, behind.put, ("HEAD", other, True))
    changer.start()
    assert store.get("HEAD") in (LARGE, other)
    assert not link.cuts
    changer.join()
    link.close()


def test_a_file_that_is_replaced_while_it_is_sent_is_no_mix_of_both(behind, server, monkeypatch):
    behind.put("HEAD", LARGE, overwrite=True)
    get = behind.get

    def get_and_replace(name, start=0, stop=None):
        data = get(name, start, stop)
        behind.put(name, LARGE[::-1], overwrite=True)
        return data

    monkeypatch.setattr(behind, "get", get_and_replace)
    assert open_store(server.url).get("HEAD") == LARGE


def test_a_link_that_always_cuts_is_given_up(behind, server, monkeypatch):
    link = BadLink(server.server_port)
    link.cuts += [200_000] * 1000
    for name in ("HEAD", "parts/large"):
        behind.put(name, LARGE[:2_000_000])
    url = f"http://127.0.0.1:{link.port}"
    patient = open_store(url)
    monkeypatch.setenv("GOSSAMER_STORE_PATIENCE_S", "0.2")
    store = open_store(url)
    with pytest.raises(StoreError, match="get HEAD failed for 0.2 s .*IncompleteRead"):
        store.get("HEAD")
    link.cut()
    with pytest.raises(StoreError, match=r"get parts/large failed for 0.2 s .*refused"):
        store.get("parts/large")
    link.mend()
    assert patient.get("parts/large") == LARGE[:2_000_000]  # each piece is progress
    link.close()


TEN = b"0123456789"
EXACT = [
    (0, None, [head("200 OK", "Content-Length: 10"), TEN]),
    (2, 6, [head("200 OK", "Content-Length: 10"), TEN]),  # Range is not heeded
    (8, 99, [head("200 OK", "Content-Length: 10"), TEN]),
    (10, None, [head("200 OK", "Content-Length: 10"), TEN]),
    (0, None, [head("200 OK", "Content-Length: 10"), TEN, b"surplus", None]),
    (
        0,
        None,
        [head("200 OK", "Content-Length: 10"), TEN, head("200 OK", "Content-Length: 3"), None],
    ),
    (2, 6, [head("206 x", "Content-Length: 4", "Content-Range: bytes 2-5/10"), b"2345"]),
    (8, 99, [head("206 x", "Content-Length: 2", "Content-Range: bytes 8-9/10"), b"89"]),
    (10, 12, [head("416 x", "Content-Length: 0", "Content-Range: bytes */10")]),
    (0, None, [head("100 Continue"), head("200 OK", "Content-Length: 10"), TEN]),
]
REFUSED = [
    (0, None, [head("200 OK", "Content-Length: 11"), TEN], "IncompleteRead.*1 more expected"),
    (0, None, [head("200 OK", "Content-Length: 11"), TEN, None], "timed out"),
    (0, None, [head("200 OK", "Content-Length: -1"), TEN], "must say how many bytes"),
    (0, None, [head("200 OK", "Content-Length: ten"), TEN], "must say how many bytes"),
    (0, None, [head("200 OK"), TEN], "must say how many bytes"),
    (0, None, [head("200 OK", "Transfer-Encoding: chunked"), b"a\r\n", TEN], "must say how many"),
    (0, None, [head("200 OK", "Content-Length: 10", "Content-Encoding: gzip"), TEN], "uncoded"),
    (2, 6, [head("206 x", "Content-Length: 4", "Content-Range: bytes 3-6/10"), b"3456"], "3-6/10"),
    (
        2,
        6,
        [head("206 x", "Content-Length: 5", "Content-Range: bytes 2-5/10"), b"23456"],
        "5 bytes",
    ),
    (2, 6, [head("206 x", "Content-Length: 8", "Content-Range: bytes 2-9/10"), b"x" * 8], "2-9/10"),
    (2, 6, [head("206 x", "Content-Length: 4"), b"2345"], "answers '' and 4 bytes"),
    (2, 6, [head("416 x", "Content-Length: 0", "Content-Range: bytes */10")], "answers"),
    (0, None, [head("416 x", "Content-Length: 0")], "refuses parts/a: 416"),
    (0, None, [head("206 x", "Content-Length: 0", "Content-Range: bytes 0--1/0")], "206 x"),
    (2, 6, [head("206 x", "Content-Length: 0", "Content-Range: bytes 2-1/0")], "answers"),
    (0, None, [head("200 OK", "Content-Length: " + "1" * 5000), TEN], "must say how many bytes"),
    (0, None, [head("302 Found", "Location: http://x/", "Content-Length: 0")], "302 Found"),
    (0, None, [head("403 Forbidden", "Content-Length: 0")], "GOSSAMER_LOG_TOKEN must hold"),
    (0, None, [head("500 Oh no", "Content-Length: 0")], "failed for 0.2 s .*500 Oh no"),
    (0, None, [b"SSH-2.0-OpenSSH\r\n"], "failed for 0.2 s"),
    (0, None, [b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 200], "failed for 0.2 s"),
    (0, None, [b"HTTP/1.1 200 " + b"x" * 70_000], "failed for 0.2 s"),
    (0, None, [b""], "failed for 0.2 s"),
    (0, None, [b"", None], "timed out"),
]


@pytest.mark.parametrize(("start", "stop", "answer"), EXACT)
def test_an_honest_answer_gives_the_exact_bytes(start, stop, answer):
    with scripted(answer) as url:
        store = open_store(url)
        for _ in range(3):
            assert store.get("parts/a", start, stop) == TEN[start:stop]


@pytest.mark.parametrize(("start", "stop", "answer", "sentence"), REFUSED)
def test_a_lie_is_an_error(start, stop, answer, sentence, monkeypatch):
    monkeypatch.setenv("GOSSAMER_STORE_PATIENCE_S", "0.2")
    if answer[-1] is None:  # what comes must not be taken for silence on a slow machine
        monkeypatch.setattr(http, "SILENCE_S", 0.2)
    with scripted(answer) as url:
        started_s = time.monotonic()
        with pytest.raises(StoreError, match=sentence):
            open_store(url).get("parts/a", start, stop)
        assert time.monotonic() - started_s < 20


def test_a_second_answer_must_go_on_with_the_first():
    cut = [head("200 OK", "Content-Length: 10", IMMUTABLE), b"01234"]
    good = [head("206 x", "Content-Length: 5", "Content-Range: bytes 5-9/10", IMMUTABLE), b"56789"]
    other = [head("206 x", "Content-Length: 5", "Content-Range: bytes 4-8/10", IMMUTABLE), b"45678"]
    short = [head("206 x", "Content-Length: 4", "Content-Range: bytes 5-8/9", IMMUTABLE), b"5678"]
    with scripted(cut, good) as url:
        assert open_store(url).get("parts/a") == TEN
    with scripted(cut, [head("200 OK", "Content-Length: 10", IMMUTABLE), TEN]) as url:
        assert open_store(url).get("parts/a") == TEN
    gone = [head("416 x", "Content-Length: 0", "Content-Range: bytes */5", IMMUTABLE)]
    for bad in (other, gone):
        with scripted(cut, bad) as url:
            with pytest.raises(StoreError, match="for bytes 5 to the end of parts/a"):
                open_store(url).get("parts/a")
    with scripted(cut, short) as url:
        with pytest.raises(StoreError, match="changed parts/a while it was read"):
            open_store(url).get("parts/a")


def test_bytes_that_come_late_are_not_the_next_answer():
    forged = head("200 OK", "Content-Length: 10") + b"abcdefghij"
    read, sent = threading.Event(), threading.Event()
    late = [head("200 OK", "Content-Length: 10"), TEN, read.wait, forged, sent.set, None]
    with scripted(late, [head("200 OK", "Content-Length: 10"), TEN]) as url:
        store = open_store(url)
        assert store.get("parts/a") == TEN
        read.set()
        assert sent.wait(5)
        assert store.get("parts/a") == TEN


def test_a_drip_is_not_waited_for(hasty):
    listener = socket.create_server(("127.0.0.1", 0))

    def drip():
        connection, _ = listener.accept()
        connection.recv(65536)
        connection.sendall(head("200 OK", "Content-Length: 1000000", IMMUTABLE))
        try:
            while True:
                connection.sendall(b"x")
                time.sleep(0.02)
        except OSError:
            pass

    threading.Thread(target=drip, daemon=True).start()
    with pytest.raises(StoreError, match=f"fewer than {patience.PROGRESS_BYTES} bytes came|failed"):
        open_store(f"http://127.0.0.1:{listener.getsockname()[1]}").get("parts/a")
    listener.close()


def test_a_listing_that_lies_is_refused():
    for body in (
        b"{}x",
        b'{"manifest-": 1}',
        b"[1]",
        b"[" * 9999,
        b'["other"]',
        b"[[]]",
        b"\xff",
        b"7",
    ):
        with scripted([head("200 OK", f"Content-Length: {len(body)}"), body]) as url:
            with pytest.raises(StoreError, match="lists no names"):
                open_store(url).list("manifest-")


def test_it_is_read_only(server, behind):
    behind.put("a", b"1")
    store = open_store(server.url, create=True)
    for call in (lambda: store.put("a", b""), lambda: store.delete("a")):
        with pytest.raises(StoreError, match="is read only: a must be"):
            call()
    for method in ("PUT", "DELETE", "POST", "PATCH"):
        assert raw(server, method, "/a")[0] == 501
    assert behind.get("a") == b"1"
    with pytest.raises(ValueError, match=r"must be http\(s\)://host"):
        open_store("http://")


def raw(server, method, target, headers=None):
    """(status, headers, body) of one request, its target sent as it is."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=5)
    connection.putrequest(method, target, skip_accept_encoding=True)
    for key, value in (headers or {}).items():
        connection.putheader(key, value)
    connection.endheaders()
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


OUTSIDE = """
/../secret /%2e%2e/secret /parts/../../secret /..%2fsecret //etc/passwd http://elsewhere/secret *
/parts /parts/ /.tmp-1 /parts/a%00 /parts/a%ff /parts\\a /nothing /?list=../ /?list=/etc/
"""


def test_only_files_of_the_log_are_served(server, behind, tmp_path):
    (tmp_path / "secret").write_text("secret")
    behind.put("parts/a", b"1")
    (tmp_path / "log/.tmp-1").write_text("half")
    for target in [*OUTSIDE.split(), f"/{tmp_path}/secret", "/" + "x" * 300]:
        for method in ("GET", "HEAD"):
            status, _, body = raw(server, method, target)
            assert status in (400, 404, 503) and b"secret" not in body, target
    assert json.loads(raw(server, "GET", "/?list=")[2]) == []
    assert json.loads(raw(server, "GET", "/?list=parts/")[2]) == ["parts/a"]


def test_ranges_and_cache_headers(server, behind):
    behind.put("parts/a", TEN)
    for asked, status, body in [
        ("bytes=2-5", 206, b"2345"),
        ("bytes=8-", 206, b"89"),
        ("bytes=8-100", 206, b"89"),
        ("bytes=10-", 416, b""),
        ("bytes=5-2", 416, b""),
        ("bytes=-3", 200, TEN),
        ("bytes=0-1,4-5", 200, TEN),
        ("lines=1-2", 200, TEN),
    ]:
        found, headers, got = raw(server, "GET", "/parts/a", {"Range": asked})
        assert (found, got) == (status, body)
    cached = {
        "parts/a": "immutable",
        "manifest-00000001.json": "immutable",
        "fold-00000001-00000004.json": "immutable",
        "epoch-0001.json": "immutable",
        "HEAD": "no-cache",
        "gc.json": "no-cache",
        "log.json": "no-cache",
    }
    for name, said in cached.items():
        behind.put(name, b"1")
        for method in ("GET", "HEAD"):
            assert said in raw(server, method, f"/{name}")[1]["Cache-Control"]
    assert raw(server, "GET", "/none")[1]["Cache-Control"] == "no-store"  # it may come to exist


def test_a_token_is_asked_for(behind, monkeypatch):
    behind.put("parts/a", TEN)
    monkeypatch.setenv("GOSSAMER_LOG_TOKEN", "sesame")
    server = serve(behind)
    store = open_store(server.url)
    assert store.get("parts/a") == TEN and store.list("parts/") == ["parts/a"]
    assert (
        "private"
        in raw(server, "HEAD", "/parts/a", {"Authorization": "Bearer sesame"})[1]["Cache-Control"]
    )
    for token in ("", "sesam", "sesame2"):
        monkeypatch.setenv("GOSSAMER_LOG_TOKEN", token)
        for call in (lambda: store.get("parts/a"), lambda: store.size("a"), lambda: store.list("")):
            with pytest.raises(StoreError, match="401 Unauthorized; GOSSAMER_LOG_TOKEN must hold"):
                call()
    assert raw(server, "GET", "/parts/a", {"Authorization": "B\xff"})[0] == 401
    server.close()


def test_one_connection_serves_many_questions_and_many_threads_ask(server, behind):
    behind.put("parts/large", LARGE)
    link = BadLink(server.server_port)
    store = open_store(f"http://127.0.0.1:{link.port}")
    for _ in range(20):
        assert store.get("parts/large", 7, 9) == LARGE[7:9]
        assert store.size("parts/large") == len(LARGE) and store.size("none") is None
        assert store.list("parts/") == ["parts/large"]
    assert link.connections == 1
    with ThreadPoolExecutor(16) as pool:
        starts = range(0, 1_000_000, 10_000)
        pieces = pool.map(lambda start: store.get("parts/large", start, start + 10_000), starts)
        assert b"".join(pieces) == LARGE[:1_000_000]
    link.close()


def test_a_server_of_a_server(server, behind, monkeypatch):
    behind.put("parts/large", LARGE)
    second = serve(open_store(server.url))
    store = open_store(second.url)
    assert store.get("parts/large") == LARGE and store.list("parts/") == ["parts/large"]
    second.close()
    monkeypatch.setenv("GOSSAMER_STORE_PATIENCE_S", "0.2")
    second = serve(open_store(server.url))
    store = open_store(second.url)
    server.close()
    with pytest.raises(StoreError, match="failed for 0.2 s .*: 503 Service Unavailable"):
        store.size("parts/large")
    second.close()
    with pytest.raises(StoreError, match="failed for 0.2 s .*refused"):
        store.size("parts/large")


def own_certificate():
    """A certificate for 127.0.0.1 and its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    place = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), 7, now - day, now + day)
        .add_extension(place, critical=False)
        .sign(key, hashes.SHA256())
    )
    clear = serialization.NoEncryption()
    pem, pkcs8 = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return certificate.public_bytes(pem) + key.private_bytes(pem, pkcs8, clear)


def test_over_tls(server, behind, tmp_path, monkeypatch):
    pem = tmp_path / "both.pem"
    pem.write_bytes(own_certificate())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    behind.put("parts/large", LARGE)
    url = f"https://127.0.0.1:{server.server_port}"
    with monkeypatch.context() as hasty:
        hasty.setenv("GOSSAMER_STORE_PATIENCE_S", "0.2")
        unsure = open_store(url)
    with pytest.raises(StoreError, match="CERTIFICATE_VERIFY_FAILED"):
        unsure.get("parts/large")
    monkeypatch.setenv("SSL_CERT_FILE", str(pem))
    store = open_store(url)
    for _ in range(3):
        assert store.get("parts/large") == LARGE and store.size("parts/large") == len(LARGE)
