"""An S3-speaking server on loopback, for tests: moto's, over real HTTP.

It is a process of its own: vLLM looks into every module of the process it starts in, and those of
Flask, on which moto is built, raise when they are looked at.
"""

import os
import signal
import subprocess
import sys
import urllib.request
from contextlib import contextmanager

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


class S3Server:
    """Listens at `port` from the start."""

    def __init__(self):
        self._process = subprocess.Popen([sys.executable, __file__], stdout=subprocess.PIPE)
        self.port = int(self._process.stdout.readline())

    def put(self, path, data=b""):
        """PUT /path, which makes a bucket, an object or a bucket's policy."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            data=data,
            headers={"Content-Type": "application/octet-stream"},
            method="PUT",
        )
        urllib.request.urlopen(request, timeout=10).close()

    @contextmanager
    def held(self):
        """A context in which it takes connections and does not answer."""
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def close(self):
        self._process.kill()
        self._process.wait()
        self._process.stdout.close()


@contextmanager
def s3_environment(port):
    """The variables by which obstore finds the server at `port` of loopback."""
    before = dict(os.environ)
    os.environ.update(KEYS, AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def serve():
    import logging
    import threading

    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class KeepAlive(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    application, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()

    def one_at_a_time(environ, start_response):
        # moto looks whether a name is free and then takes it; S3 does both at once
        with turn:
            return list(application(environ, start_response))

    address, port = (sys.argv[1], int(sys.argv[2])) if sys.argv[1:] else ("127.0.0.1", 0)
    server = make_server(address, port, one_at_a_time, threaded=True, request_handler=KeepAlive)
    print(server.server_port, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve()
