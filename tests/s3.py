# SPDX-License-Identifier: Apache-2.0
"""An S3 server of moto's on the loopback, in a process of its own, which a test may stop and start again.

What it holds is in its memory and goes with the process; `Door` stands in front of one that has to be away for a while.
"""
from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.rayhead import free_port

__all__ = ["ACCESS", "S3", "SECRET", "Door", "s3_server"]

START_S = 60.0
ACCESS, SECRET = "AKIAQGNNTESTACCESS00", "qgnn-test-secret-that-nobody-may-see"
BUCKET = "graphs"


class S3:
    """A server that answers at `url`, with the bucket `graphs`."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, method: str, path: str, data: bytes | None = None) -> bytes:
        """One request, as it is."""
        request = urllib.request.Request(f"{self.url}/{path}", data, {"Content-Type": "text/plain"}, method=method)
        with urllib.request.urlopen(request, timeout=20) as answer:
            return bytes(answer.read())

    def empty(self) -> None:
        """Forget all, and make the bucket."""
        self.ask("POST", "moto-api/reset", b"")
        self.ask("PUT", BUCKET)

    @contextmanager
    def credentials_are_looked_at(self) -> Iterator[None]:
        """Requests of the block are refused: the server knows no users, and asks for one."""
        self.ask("POST", "moto-api/reset-auth", b"0")
        try:
            yield
        finally:
            self.ask("POST", "moto-api/reset-auth", b"1e18")

    def use(self, monkeypatch: pytest.MonkeyPatch, url: str | None = None) -> None:
        """Have this process, and those that it starts, use the server, or what stands at `url` in front of it."""
        for name, value in {"AWS_ENDPOINT_URL": url or self.url, "AWS_ACCESS_KEY_ID": ACCESS,
                            "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_EC2_METADATA_DISABLED": "true",
                            "AWS_REGION": "us-east-1"}.items():
            monkeypatch.setenv(name, value)
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
            monkeypatch.delenv(name, raising=False)


@contextmanager
def s3_server() -> Iterator[S3]:
    """A server, ended with the block."""
    port = free_port()
    process = subprocess.Popen([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "INITIAL_NO_AUTH_ACTION_COUNT": "1e18"})
    server, until = S3(f"http://127.0.0.1:{port}"), time.monotonic() + START_S
    try:
        while True:
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                server.ask("GET", "moto-api/data.json")
                break
            assert process.poll() is None, "moto's server has ended; is moto[s3] installed (make setup)?"
            assert time.monotonic() < until, f"no S3 server within {START_S:g} s"
            time.sleep(0.1)
        yield server
    finally:
        process.kill()
        process.wait(10)


class Door:
    """Passes connections on to a server; while it is shut nobody listens at its port, and those that were open end.

    Attributes: bytes_in: that came from clients so far.
    """

    def __init__(self, server: S3) -> None:
        self._target = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        self._port, self._open = free_port(), list[socket.socket]()
        self._listener: socket.socket | None = None
        self.bytes_in = 0

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Door:
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.shut()

    def open(self) -> None:
        """Listen again."""
        self._listener = socket.create_server(("127.0.0.1", self._port), reuse_port=False)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def away(self, seconds: float, after_bytes: int = 0) -> threading.Thread:
        """In the background: once so many more bytes came in, be shut for so long."""
        wanted = self.bytes_in + after_bytes

        def work() -> None:
            until = time.monotonic() + 60
            while self.bytes_in < wanted and time.monotonic() < until:
                time.sleep(0.005)
            self.shut()
            time.sleep(seconds)
            self.open()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        return thread

    def shut(self) -> None:
        """Nobody comes through any more."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for one in self._open:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._open.clear()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                there = socket.create_connection(self._target)
                self._open += [client, there]
                threading.Thread(target=self._pass, args=(client, there, True), daemon=True).start()
                threading.Thread(target=self._pass, args=(there, client, False), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, inward: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.bytes_in += len(data) * inward
                target.sendall(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
