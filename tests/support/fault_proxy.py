"""An HTTP proxy in front of an S3 server that injects the faults of networks and busy stores.

Rules say which requests fail and how; they may change at any time, and random choices are seeded. All other requests
are forwarded unchanged. Signatures are forwarded and not checked.
"""

import http.client
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal[
    "slow_down",  # 503, "please reduce your request rate"
    "internal_error",  # 500
    "expired_token",  # 400, as from S3
    "invalid_key",  # 403
    "access_denied",  # 403, of one object
    "no_bucket",  # 404
    "conflict",  # 409, two concurrent conditional puts
    "reset",  # the connection is reset before the server receives the request
    "lost_response",  # the server executes the request, then the connection is reset before the response
    "reset_in_body",  # header and half of the body, then the connection is reset
    "cut",  # header and half of the body, then the connection is closed
    "stall",  # nothing for `seconds`, then the response
    "stall_in_body",  # header and half of the body, then nothing for `seconds`
]

RESPONSES: dict[str, tuple[int, str, str]] = {
    "slow_down": (503, "SlowDown", "Please reduce your request rate."),
    "internal_error": (500, "InternalError", "We encountered an internal error. Please try again."),
    "expired_token": (400, "ExpiredToken", "The provided token has expired."),
    "invalid_key": (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
    "access_denied": (403, "AccessDenied", "Access Denied"),
    "no_bucket": (404, "NoSuchBucket", "The specified bucket does not exist"),
    "conflict": (409, "ConditionalRequestConflict", "A conflicting operation occurred."),
}
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "content-length", "server", "date"}


@dataclass(frozen=True)
class Rule:
    """Inject `kind` into a share of the matching requests, at most `count` times, and not into the first `after` ones.

    method, target: regular expressions to search for. access_key: only requests that are signed with this key.
    seconds: duration of a stall.
    """

    kind: Kind
    share: float = 1.0
    method: str = ""
    target: str = ""
    access_key: str = ""
    after: int = 0
    count: int | None = None
    seconds: float = 30.0

    def matches(self, method: str, target: str, authorization: str) -> bool:
        return bool(
            re.search(self.method, method)
            and re.search(self.target, target)
            and (not self.access_key or f"Credential={self.access_key}/" in authorization)
        )


class FaultProxy(ThreadingHTTPServer):
    """Use `endpoint` instead of the server's. `requests`: all requests so far. `injected`: faults by kind."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 256

    def __init__(self, upstream: str, seed: int = 0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.requests: list[tuple[str, str]] = []
        self.injected: Counter[Kind] = Counter()
        self.ending = threading.Event()
        self._rules: tuple[Rule, ...] = ()
        self._matched: Counter[Rule] = Counter()
        self._applied: Counter[Rule] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def set(self, *rules: Rule) -> None:
        """Replace the rules. Without rules no fault is injected."""
        with self._lock:
            self._rules = rules
            self._matched.clear()
            self._applied.clear()

    def choose(self, method: str, target: str, authorization: str) -> Rule | None:
        with self._lock:
            self.requests.append((method, target))
            for rule in self._rules:
                if not rule.matches(method, target, authorization):
                    continue
                self._matched[rule] += 1
                if self._matched[rule] <= rule.after or self._applied[rule] == rule.count:
                    continue
                if self._random.random() < rule.share:
                    self._applied[rule] += 1
                    self.injected[rule.kind] += 1
                    return rule
        return None

    def seen(self, method: str, target: str) -> int:
        """Number of requests so far that match the two regular expressions."""
        with self._lock:
            return sum(bool(re.search(method, m) and re.search(target, t)) for m, t in self.requests)

    def shutdown_request(self, request: "socket.socket | tuple[bytes, socket.socket]") -> None:
        self.close_request(request)  # without shutdown(), which would send a FIN before the reset

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: clients that disconnect early are expected."""


@contextmanager
def fault_proxy(upstream: str, seed: int = 0) -> Iterator[FaultProxy]:
    proxy = FaultProxy(upstream, seed)
    threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        yield proxy
    finally:
        proxy.ending.set()
        proxy.shutdown()
        proxy.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: FaultProxy

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        rule = self.server.choose(self.command, self.path, self.headers.get("Authorization", ""))
        if rule is None:
            self._respond(*self._forward(body))
        elif rule.kind in RESPONSES:
            self._refuse(*RESPONSES[rule.kind])
        elif rule.kind == "reset":
            self._reset()
        elif rule.kind == "lost_response":
            self._forward(body)
            self._reset()
        elif rule.kind == "stall":
            self.server.ending.wait(rule.seconds)
            self._respond(*self._forward(body))
        else:
            self._break_off(rule, *self._forward(body))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815  the names are those of http.server

    def _forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def _respond(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self._send_header(status, headers, body)
        self.wfile.write(body)

    def _send_header(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self.send_response(status)
        length = str(len(body))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in HOP_HEADERS:
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()

    def _refuse(self, status: int, code: str, message: str) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{message}</Message></Error>'
        body = b"" if self.command == "HEAD" else text.encode()
        self._respond(status, [("Content-Type", "application/xml")], body)

    def _break_off(self, rule: Rule, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self._send_header(status, headers, body)
        self.wfile.write(body[: len(body) // 2])
        if rule.kind == "stall_in_body":
            self.server.ending.wait(rule.seconds)
        if rule.kind == "reset_in_body":
            time.sleep(0.02)  # else the reset arrives before the first half
            self._reset()
        self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
