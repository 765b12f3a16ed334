"""A small web server on loopback for tests: files from memory, redirects, and what was asked with which headers."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Web:
    """Stands at ``url`` for the length of a ``with`` block.

    Args:
        files: path -> content.
        moved: path -> where it is redirected to.

    Attributes:
        asked: (path with query, headers) of all requests, in order.
    """

    def __init__(self, files: Mapping[str, bytes] | None = None, moved: Mapping[str, str] | None = None) -> None:
        self.files, self.moved = dict(files or {}), dict(moved or {})
        self.asked: list[tuple[str, Message]] = []

    def __enter__(self) -> Web:
        web = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                web.asked.append((self.path, self.headers))
                path = self.path.partition("?")[0]
                if path in web.moved:
                    self.send_response(302)
                    self.send_header("Location", web.moved[path])
                    self.end_headers()
                    return
                data = web.files.get(path)
                self.send_response(404 if data is None else 200)
                self.send_header("Content-Length", str(len(data or b"")))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data or b"")

            do_HEAD = do_GET

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
