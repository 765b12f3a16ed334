"""A small HTTP proxy for tests that fails, stalls and cuts answers short as it is told.

Serves as a reverse proxy in front of one server, and as a forward proxy for plain http.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["", "503", "403", "stall", "cut", "slow"]
Chooser = Callable[[int, str, str], Fault]
"""(number of the request from 1, method, path) -> what becomes of it."""

DENIED = b'<?xml version="1.0"?><Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>'
SLOW = b'<?xml version="1.0"?><Error><Code>SlowDown</Code><Message>Please reduce your request rate</Message></Error>'


class FaultyProxy:
    """Stands at ``url`` for the length of a ``with`` block.

    Attributes:
        requests: (method, path) of all that came.
        faults: how many were failed on purpose.
        most: most requests that were under way at once.
    """

    def __init__(
        self,
        target: str,
        choose: Chooser = lambda n, method, path: "",
        stall: float = 3.0,
        by_headers: Callable[[int, Message], Fault] | None = None,
    ) -> None:
        self.target, self.choose, self.stall, self.by_headers = urlsplit(target), choose, stall, by_headers
        self.requests: list[tuple[str, str]] = []
        self.faults = self.most = self._now = 0
        self._lock = threading.Lock()

    def __enter__(self) -> FaultyProxy:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(proxy) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args: object) -> None:
                pass

            def handle_any(self) -> None:
                url = urlsplit(self.path)
                path = url.path + (f"?{url.query}" if url.query else "")
                with proxy._lock:
                    proxy.requests.append((self.command, path))
                    number = len(proxy.requests)
                    proxy._now += 1
                    proxy.most = max(proxy.most, proxy._now)
                try:
                    fault = proxy.choose(number, self.command, path)
                    if proxy.by_headers is not None:
                        fault = proxy.by_headers(number, self.headers)
                    self.answer(path, fault)
                except OSError:
                    self.close_connection = True  # the client has gone
                finally:
                    with proxy._lock:
                        proxy._now -= 1

            def answer(self, path: str, fault: Fault) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if fault == "slow":  # a right answer, late
                    time.sleep(proxy.stall)
                elif fault:
                    with proxy._lock:
                        proxy.faults += 1
                if fault in ("503", "403"):
                    self.reply(int(fault), {"Content-Type": "application/xml"}, SLOW if fault == "503" else DENIED)
                    return
                if fault == "stall":
                    time.sleep(proxy.stall)
                    self.close_connection = True
                    return
                upstream = http.client.HTTPConnection(proxy.target.hostname or "", proxy.target.port, timeout=30)
                try:
                    upstream.request(self.command, path, body or None, dict(self.headers))
                    response = upstream.getresponse()
                    data = response.read()
                finally:
                    upstream.close()
                skipped = ("transfer-encoding", "connection", "content-length")
                headers = {k: v for k, v in response.getheaders() if k.lower() not in skipped}
                length = response.getheader("Content-Length")
                if fault == "cut":
                    self.reply(response.status, headers, data[: len(data) // 2], length or str(len(data)))
                    self.close_connection = True
                else:
                    self.reply(response.status, headers, data, length)

            def reply(self, status: int, headers: dict[str, str], data: bytes, length: str | None = None) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

        return Handler
