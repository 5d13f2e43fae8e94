"""Start, hold and end of the server as a process, and the command line beside it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from control_harness import Server  # type: ignore[import-not-found]

from firebox.launch.local import started_at


def firebox(*arguments: str, data: Path, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FIREWORKS_")} | env
    command = [sys.executable, "-m", "firebox", *arguments, "--data-dir", str(data)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean, check=False)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_server_ends_cleanly(new_server: Callable[[], Server], model_files: Path, number: int) -> None:
    server = new_server()
    server.add_model("tiny", model_files)
    server.create_job("job")
    workers = server.workers()
    begun = time.monotonic()
    server.stop(number)
    assert time.monotonic() - begun < 8
    assert not [pid for pid in workers if started_at(pid)]
    assert not (server.data / "server.json").exists()
    assert "Traceback" not in (server.data.parent / "up.log").read_text()


def test_first_start_makes_a_private_directory_and_shows_the_key_once(new_server: Callable[[], Server]) -> None:
    server = new_server()
    log = server.data.parent / "up.log"
    assert log.read_text().count(server.key) == 1
    assert f"export FIREWORKS_BASE_URL={server.url}" in log.read_text()
    for path, mode in ((server.data, 0o700), (server.data / "run", 0o700), (server.data / "api_key", 0o600)):
        assert path.stat().st_mode & 0o777 == mode, path
    assert server.key.encode() not in (server.data / "firebox.db").read_bytes()
    key = server.key
    server.stop()
    server.start()
    assert (server.key, log.read_text().count(key)) == (key, 1)
    assert server.ask("GET", "/v1/accounts?pageSize=2").json()["accounts"] == [
        {"name": "accounts/local", "state": "READY"}
    ]
    for alias in (f"tml-{key}", key):
        assert server.ask("GET", "/v1/accounts", headers={"X-Api-Key": alias}).status_code == 200
    assert server.ask("GET", "/v1/accounts", headers={"X-Api-Key": f"{key}x"}).status_code == 401
    with sqlite3.connect(server.data / "firebox.db") as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_second_server_and_taken_port_are_refused(new_server: Callable[[], Server], tmp_path: Path) -> None:
    server = new_server()
    second = firebox("up", "--port", "0", data=server.data)
    assert second.returncode == 1
    assert "another Firebox server" in second.stderr
    taken = firebox("up", "--port", server.url.rsplit(":", 1)[1], data=tmp_path / "other")
    assert taken.returncode == 1
    assert "choose another port" in taken.stderr


def test_resource_in_transition_is_held_unless_the_caller_will_not_wait(server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        creating = pool.submit(server.create_job, "slow")
        deadline = time.monotonic() + 5
        while server.own("GET", "rlorTrainerJobs/slow", headers={"Prefer": "wait=0"}).status_code == 404:
            assert time.monotonic() < deadline
        begun = time.monotonic()
        seen = server.own("GET", "rlorTrainerJobs/slow", headers={"Prefer": "wait=0"}).json()
        assert seen["state"] == "JOB_STATE_CREATING"
        assert time.monotonic() - begun < 0.5
        refused = server.ask("POST", "/training/v1/rlorTrainerJobs/local/slow/api/v1/forward", json={})
        assert refused.status_code == 503
        assert server.own("GET", "rlorTrainerJobs/slow").json()["state"] == "JOB_STATE_RUNNING"
        assert creating.result().json()["state"] == "JOB_STATE_RUNNING"


def test_job_can_be_deleted_while_it_starts(server: Server) -> None:
    with ThreadPoolExecutor() as pool:
        creating = pool.submit(server.create_job, "slow-2")
        deadline = time.monotonic() + 5
        while server.own("DELETE", "rlorTrainerJobs/slow-2").status_code == 404:
            assert time.monotonic() < deadline
        assert server.own("GET", "rlorTrainerJobs/slow-2").json()["state"] == "JOB_STATE_DELETED"
        assert creating.result().json()["state"] == "JOB_STATE_DELETED"


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", "/v1/accounts/local/rlorTrainerJobs", b"{", 400),
        ("POST", "/v1/accounts/local/rlorTrainerJobs", b"[]", 400),
        ("POST", "/v1/accounts/local/rlorTrainerJobs", b"\xff\xfe", 400),
        ("POST", "/hot_load/v1/models/hot_load", b'{"identity": 5}', 400),
        ("POST", "/hot_load/v1/models/hot_load", b'{"identity": "a"}', 400),
        ("GET", "/v1/accounts/local/models?pageSize=many", b"", 400),
        ("GET", "/v1/nothing", b"", 404),
        ("PUT", "/v1/accounts", b"", 405),
    ],
)
def test_malformed_request_is_answered(server: Server, method: str, path: str, content: bytes, status: int) -> None:
    answer = server.ask(method, path, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert answer.json()["error"]["message"]


def test_commands_show_what_the_server_has(server: Server) -> None:
    server.create_job("shown")
    listed = json.loads(firebox("jobs", "--json", data=server.data).stdout)
    assert "accounts/local/rlorTrainerJobs/shown" in [job["name"] for job in listed]
    shapes = firebox("shapes", data=server.data).stdout
    assert "tiny-cpu-lora " in shapes
    assert "accounts/local/trainingShapes/<shape>" in shapes
    assert json.loads(firebox("checkpoints", "shown", "--json", data=server.data).stdout) == []
    assert "worker is starting" in firebox("logs", "shown", data=server.data).stdout
    shown: list[dict[str, Any]] = json.loads(firebox("models", "list", "--json", data=server.data).stdout)
    assert [model["name"] for model in shown] == ["accounts/local/models/tiny"]
    wrong = firebox("status", data=server.data, FIREWORKS_BASE_URL=server.url, FIREWORKS_API_KEY="fb_wrong")
    assert wrong.returncode == 1
    assert "API key" in wrong.stderr
    server.own("DELETE", "rlorTrainerJobs/shown")


def test_model_is_not_staged_where_the_server_does_not_look(server: Server, tmp_path: Path) -> None:
    """The address decides which server is asked; files for it must land in that server's own directory."""
    address = {"FIREWORKS_BASE_URL": server.url, "FIREWORKS_API_KEY": server.key}
    refused = firebox("models", "make-tiny", "lost", data=tmp_path, **address)
    assert refused.returncode == 1
    assert "--data-dir" in refused.stderr
    assert not (tmp_path / "staging").exists()
    assert firebox("models", "list", data=tmp_path, **address).returncode == 0


def test_commands_without_a_server_say_what_to_do(tmp_path: Path) -> None:
    missing = firebox("status", data=tmp_path)
    assert missing.returncode == 1
    assert "firebox up" in missing.stderr
    silent = firebox("status", data=tmp_path, FIREWORKS_BASE_URL="http://127.0.0.1:1", FIREWORKS_API_KEY="x")
    assert "firebox up" in silent.stderr
    assert "Traceback" not in missing.stderr + silent.stderr


def test_answers_do_not_wait_for_acknowledgements(server: Server) -> None:
    """40 ms per call is what a socket without TCP_NODELAY costs; the fastest of many is free of other noise."""
    server.create_job("quick")
    path = "/training/v1/rlorTrainerJobs/local/quick/api/v1/healthz"
    spans = []
    with httpx.Client(base_url=server.url, headers={"X-Api-Key": server.key}) as client:
        for _ in range(30):
            begun = time.monotonic()
            assert client.get(path).status_code == 200
            spans.append(time.monotonic() - begun)
    assert min(spans[5:]) < 0.025
    server.own("DELETE", "rlorTrainerJobs/quick")
