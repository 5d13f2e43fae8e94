"""Deployments and hot-loads over HTTP, with replicas that only pretend to load."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from control_harness import Server  # type: ignore[import-not-found]

from firebox.weights.manifest import SnapshotManifest, committed_dir, seal


def save(server: Server, job: str, identity: str, **fields: Any) -> None:
    made = {"kind": "base", "base_model": "accounts/local/models/tiny", "created_at": identity, **fields}
    with committed_dir(server.data / "jobs" / "local" / job / "snapshots" / identity) as scratch:
        seal(scratch, SnapshotManifest(identity=identity, dtype="float32", step=1, files=[], **made))


def hot_load(server: Server, deployment: str, identity: str, previous: str | None = None) -> httpx.Response:
    body: dict[str, Any] = {"identity": identity, "reset_prompt_cache": True}
    if previous:
        body["incremental_snapshot_metadata"] = {"previous_snapshot_identity": previous, "compression_format": "arc_v2"}
    headers = {"fireworks-deployment": f"accounts/local/deployments/{deployment}"}
    return server.ask("POST", "/hot_load/v1/models/hot_load", headers=headers, json=body)


def status(server: Server, deployment: str) -> list[dict[str, Any]]:
    headers = {"fireworks-deployment": f"accounts/local/deployments/{deployment}"}
    replicas: list[dict[str, Any]] = server.ask("GET", "/hot_load/v1/models/hot_load", headers=headers).json()[
        "replicas"
    ]
    return replicas


def loaded(server: Server, deployment: str) -> list[str | None]:
    return [replica["current_snapshot_identity"] for replica in status(server, deployment)]


@pytest.fixture(scope="module")
def job(server: Server) -> str:
    assert server.create_job("source").json()["state"] == "JOB_STATE_RUNNING"
    save(server, "source", "a-base")
    save(server, "source", "b-delta", kind="delta", parent="a-base")
    save(server, "source", "c-delta", kind="delta", parent="b-delta")
    save(server, "source", "d-other", base_model="accounts/local/models/other")
    return "accounts/local/rlorTrainerJobs/source"


def test_create_answers_ready_and_delete_is_complete(server: Server) -> None:
    shape = "accounts/fireworks/deploymentShapes/tiny-cpu/versions/1"
    made = server.create_deployment("life", deploymentShape=shape).json()
    assert (made["state"], made["deploymentShape"]) == ("READY", shape)
    assert server.create_deployment("life").status_code == 409
    assert status(server, "life")[0]["readiness"] is True
    assert server.own("DELETE", "deployments/life", params={"ignoreChecks": "true", "hard": "true"}).json() == {}
    gone = server.own("GET", "deployments/life")
    assert gone.status_code == 404


def test_hot_load_follows_the_chain_and_tells_what_is_loaded(server: Server, job: str) -> None:
    server.create_deployment("chain", hotLoadTrainerJob=job, minReplicaCount=2, maxReplicaCount=2)
    assert loaded(server, "chain") == [None, None]
    assert hot_load(server, "chain", "a-base").status_code == 200
    assert loaded(server, "chain") == ["a-base", "a-base"]
    hot_load(server, "chain", "c-delta", previous="b-delta")
    refused = status(server, "chain")[0]
    assert refused["current_snapshot_identity"] == "a-base"
    assert refused["loading_state"] == {"stage": "error", "target_snapshot_identity": "c-delta"}
    assert refused["readiness"] is True
    hot_load(server, "chain", "b-delta", previous="a-base")
    assert loaded(server, "chain") == ["b-delta", "b-delta"]
    server.own("DELETE", "deployments/chain")


@pytest.mark.parametrize(
    ("identity", "code", "words"),
    [
        ("z-unknown", 404, "a-base"),
        ("../../etc", 400, "identity"),
        ("d-other", 400, "models/other"),
        ("b-delta", 400, "incremental_snapshot_metadata"),
    ],
)
def test_wrong_snapshot_is_refused_with_the_fix(server: Server, job: str, identity: str, code: int, words: str) -> None:
    if server.own("GET", "deployments/refusing").status_code == 404:
        server.create_deployment("refusing", hotLoadTrainerJob=job)
    answer = hot_load(server, "refusing", identity)
    assert answer.status_code == code
    assert words in answer.json()["error"]["message"]
    assert loaded(server, "refusing") == [None]


def test_scaled_to_zero_and_back_serves_the_wanted_snapshot(server: Server, job: str) -> None:
    server.create_deployment("sleepy", hotLoadTrainerJob=job)
    hot_load(server, "sleepy", "a-base")
    hot_load(server, "sleepy", "b-delta", previous="a-base")
    asleep = server.own("PATCH", "deployments/sleepy", json={"maxReplicaCount": 0, "minReplicaCount": 0}).json()
    assert (asleep["state"], asleep["hotLoadTrainerJob"]) == ("READY", job)
    assert status(server, "sleepy") == []
    body = {"model": "accounts/local/deployments/sleepy", "prompt": [1, 2]}
    refused = server.ask("POST", "/inference/v1/completions", json=body)
    assert refused.status_code == 400
    assert "scaled to zero" in refused.json()["error"]["message"]
    awake = server.own("PATCH", "deployments/sleepy", json={"maxReplicaCount": 1}).json()
    assert awake["state"] == "READY"
    assert loaded(server, "sleepy") == ["b-delta"]
    server.own("DELETE", "deployments/sleepy")


def test_new_transition_replaces_the_replica_and_keeps_the_snapshot(server: Server, job: str) -> None:
    server.create_deployment("rolling", hotLoadTrainerJob=job)
    hot_load(server, "rolling", "a-base")
    body = {"model": "accounts/local/deployments/rolling"}
    before = server.ask("POST", "/inference/v1/completions", json=body).json()["pid"]
    changed = server.own(
        "PATCH",
        "deployments/rolling",
        params={"updateMask": "hot_load_transition_type"},
        json={"hotLoadTransitionType": "SYNC", "maxReplicaCount": 0},
    ).json()
    assert (changed["state"], changed["hotLoadTransitionType"], changed["maxReplicaCount"]) == ("READY", "SYNC", 1)
    assert server.ask("POST", "/v1/completions", json=body).json()["pid"] != before
    assert loaded(server, "rolling") == ["a-base"]
    wrong = server.own("PATCH", "deployments/rolling", params={"updateMask": "base_model"}, json={})
    assert wrong.status_code == 400
    server.own("DELETE", "deployments/rolling")


def kill_replica(server: Server, deployment: str) -> int:
    """Kill the replica that answers, and return its pid."""
    pid = int(
        server.ask("POST", "/v1/completions", json={"model": f"accounts/local/deployments/{deployment}"}).json()["pid"]
    )
    os.kill(pid, signal.SIGKILL)
    return pid


def settles(server: Server, deployment: str, state: str, within_s: float = 10.0) -> None:
    deadline = time.monotonic() + within_s
    while server.own("GET", f"deployments/{deployment}", headers={"Prefer": "wait=0"}).json()["state"] != state:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_replica_is_replaced_and_serves_what_it_served(server: Server, job: str) -> None:
    server.create_deployment("tough", hotLoadTrainerJob=job)
    hot_load(server, "tough", "a-base")
    hot_load(server, "tough", "b-delta", previous="a-base")
    killed = kill_replica(server, "tough")
    settles(server, "tough", "UPDATING")
    settles(server, "tough", "READY")
    assert loaded(server, "tough") == ["b-delta"]
    assert kill_replica(server, "tough") != killed
    server.own("DELETE", "deployments/tough")


def test_replica_that_ends_again_and_again_fails_the_deployment(server: Server) -> None:
    server.create_deployment("fragile")
    for _ in range(2):
        kill_replica(server, "fragile")
        settles(server, "fragile", "UPDATING")
        settles(server, "fragile", "READY")
    kill_replica(server, "fragile")
    settles(server, "fragile", "FAILED")
    answer = server.ask("POST", "/v1/completions", json={"model": "accounts/local/deployments/fragile"})
    assert answer.status_code == 400
    assert "ended by signal 9" in answer.json()["error"]["message"]
    server.own("DELETE", "deployments/fragile")
    assert server.create_deployment("fragile").json()["state"] == "READY"
    server.own("DELETE", "deployments/fragile")


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"baseModel": "accounts/local/models/unknown"}, 404, "tiny"),
        ({"deploymentShape": "accounts/local/deploymentShapes/tiny-gpu1"}, 400, "tiny-cpu"),
        ({"hotLoadTrainerJob": "accounts/local/rlorTrainerJobs/unknown"}, 404, "unknown"),
        ({"maxReplicaCount": 1000}, 400, "maxReplicaCount"),
        ({"hotLoadTransitionType": "SOMEHOW"}, 400, "hotLoadTransitionType"),
        ({"extraArgs": ["--fast"]}, 400, "extraArgs"),
    ],
)
def test_wrong_deployment_names_the_fix(server: Server, fields: dict[str, Any], code: int, words: str) -> None:
    answer = server.create_deployment("wrong", **fields)
    assert answer.status_code == code
    assert words in answer.json()["error"]["message"]


def test_other_accounts_are_out_of_reach(server: Server, job: str) -> None:
    assert server.ask("GET", "/v1/accounts/other/deployments").status_code == 403
    assert server.ask("GET", "/training/v1/rlorTrainerJobs/other/source/api/v1/healthz").status_code == 403
    body = {"model": "accounts/other/deployments/d"}
    assert server.ask("POST", "/v1/completions", json=body).status_code == 404
    assert Path(server.data / "jobs" / "local").is_dir()


@pytest.mark.parametrize(("mask", "body"), [(None, {"minReplicaCount": None}), ("min_replica_count,description", {})])
def test_field_that_is_taken_away_goes_back_to_its_default(
    server: Server, mask: str | None, body: dict[str, Any]
) -> None:
    server.create_deployment("cleared", minReplicaCount=1, maxReplicaCount=1, description="mine")
    params = {} if mask is None else {"updateMask": mask}
    changed = server.own("PATCH", "deployments/cleared", params=params, json=body).json()
    assert (changed["minReplicaCount"], changed["maxReplicaCount"]) == (0, 1)
    assert changed["description"] == ("mine" if mask is None else "")
    assert server.own("DELETE", "deployments/cleared").status_code == 200
