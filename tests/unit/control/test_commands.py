"""Commands that work on the server's files, on the hub, or on the machine."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from control_harness import Server  # type: ignore[import-not-found]
from test_up import firebox  # type: ignore[import-not-found]

COMMIT = "1" * 40


def test_every_command_has_an_example() -> None:
    from typer.main import get_command

    from firebox.cli import app

    commands: dict[str, Any] = dict(get_command(app).commands)  # type: ignore[attr-defined]
    for group in [name for name, command in commands.items() if hasattr(command, "commands")]:
        commands |= {f"{group} {name}": command for name, command in commands.pop(group).commands.items()}
    assert {"up", "doctor", "chat", "models pull", "models export", "keys create"} <= set(commands)
    assert [n for n, c in commands.items() if not c.hidden and "Example" not in (c.callback.__doc__ or "")] == []


def test_keys_are_made_listed_and_revoked(server: Server) -> None:
    made = firebox("keys", "create", "laptop", "--account", "alice", "--max-concurrent", "3", data=server.data)
    name, secret = made.stdout.split(",")[0], made.stdout.split()[-1]
    assert server.ask("GET", "/v1/accounts", headers={"X-Api-Key": secret}).status_code == 200
    (listed,) = json.loads(firebox("keys", "list", "--account", "alice", "--json", data=server.data).stdout)
    assert (listed["displayName"], listed["maxConcurrent"]) == ("laptop", 3)
    assert "laptop" in firebox("keys", "list", data=server.data).stdout
    revoked = firebox("keys", "revoke", name.split("/")[-1], "--account", "alice", data=server.data)
    assert "revoked" in revoked.stdout
    assert server.ask("GET", "/v1/accounts", headers={"X-Api-Key": secret}).status_code == 401


def test_model_is_exported_whole_or_not_at_all(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "mine"
    assert firebox("models", "export", "tiny", str(target), data=server.data).returncode == 0
    source = server.data / "models" / "local" / "tiny"
    assert {p.name: p.read_bytes() for p in target.iterdir()} == {p.name: p.read_bytes() for p in source.iterdir()}
    again = firebox("models", "export", "tiny", str(target), data=server.data)
    assert (again.returncode, "exists already" in again.stderr) == (1, True)
    missing = firebox("models", "export", "none", str(tmp_path / "none"), data=server.data)
    assert (missing.returncode, "known models: tiny" in missing.stderr) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_logs_are_of_jobs_and_deployments(server: Server) -> None:
    server.create_deployment("logged")
    assert "worker is starting" in firebox("logs", "logged", data=server.data).stdout
    nothing = firebox("logs", "nothing", data=server.data)
    assert (nothing.returncode, "firebox status" in nothing.stderr) == (1, True)
    server.own("DELETE", "deployments/logged")


def test_chat_prints_what_is_streamed(server: Server) -> None:
    server.create_deployment("talker")
    assert firebox("chat", "talker", "-m", "two words", data=server.data).stdout == "two words\n"
    missing = firebox("chat", "nobody", "-m", "x", data=server.data)
    assert (missing.returncode, "known deployments: talker" in missing.stderr) == (1, True)
    server.own("DELETE", "deployments/talker")


def test_doctor_names_the_trouble_and_the_fix(server: Server, tmp_path: Path) -> None:
    fit = firebox("doctor", "--json", data=server.data)
    assert fit.returncode == 0, fit.stdout
    assert {row["check"]: row["state"] for row in json.loads(fit.stdout)}["server"] == "ok"
    (tmp_path / "open").mkdir(mode=0o755)
    unfit = firebox("doctor", "--json", data=tmp_path / "open")
    assert unfit.returncode == 1
    fixes = {row["check"]: row["fix"] for row in json.loads(unfit.stdout) if row["state"] != "ok"}
    assert set(fixes) == {"data directory", "server"}
    assert "chmod 700" in fixes["data directory"]
    assert "firebox up" in fixes["server"]


@pytest.fixture
def hub(model_files: Path) -> Iterator[str]:
    """As much of the hub as a download asks for, with one repository, `some/Tiny-1`, which also has a pickle."""
    files = {path.name: path.read_bytes() for path in model_files.iterdir()} | {"pytorch_model.bin": b"pickle"}

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            if self.path.startswith("/api/models/some/Tiny-1/"):
                told = _tree(files) if "/tree/" in self.path else _listing(files)
                self._send(json.dumps(told).encode(), {"Content-Type": "application/json"})
            elif self.path == f"/some/Tiny-1/resolve/{COMMIT}/{name}" and name in files:
                etag = hashlib.sha256(files[name]).hexdigest()
                self._send(files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})
            else:
                self._send(b"", {"X-Error-Code": "RepoNotFound"}, 404)

        do_HEAD = do_GET

        def _send(self, body: bytes, headers: dict[str, str], status: int = 200) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Nobody reads it."""

    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()


def _listing(files: dict[str, bytes]) -> dict[str, Any]:
    return {"id": "some/Tiny-1", "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    return [{"type": "file", "path": name, "size": len(raw), "oid": COMMIT} for name, raw in files.items()]


def test_model_is_pulled_without_its_pickles(server: Server, hub: str, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    pulled = firebox("models", "pull", "some/Tiny-1", data=server.data, **env)
    assert pulled.returncode == 0, pulled.stderr
    assert COMMIT in pulled.stdout
    model = server.own("GET", "models/tiny-1").json()
    assert (model["state"], model["aliases"]) == ("READY", ["some/Tiny-1"])
    assert not list((tmp_path / "cache").rglob("*.bin"))
    missing = firebox("models", "pull", "some/other", data=server.data, **env)
    assert (missing.returncode, "some/other" in missing.stderr) == (1, True)
    assert "Traceback" not in missing.stderr
    server.own("DELETE", "models/tiny-1")
    shutil.rmtree(tmp_path / "cache")
