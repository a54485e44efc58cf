"""A TCP link on loopback that can be cut and mended, for tests of whatever talks over it."""

import socket
import threading


class BadLink:
    """Forwards 127.0.0.1:`port` to another port of loopback.

    `cuts` holds numbers of bytes: after that many from the far side the connection is cut, once
    for each number. `passed` counts what came from the far side, `connections` who called.
    """

    def __init__(self, far_port):
        self.cuts, self.passed, self.connections = [], 0, 0
        self._far_port, self._open, self._lock = far_port, set(), threading.Lock()
        self.port = 0
        self.mend()

    def mend(self):
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self):
        """Refuses connections and ends those that there are."""
        for each in (self._listener, *self._open):
            _hang_up(each)

    close = cut

    def _accept(self, listener):
        while True:
            try:
                near, _ = listener.accept()
                far = socket.create_connection(("127.0.0.1", self._far_port))
            except OSError:
                return
            self._open |= {near, far}
            self.connections += 1
            for ends in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pump, args=ends, daemon=True).start()

    def _pump(self, source, sink, is_answer):
        try:
            while data := source.recv(65536):
                if is_answer and self._is_cut(len(data)):
                    sink.sendall(data[: self.cuts.pop(0)])
                    break
                sink.sendall(data)
        except OSError:
            pass
        for each in (source, sink):
            _hang_up(each)
            self._open.discard(each)

    def _is_cut(self, nbytes):
        with self._lock:
            self.passed += nbytes
            if self.cuts and self.cuts[0] >= nbytes:
                self.cuts[0] -= nbytes
                return False
            return bool(self.cuts)


def _hang_up(connection):
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    connection.close()
