"""An HTTP proxy in front of an S3 server that does to requests what networks and busy stores do to them.

Which request meets which fault is set by rules, at any time; the dice are seeded. What no rule takes is passed on as
it is. Signatures are passed on, not checked.
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
    "expired_token",  # 400, as S3 answers it
    "invalid_key",  # 403
    "access_denied",  # 403, of one object
    "no_bucket",  # 404
    "conflict",  # 409, of a conditional put beside another
    "reset",  # the connection breaks before a byte of the answer; the server has not seen the request
    "lost_answer",  # the server has done what was asked, and the connection breaks before its answer
    "reset_in_body",  # header and half the body, then the connection breaks
    "cut",  # header and half the body, then an orderly end of the connection
    "stall",  # nothing at all for `seconds`, then the answer
    "stall_in_body",  # header and half the body, then nothing for `seconds`
]

ANSWERS: dict[str, tuple[int, str, str]] = {
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
    """`kind` happens to a share of the requests that fit, at most `count` times, and not to the first `after` of them.

    method, target: regular expressions, searched for. access_key: only requests signed with this key.
    """

    kind: Kind
    share: float = 1.0
    method: str = ""
    target: str = ""
    access_key: str = ""
    after: int = 0
    count: int | None = None
    seconds: float = 30.0

    def fits(self, method: str, target: str, authorization: str) -> bool:
        return bool(
            re.search(self.method, method)
            and re.search(self.target, target)
            and (not self.access_key or f"Credential={self.access_key}/" in authorization)
        )


class FaultProxy(ThreadingHTTPServer):
    """`endpoint` takes the place of the server's. `requests` and `injected` tell what came and what was done to it."""

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
        self._fitted: Counter[Rule] = Counter()
        self._taken: Counter[Rule] = Counter()
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    def set(self, *rules: Rule) -> None:
        """From the next request on these rules hold, and no others; without any, nothing goes wrong."""
        with self._lock:
            self._rules = rules
            self._fitted.clear()
            self._taken.clear()

    def choose(self, method: str, target: str, authorization: str) -> Rule | None:
        with self._lock:
            self.requests.append((method, target))
            for rule in self._rules:
                if not rule.fits(method, target, authorization):
                    continue
                self._fitted[rule] += 1
                if self._fitted[rule] <= rule.after or self._taken[rule] == rule.count:
                    continue
                if self._random.random() < rule.share:
                    self._taken[rule] += 1
                    self.injected[rule.kind] += 1
                    return rule
        return None

    def seen(self, method: str, target: str) -> int:
        """How many requests so far fit the two regular expressions."""
        with self._lock:
            return sum(bool(re.search(method, m) and re.search(target, t)) for m, t in self.requests)

    def shutdown_request(self, request: "socket.socket | tuple[bytes, socket.socket]") -> None:
        self.close_request(request)  # without the orderly goodbye that a reset must not have

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that went away in the middle are what this server is for."""


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
            self._answer(*self._ask(body))
        elif rule.kind in ANSWERS:
            self._refuse(*ANSWERS[rule.kind])
        elif rule.kind == "reset":
            self._reset()
        elif rule.kind == "lost_answer":
            self._ask(body)
            self._reset()
        elif rule.kind == "stall":
            self.server.ending.wait(rule.seconds)
            self._answer(*self._ask(body))
        else:
            self._break_off(rule, *self._ask(body))

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve  # noqa: N815  the names that http.server looks for

    def _ask(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
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

    def _answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
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
        self._answer(status, [("Content-Type", "application/xml")], body)

    def _break_off(self, rule: Rule, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
        self._send_header(status, headers, body)
        self.wfile.write(body[: len(body) // 2])
        if rule.kind == "stall_in_body":
            self.server.ending.wait(rule.seconds)
        if rule.kind == "reset_in_body":
            time.sleep(0.02)  # or the reset overtakes the half that was sent
            self._reset()
        self.close_connection = True

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass
