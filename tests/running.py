"""A server as users start it: a process of its own on a free port, with its own data directory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from firebox.launch.local import started_at

MODEL = "accounts/local/models/tiny"
START_WITHIN_S = 60


class RunningServer:
    """`firebox up` on one data directory; it can be stopped, killed and started again."""

    def __init__(self, data: Path, *options: str) -> None:
        self.data = data
        self.options = options
        self.log = data.parent / f"{data.name}.log"
        self.start()

    def start(self) -> None:
        (self.data / "server.json").unlink(missing_ok=True)
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command_line, stdout=log, stderr=log)
        deadline = time.monotonic() + START_WITHIN_S
        while not (self.data / "server.json").exists():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        self.url: str = json.loads((self.data / "server.json").read_text())["url"]
        self.key = (self.data / "api_key").read_text().strip()

    @property
    def command_line(self) -> list[str]:
        return [sys.executable, "-m", "firebox", "up", "--port", "0", "--data-dir", str(self.data), *self.options]

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(30)

    @property
    def env(self) -> dict[str, str]:
        return {"FIREWORKS_BASE_URL": self.url, "FIREWORKS_API_KEY": self.key, "FIREBOX_DATA_DIR": str(self.data)}

    def command(self, *arguments: str) -> str:
        """Run a `firebox` command against this server and return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "firebox", *arguments],
            env=os.environ | self.env, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"X-Api-Key": self.key} | options.pop("headers", {})
        return httpx.request(method, self.url + path, headers=headers, timeout=60, **options)

    def pid_of(self, resource: str) -> int:
        """The process that serves a job, found by the spec it was started with."""
        (spec,) = [path for path in (self.data / "run").glob("*.json") if f'"{resource}"' in path.read_text()]
        return int(json.loads(spec.with_suffix(".pid").read_text())["pid"])

    def workers(self) -> list[int]:
        """Processes of all live workers; a zombie is not alive."""
        found = [json.loads(path.read_text())["pid"] for path in (self.data / "run").glob("*.pid")]
        return [pid for pid in found if started_at(pid)]


@contextmanager
def running(folder: Path, *options: str) -> Iterator[RunningServer]:
    """A server with the model `tiny`, with `options`. At the end it is stopped, and must leave no worker behind."""
    server = RunningServer(folder / "data", *options)
    try:
        server.command("models", "make-tiny", "tiny")
        yield server
        workers = server.workers()
    finally:
        if server.process.poll() is None:
            server.end()
    assert not [pid for pid in workers if started_at(pid)], "SIGTERM left a worker behind"
