"""A TCP link between a client and a server that can be cut, frozen and restored."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit


class Link:
    """Forwards connections to a server. Use `address` instead of the server's."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        self._server = (parts.hostname, parts.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: set[socket.socket] = set()
        self._is_cut = False
        self._flows = threading.Event()
        self._flows.set()
        self.address = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """Close every connection, and each new one immediately."""
        self._is_cut = True
        for end in list(self._sockets):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def freeze(self) -> None:
        """Keep connections open and forward nothing, as if a cable were unplugged."""
        self._flows.clear()

    def restore(self) -> None:
        """Let new connections work. Frozen connections are closed."""
        if not self._flows.is_set():
            self.cut()
        self._is_cut = False
        self._flows.set()

    def serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # the listener was closed
                return
            if self._is_cut:
                client.close()
                continue
            server = socket.create_connection(self._server)
            for source, target in ((client, server), (server, client)):
                self._sockets.add(source)
                threading.Thread(target=self._forward, args=(source, target), daemon=True).start()

    def _forward(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._flows.wait()
                target.sendall(data)
        self._sockets.discard(source)
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        self._flows.set()


@contextlib.contextmanager
def link(server: str) -> Iterator[Link]:
    created = Link(server)
    threading.Thread(target=created.serve, daemon=True).start()
    try:
        yield created
    finally:
        created.close()
