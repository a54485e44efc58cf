"""An HTTP server that says what it is told to, true or not, byte for byte."""

import socket
import threading
from contextlib import contextmanager
from itertools import groupby


@contextmanager
def scripted(*answers):
    """A URL whose n-th request gets the n-th answer, a list of bytes; the last one for ever after.

    An answer that ends in None is followed by silence, any other by a hang-up; a function in it is
    called.
    """
    left, listener = list(answers), socket.create_server(("127.0.0.1", 0))

    def talk(connection):
        while b"\r\n\r\n" in connection.recv(65536):
            answer = left.pop(0) if len(left) > 1 else left[0]
            for is_call, pieces in groupby(answer, callable):
                if is_call:
                    next(pieces)()
                else:
                    connection.sendall(b"".join(filter(None, pieces)))
            if answer[-1] is not None:
                break
        connection.shutdown(socket.SHUT_RDWR)
        connection.close()

    def talk_while_heard(connection):
        try:
            talk(connection)
        except OSError:
            pass  # the reader hung up first

    def loop():
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=talk_while_heard, args=(connection,), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def head(status, *headers):
    """The first lines of an answer."""
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode()
