"""The web server of `nightshift serve`, for this machine alone.

Every request must name the server's own address as its Host and, if it has one, as its Origin: so no page of another
site can read the output, not even with a name of its own for 127.0.0.1 (DNS rebinding). Addresses are those of a list,
and a request has no paths, only numbers and texts. The page loads nothing from elsewhere (Content-Security-Policy).
"""

import json
import select
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any, ClassVar
from urllib.parse import parse_qsl, urlsplit

from pipeline.errors import SettingRefused, first_line
from pipeline.explore.serve.parameters import Parameters, RequestRefused
from pipeline.explore.serve.site import JSON, Site

ADDRESS = "127.0.0.1"
DEFAULT_PORT = 8421
MAX_JSON_BYTES = 64 << 10
MAX_UPLOAD_BYTES = 32 << 20
MAX_DISCARDED_BYTES = 1 << 30
TIMEOUT_SECONDS = 60
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
API = "/api/"
GET = {"summary", *JSON} - {"some"}
POST = {"some", "pictures"}
SEARCH = "search"
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def make_server(site: Site, port: int, on_fault: Callable[[str], None]) -> "Server":
    """A server on a port of 127.0.0.1, 0 for any free one. Raises SettingRefused if the port cannot be used.

    on_fault: called with one line for an error that the program does not expect.
    """
    try:
        return Server(site, port, on_fault)
    except (OSError, OverflowError) as error:
        raise SettingRefused(
            f"--port {port} cannot be used ({getattr(error, 'strerror', None) or error}): give another one, or 0 for "
            "any free one"
        ) from error


class Server(ThreadingHTTPServer):
    """Serves one site. Each connection has a thread."""

    daemon_threads = True

    def __init__(self, site: Site, port: int, on_fault: Callable[[str], None]) -> None:
        self.site = site
        self.on_fault = on_fault
        super().__init__((ADDRESS, port), Handler)

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names that a request may give this server."""
        return tuple(f"{name}:{self.server_port}" for name in (ADDRESS, "localhost"))

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that the browser closes."""


class Handler(BaseHTTPRequestHandler):
    """Answers one connection."""

    protocol_version = "HTTP/1.1"
    server_version = "nightshift"
    sys_version = ""
    timeout = TIMEOUT_SECONDS
    server: Server
    files: ClassVar[dict[str, bytes]] = {}

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Requests are not logged."""

    def _answer(self, work: Callable[[], tuple[str, bytes]]) -> None:
        """Send what a function returns, or the sentence of its refusal."""
        status = 200
        try:
            self._check_sender()
            kind, body = work()
        except RequestRefused as refusal:
            status, kind, body = refusal.status, "application/json", _json({"error": refusal.message})
            self.close_connection = True  # the body may not have been read
        except (ConnectionError, TimeoutError):
            self.close_connection = True
            return
        except Exception as error:  # of a request, which must not end the server
            self.server.on_fault(f"{urlsplit(self.path).path}: {first_line(error)}")
            status, kind, body = 500, "application/json", _json({"error": f"This failed: {first_line(error)}"})
            self.close_connection = True
        self._send(status, kind, body)

    def _check_sender(self) -> None:
        """Raise RequestRefused (403) for a request that another site may have caused."""
        if not self.path.startswith("/"):  # an address of another server, as for a proxy
            raise RequestRefused(403, f"This server answers only to the address {self.server.url}")
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            raise RequestRefused(403, f"This server answers only to the address {self.server.url}")
        origins = self.headers.get_all("Origin", [])
        if any(origin not in [f"http://{host}" for host in self.server.hosts] for origin in origins):
            raise RequestRefused(403, "A page of another site may not ask this server.")
        is_api = self.path.startswith(API)
        if is_api and self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise RequestRefused(403, "A page of another site may not ask this server.")

    def _get(self) -> tuple[str, bytes]:
        address = urlsplit(self.path)
        if address.path in FILES and not address.query:
            return FILES[address.path][1], self._file(FILES[address.path][0])
        name = self._name(address.path, GET)
        values = dict(parse_qsl(address.query, keep_blank_values=True))
        return "application/json", _json(self.server.site.answer(name, Parameters(values)))

    def _post(self) -> tuple[str, bytes]:
        address = urlsplit(self.path)
        name = self._name(address.path, {*POST, SEARCH})
        if name == SEARCH:
            picture = self._body("application/octet-stream", MAX_UPLOAD_BYTES)
            values = dict(parse_qsl(address.query, keep_blank_values=True))
            if not picture:
                raise RequestRefused(422, "The file is empty: choose a picture.")
            return "application/json", _json(self.server.site.search(Parameters(values), picture))
        try:
            content = json.loads(self._body("application/json", MAX_JSON_BYTES))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise RequestRefused(400, "The body must be a JSON object.")
        return "application/json", _json(self.server.site.answer(name, Parameters(content), self._is_connected))

    def _name(self, path: str, known: set[str]) -> str:
        """The name of an address of data. Raises RequestRefused: 405 for a wrong method, 403 if unknown."""
        name = path.removeprefix(API) if path.startswith(API) else ""
        if name in known:
            return name
        if name in {*GET, *POST, SEARCH} or (path in FILES and self.command != "GET"):
            raise RequestRefused(405, f"{self.command} is not for this address.")
        raise RequestRefused(403, "This server has no such address, and serves no files.")

    def _body(self, kind: str, max_bytes: int) -> bytes:
        """The body of the request. Its type makes browsers ask first if another site sends it."""
        if self.headers.get("Content-Type", "").partition(";")[0].strip().lower() != kind:
            raise RequestRefused(415, f"The body must be of type {kind}.")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()) or "Transfer-Encoding" in self.headers:
            raise RequestRefused(411, "The request must state the length of its body.")
        if int(length) > max_bytes:
            self._discard(int(length))
            limit = f"{max_bytes >> 20} MB" if max_bytes >= 1 << 20 else f"{max_bytes >> 10} kB"
            raise RequestRefused(413, f"The file has {int(length) / (1 << 20):.1f} MB: at most {limit} are accepted.")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the body ends early")
        return body

    def _discard(self, length: int) -> None:
        """Read a body that is too large, so that the browser reads the answer and does not see a lost connection."""
        left = min(length, MAX_DISCARDED_BYTES)
        while left > 0 and (piece := self.rfile.read(min(left, 1 << 20))):
            left -= len(piece)

    def _is_connected(self) -> bool:
        """False if the browser has given up this request, because the user scrolled on."""
        readable, _, _ = select.select([self.connection], [], [], 0)
        try:
            return not readable or bool(self.connection.recv(1, socket.MSG_PEEK))
        except OSError:
            return False

    def _file(self, name: str) -> bytes:
        with _reading:
            if name not in self.files:
                self.files[name] = resources.files(__package__).joinpath(name).read_bytes()
        return self.files[name]

    def _send(self, status: int, kind: str, body: bytes) -> None:
        try:
            self.send_response(status)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **HEADERS}.items():
                self.send_header(name, value)
            if self.close_connection:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)
        except (ConnectionError, TimeoutError):
            self.close_connection = True


_reading = threading.Lock()


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
