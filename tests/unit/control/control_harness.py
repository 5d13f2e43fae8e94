"""A whole server on a real socket, whose workers are real processes without a model."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

WORKER = Path(__file__).parents[1] / "launch" / "worker_app.py"

# The real composition root, with another command behind the launcher: everything but the models is the real thing.
SERVER = """
import functools, json, sys
from pathlib import Path
from firebox.cli import up
from firebox.launch.local import LocalLauncher
from firebox.launch.machine import Device, Machine
if sys.argv[3:]:
    cores, *devices = json.loads(sys.argv[3])
    machine = Machine(cores, tuple(Device(*device) for device in devices))
    Machine.here = staticmethod(lambda memory: machine)
up.LocalLauncher = functools.partial(LocalLauncher, command=[sys.executable, sys.argv[2]], orphan_grace_s=30.0)
up.run(Path(sys.argv[1]), "127.0.0.1", 0, [])
"""


def wait_for(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@dataclass
class Server:
    """One data directory and the process that serves it, if it runs.

    `machine` is what it believes to run on: its cores, then the kind, bytes and ordinal of each device.
    """

    data: Path
    machine: list[Any] | None = None
    process: subprocess.Popen[bytes] | None = None
    url: str = ""

    def start(self) -> None:
        (self.data / "server.json").unlink(missing_ok=True)
        machine = [json.dumps(self.machine)] if self.machine else []
        with (self.data.parent / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, str(self.data), str(WORKER), *machine], stdout=log, stderr=log
            )
        deadline = time.monotonic() + 30
        while not (self.data / "server.json").exists():
            assert self.process.poll() is None, (self.data.parent / "up.log").read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.05)
        self.url = json.loads((self.data / "server.json").read_text())["url"]

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait(20)
            self.process = None

    @property
    def key(self) -> str:
        return (self.data / "api_key").read_text().strip()

    def workers(self) -> list[int]:
        return [json.loads(path.read_text())["pid"] for path in sorted((self.data / "run").glob("*.pid"))]

    def ask(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        headers = {"X-Api-Key": self.key, **kwargs.pop("headers", {})}
        return httpx.request(method, self.url + path, headers=headers, timeout=70, **kwargs)

    def own(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        return self.ask(method, f"/v1/accounts/local/{path}", **kwargs)

    def add_model(self, name: str, source: Path) -> httpx.Response:
        from firebox.control.services.model_dir import stage

        staged = stage(source, self.data / "staging")
        return self.own("POST", "models", json={"modelId": name, "stagedDir": staged})

    def create_job(
        self, ident: str, shape: str = "tiny-cpu", fields: dict[str, Any] | None = None, **config: Any
    ) -> httpx.Response:
        """`fields` are laid over the body, `config` over its trainingConfig."""
        body = {"trainingConfig": {"baseModel": "accounts/local/models/tiny", **config}, **(fields or {})}
        params = {"rlorTrainerJobId": ident}
        if shape:
            params["trainingShape"] = f"accounts/local/trainingShapes/{shape}"
        return self.own("POST", "rlorTrainerJobs", params=params, json=body)

    def state(self, job: str) -> str:
        return str(self.own("GET", f"rlorTrainerJobs/{job}").json()["state"])

    def trainer(self, job: str) -> dict[str, Any]:
        """What the worker of a job sees of a request, and of its surroundings."""
        return dict(self.ask("GET", f"/training/v1/rlorTrainerJobs/local/{job}/api/v1/echo").json())

    def create_deployment(self, ident: str, **fields: Any) -> httpx.Response:
        body = {"baseModel": "accounts/local/models/tiny", "enableHotLoad": True, **fields}
        return self.own("POST", "deployments", params={"deploymentId": ident}, json=body)


SERVED = "FIREBOX_SERVED"
"""In the environment of everything that a forked server starts: its data directory."""


def serve(data: Path, orphan_grace_s: float) -> None:
    """Be a server, as `SERVER` is, whose exports need no model either."""
    from firebox.cli import up
    from firebox.control.reconcile import checkpoints
    from firebox.launch.local import LocalLauncher

    os.environ[SERVED] = str(data)
    command = [sys.executable, str(WORKER)]
    up.LocalLauncher = functools.partial(LocalLauncher, command=command, orphan_grace_s=orphan_grace_s)  # type: ignore[misc]
    checkpoints.run_child = functools.partial(checkpoints.run_child, command=command)
    with (data.parent / "up.log").open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    up.run(data, "127.0.0.1", 0, [])


class ForkedServer(Server):
    """A server that starts in a tenth of the time: its process is forked from one that has imported everything."""

    orphan_grace_s = 1.0

    def start(self) -> None:
        forks = multiprocessing.get_context("forkserver")
        forks.set_forkserver_preload(["firebox.cli.up", "firebox.launch.local"])
        (self.data / "server.json").unlink(missing_ok=True)
        self.fork = forks.Process(target=serve, args=(self.data, self.orphan_grace_s))
        self.fork.start()
        deadline = time.monotonic() + 30
        while not (self.data / "server.json").exists():
            assert self.fork.is_alive(), (self.data.parent / "up.log").read_text()
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.005)
        self.url = json.loads((self.data / "server.json").read_text())["url"]

    def stop(self, number: int = signal.SIGTERM) -> None:
        if self.fork.is_alive():
            assert self.fork.pid is not None
            os.kill(self.fork.pid, number)
        self.fork.join(20)
        assert not self.fork.is_alive()
