"""An S3-speaking server on loopback, for tests: moto's, over real HTTP."""

import logging
import os
import threading
import urllib.request
from contextlib import contextmanager

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

KEYS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


class _KeepAlive(WSGIRequestHandler):
    protocol_version = "HTTP/1.1"


class S3Server:
    """Listens at `port` from the start; all such servers share their buckets."""

    def __init__(self):
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        application = DomainDispatcherApplication(create_backend_app)
        turn = self._turn = threading.Lock()

        def one_at_a_time(environ, start_response):
            # moto looks whether a name is free and then takes it; S3 does both at once
            with turn:
                return list(application(environ, start_response))

        self._server = make_server(
            "127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=_KeepAlive
        )
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def put(self, path, data=b""):
        """PUT /path, which makes a bucket, an object or a bucket's policy."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/{path}",
            data=data,
            headers={"Content-Type": "application/octet-stream"},
            method="PUT",
        )
        urllib.request.urlopen(request, timeout=10).close()

    def held(self):
        """A context in which it takes connections and does not answer."""
        return self._turn

    def close(self):
        self._server.shutdown()
        self._server.server_close()


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
