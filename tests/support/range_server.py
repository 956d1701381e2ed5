"""A web server, or a bucket of S3, whose answers to requests of a range have faults."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Fault = Literal["", "forbidden", "no ranges", "cut", "status 200", "wrong range"]


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` at every path. fault: what happens to requests of a range. whole: responses with all bytes."""

    protocol_version = "HTTP/1.1"
    content: bytes
    fault: Fault
    whole: int

    def do_HEAD(self) -> None:
        self._send(200, len(self.content))

    def do_GET(self) -> None:
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not wanted or self.fault == "no ranges":
            type(self).whole += 1
            self._send(200, len(self.content))
            self.wfile.write(self.content)
            return
        start, stop = int(wanted[1]), min(int(wanted[2]) + 1, len(self.content))
        if self.fault == "forbidden":
            self._send(403, 0)
            return
        moved = self.fault == "wrong range"
        status = 200 if moved or self.fault == "status 200" else 206
        self._send(status, stop - start, f"bytes {start + moved}-{stop - 1 + moved}/{len(self.content)}")
        self.wfile.write(self.content[start : (start + stop) // 2 if self.fault == "cut" else stop])
        self.close_connection = self.fault == "cut"

    def _send(self, status: int, size_bytes: int, content_range: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(size_bytes))
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", "Mon, 02 Jan 2006 15:04:05 GMT")
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(content: bytes) -> Iterator[tuple[str, type[Server]]]:
    """Yields the address and the class whose fields may be changed."""
    kind = type("Serving", (Server,), {"content": content, "fault": "", "whole": 0})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", kind
        server.shutdown()
