"""Keys of several accounts: shown once, named, limited, revoked; and what an operator sees of the server."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from alembic import command
from alembic.config import Config
from control_harness import Server  # type: ignore[import-not-found]
from sqlalchemy import create_engine

from firebox.control import database
from firebox.control.database import Database


def make(server: Server, account: str = "local", **fields: Any) -> dict[str, Any]:
    answer = server.ask("POST", f"/v1/accounts/{account}/apiKeys", json={"displayName": "test", **fields})
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def listed(server: Server, account: str = "local") -> dict[str, dict[str, Any]]:
    return {key["name"]: key for key in server.ask("GET", f"/v1/accounts/{account}/apiKeys").json()["apiKeys"]}


def using(
    server: Server, secret: str, method: str = "GET", path: str = "/v1/accounts", **kwargs: Any
) -> httpx.Response:
    return server.ask(method, path, headers={"X-Api-Key": secret}, **kwargs)


def test_key_is_shown_once_used_and_revoked(server: Server) -> None:
    made = make(server, displayName="laptop")
    name, secret = made["name"], made["secret"]
    assert "secret" not in listed(server)[name]
    assert secret.encode() not in (server.data / "firebox.db").read_bytes()
    assert listed(server)[name]["displayName"] == "laptop"
    assert "lastUsedTime" not in listed(server)[name]
    assert using(server, secret).status_code == 200
    deadline = time.monotonic() + 5
    while "lastUsedTime" not in listed(server)[name]:
        assert time.monotonic() < deadline, "its use was not noted"
    for _ in range(2):
        assert server.ask("DELETE", "/v1/" + name).json()["state"] == "REVOKED"
    assert using(server, secret).status_code == 401
    assert listed(server)[name]["state"] == "REVOKED"


def test_keys_and_revocations_survive_a_restart(new_server: Callable[[], Server]) -> None:
    server = new_server()
    kept, gone = make(server, "alice"), make(server, "alice")
    assert server.ask("DELETE", "/v1/" + gone["name"]).status_code == 200
    server.stop(9)
    server.start()
    assert using(server, kept["secret"]).json()["accounts"][0]["name"] == "accounts/alice"
    assert using(server, gone["secret"]).status_code == 401


def test_only_operators_manage_keys(server: Server) -> None:
    alice = make(server, "alice")
    refused = using(server, alice["secret"], "POST", "/v1/accounts/alice/apiKeys", json={"displayName": "x"})
    assert (refused.status_code, reason(refused)) == (403, "NOT_OPERATOR")
    assert using(server, alice["secret"], "DELETE", "/v1/" + alice["name"]).status_code == 403
    own = using(server, alice["secret"], path="/v1/accounts/alice/apiKeys").json()["apiKeys"]
    assert alice["name"] in [key["name"] for key in own]
    assert {key["name"].split("/")[1] for key in own} == {"alice"}
    assert using(server, alice["secret"], path="/v1/accounts/local/apiKeys").status_code == 403
    everyone = {name.split("/")[1] for name in listed(server, "-")}
    assert everyone >= {"local", "alice"}
    second = make(server, "bob", operator=True)
    assert using(server, second["secret"], "DELETE", "/v1/" + alice["name"]).status_code == 200


def test_last_operators_key_stays(server: Server) -> None:
    operators = [key for key in listed(server, "-").values() if key["operator"] and key["state"] == "ACTIVE"]
    for key in operators:
        if key["displayName"] != "first":
            server.ask("DELETE", "/v1/" + key["name"])
    (first,) = [key["name"] for key in operators if key["displayName"] == "first"]
    refused = server.ask("DELETE", "/v1/" + first)
    assert (refused.status_code, reason(refused)) == (400, "LAST_OPERATOR_KEY")


@pytest.mark.parametrize(
    ("account", "body"),
    [
        ("Alice", {}), ("-", {}), ("fireworks", {}), ("..", {}), ("alice", {"displayName": ""}),
        ("alice", {"requestsPerMinute": 0}), ("alice", {"maxConcurrent": -1}), ("alice", {"displayName": 5}),
        ("alice", {"maxConcurrent": 10**30}),
    ],
)  # fmt: skip
def test_wrong_key_requests_are_refused(server: Server, account: str, body: dict[str, Any]) -> None:
    answer = server.ask("POST", f"/v1/accounts/{account}/apiKeys", json={"displayName": "x", **body})
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]


def test_rate_of_a_key_is_held(server: Server) -> None:
    secret = make(server, requestsPerMinute=2)["secret"]
    assert [using(server, secret).status_code for _ in range(3)] == [200, 200, 429]
    assert 0 < int(using(server, secret).headers["retry-after"]) <= 60


def test_metrics_are_for_operators(server: Server) -> None:
    text = server.ask("GET", "/metrics").text
    assert 'firebox_requests_total{method="GET",route="/v1/accounts"' in text
    assert 'firebox_resources{collection="apiKeys",state="ACTIVE"}' in text
    assert using(server, make(server, "alice")["secret"], path="/metrics").status_code == 403
    assert httpx.get(server.url + "/metrics").status_code == 401


def test_log_has_every_request_and_no_secret(server: Server) -> None:
    log = server.data.parent / "up.log"
    server.ask("GET", "/v1/accounts/local/models?pageToken=x", headers={"X-Request-ID": "find-me"})
    secret = make(server)["secret"]
    using(server, secret, "DELETE", "/v1/accounts/local/models/a%0ab")
    lines = [line for line in log.read_text().splitlines() if "request=find-me" in line]
    assert len(lines) == 1
    assert "GET /v1/accounts/local/models " in lines[0]
    assert "status=400" in lines[0]
    assert secret not in log.read_text()
    assert "DELETE /v1/accounts/local/models/a%0ab " in log.read_text()


def test_older_database_keeps_its_key(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path / 'old.db'}")
    config = Config()
    config.set_main_option("script_location", str(Path(database.__file__).parent / "migrations"))
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        connection.exec_driver_sql("INSERT INTO accounts VALUES ('local', '2026-01-01T00:00:00Z')")
        connection.exec_driver_sql("INSERT INTO api_keys VALUES ('abcdef0123', 'local', '2026-01-01T00:00:00Z')")
    Database(tmp_path / "old.db").close()
    with sqlite3.connect(tmp_path / "old.db") as migrated:
        rows = migrated.execute("SELECT account, id, state, sha256, display_name, operator FROM api_keys").fetchall()
    assert rows == [("local", "abcdef01", "ACTIVE", "abcdef0123", "first", 1)]


def reason(answer: httpx.Response) -> str:
    told: str = json.loads(answer.text)["error"]["details"][0]["reason"]
    return told
