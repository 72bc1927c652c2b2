"""report.html of a run that is on its way, served to browsers of this machine alone; every two seconds it asks what is new."""

import hashlib
import threading
from collections.abc import Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from grpo_jax.report.html_page import data, page
from grpo_jax.report.run_story import FILES, read_run

ADDRESS = "127.0.0.1"
LOCAL = (
    ADDRESS,
    "localhost",
)  # names by which a browser may ask: a name of another site may lead here too, and is refused
HEADERS = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


class Source:
    """Runs whose stories are read anew when a file of theirs has changed.

    Raises:
      ValueError, OSError: one of them is no run, or cannot be read.
    """

    def __init__(self, folders: Sequence[Path]):
        self._folders, self._lock = folders, threading.Lock()
        self._version, self._stories = "", list[dict[str, Any]]()
        self.now()

    def now(self) -> tuple[str, list[dict[str, Any]]]:
        """A name of what the files hold now, and the stories of the runs."""
        with self._lock:
            version = self._stamp()
            if version != self._version:
                self._stories = [read_run(folder) for folder in self._folders]
                self._version = version  # of before it was read: what is written meanwhile makes another
            return self._version, self._stories

    def _stamp(self) -> str:
        seen = []
        for folder in self._folders:
            for name in FILES:
                path = folder / name
                about = path.stat() if path.exists() else None
                seen.append(about and (about.st_mtime_ns, about.st_size, about.st_ino))
        return hashlib.sha256(repr(seen).encode()).hexdigest()[:16]


def make_server(folders: Sequence[Path], port: int = 0) -> ThreadingHTTPServer:
    """A server of the page of one or two runs, at ``127.0.0.1``; port 0 takes a free one, which its ``server_port`` is.

    Raises:
      ValueError, OSError: see `Source`; the port is in use.
    """
    source = Source(folders)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._is_local():
                return self._answer(HTTPStatus.FORBIDDEN, "ask for 127.0.0.1 or localhost\n")
            asked = urlsplit(self.path)
            if asked.path not in ("/", "/data"):
                return self._answer(HTTPStatus.NOT_FOUND, "there is / alone\n")
            try:
                version, stories = source.now()
            except (ValueError, OSError) as error:  # a file that is damaged; the next request may find it whole
                return self._answer(HTTPStatus.SERVICE_UNAVAILABLE, f"{error}\n")
            if asked.path == "/":
                return self._answer(HTTPStatus.OK, page(stories, live=True), kind="text/html")
            if parse_qs(asked.query).get("version") == [version]:
                return self._answer(HTTPStatus.NO_CONTENT, "")
            return self._answer(HTTPStatus.OK, data(stories), version=version)

        def _is_local(self) -> bool:
            name, _, at = self.headers.get("Host", "").partition(":")
            return name in LOCAL and at in ("", str(self.server.server_port))  # type: ignore[attr-defined]

        def _answer(self, status: HTTPStatus, text: str, *, kind: str = "text/plain", version: str = "") -> None:
            content = text.encode()
            self.send_response(status)
            for name, value in HEADERS.items():
                self.send_header(name, value)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("X-Version", version)
            if status != HTTPStatus.NO_CONTENT:
                self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing: a page asks every two seconds."""

    server = ThreadingHTTPServer((ADDRESS, port), Handler)
    server.daemon_threads = True
    return server
