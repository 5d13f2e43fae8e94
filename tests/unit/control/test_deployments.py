"""Deployments and hot-loads over HTTP, with replicas that only pretend to load."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from control_harness import Server  # type: ignore[import-not-found]

from firebox.weights.manifest import SnapshotManifest, committed_dir, seal
from firebox.wire.worker import SamplerSpec


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
    save(server, "source", "f-delta", kind="delta", parent="z-gone")
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
    header = {"fireworks-deployment": "accounts/local/deployments/chain"}
    wanted = server.ask("GET", "/hot_load/v1/models/hot_load", headers=header).json()
    assert wanted["desired_snapshot_identity"] == "c-delta"
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
        ("f-delta", 400, "'z-gone', which is missing"),
    ],
)
def test_wrong_snapshot_is_refused_with_the_fix(server: Server, job: str, identity: str, code: int, words: str) -> None:
    if server.own("GET", "deployments/refusing").status_code == 404:
        server.create_deployment("refusing", hotLoadTrainerJob=job)
    answer = hot_load(server, "refusing", identity, previous="z-gone" if identity == "f-delta" else None)
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


def wait_for(holds: Callable[[], bool], within_s: float = 40.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_replaced(server: Server, deployment: str, killed: int) -> bool:
    answer = server.ask("POST", "/v1/completions", json={"model": f"accounts/local/deployments/{deployment}"})
    return answer.status_code == 200 and answer.json()["pid"] != killed


def test_killed_replica_is_replaced_and_serves_what_it_served(server: Server, job: str) -> None:
    server.create_deployment("tough", hotLoadTrainerJob=job)
    hot_load(server, "tough", "a-base")
    hot_load(server, "tough", "b-delta", previous="a-base")
    killed = kill_replica(server, "tough")
    wait_for(lambda: is_replaced(server, "tough", killed))
    assert server.own("GET", "deployments/tough").json()["state"] == "READY"
    assert loaded(server, "tough") == ["b-delta"]
    server.own("DELETE", "deployments/tough")


def test_replica_that_ends_again_and_again_fails_the_deployment(server: Server) -> None:
    server.create_deployment("fragile")
    for _ in range(2):
        killed = kill_replica(server, "fragile")
        wait_for(functools.partial(is_replaced, server, "fragile", killed))
    kill_replica(server, "fragile")
    wait_for(lambda: server.own("GET", "deployments/fragile").json()["state"] == "FAILED")
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
        ({"extraArgs": ["--fast"]}, 400, "max-batch-size"),
        ({"extraArgs": ["--max-batch-size=0"]}, 400, "from 1"),
        ({"extraArgs": ["--max-batch-size", "4"], "extraValues": {"max-batch-size": "4"}}, 400, "twice"),
        ({"extraArgs": ["4"]}, 400, "--name=value"),
        ({"extraValues": {"colour": "red"}}, 400, "colour"),
        ({"hotLoadBucketType": "FLOPPY"}, 400, "FW_HOSTED"),
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


def test_id_is_made_when_none_is_given(server: Server) -> None:
    made = server.own("POST", "deployments", json={"baseModel": "accounts/local/models/tiny"}).json()
    assert made["state"] == "READY"
    server.own("DELETE", f"deployments/{made['name'].rpartition('/')[2]}")


def test_options_reach_the_sampler(server: Server) -> None:
    fields = {"extraArgs": ["--max-batch-size", "4"], "extraValues": {"max-context-length": "100"}}
    server.create_deployment("tuned", **fields)
    (spec,) = [p for p in (server.data / "run").glob("s-*.json") if "deployments/tuned" in p.read_text()]
    sampler = msgspec.json.decode(spec.read_bytes(), type=SamplerSpec)
    assert (sampler.max_batch, sampler.max_context_length) == (4, 100)
    server.own("DELETE", "deployments/tuned")


def test_jobs_publish_to_the_bucket_of_a_deployment(server: Server) -> None:
    """PER_DEPLOYMENT: the deployment comes first, and each job that names it adds to what it can load."""
    server.create_deployment("shared", hotLoadBucketType="FW_HOSTED")
    refused = hot_load(server, "shared", "first")
    assert refused.status_code == 400
    assert "hotLoadDeploymentId" in refused.json()["error"]["message"]
    for job, target in (("pub-1", "shared"), ("pub-2", "accounts/local/deployments/shared")):
        made = server.create_job(job, fields={"hotLoadDeploymentId": target}).json()
        assert made["hotLoadDeploymentId"] == "accounts/local/deployments/shared"
    save(server, "pub-1", "first")
    save(server, "pub-2", "second")
    for identity in ("second", "first"):
        assert hot_load(server, "shared", identity).status_code == 200
        assert loaded(server, "shared") == [identity]
    unknown = hot_load(server, "shared", "third")
    assert unknown.status_code == 404
    for name in ("deployments/shared", "rlorTrainerJobs/pub-1", "rlorTrainerJobs/pub-2"):
        server.own("DELETE", name)


def test_bucket_scopes_do_not_mix(server: Server, job: str, model_files: Path) -> None:
    """Whoever mixes them is told both names and what to do instead."""

    def refused(answer: httpx.Response, *words: str) -> None:
        assert answer.status_code == 400, answer.text
        message = answer.json()["error"]["message"]
        assert not [word for word in words if word not in message], message

    server.create_deployment("own-bucket")
    server.create_job("publisher", fields={"hotLoadDeploymentId": "own-bucket"})
    server.create_deployment("of-trainer", hotLoadTrainerJob=job)
    publisher = "accounts/local/rlorTrainerJobs/publisher"
    answer = server.create_deployment("reader", hotLoadTrainerJob=publisher)
    refused(answer, publisher, "deployments/reader", "deployments/own-bucket", "without hotLoadDeploymentId")
    answer = server.create_job("writer", fields={"hotLoadDeploymentId": "of-trainer"})
    refused(answer, "rlorTrainerJobs/writer", "deployments/of-trainer", job, "PATCH")
    answer = server.own("PATCH", "deployments/own-bucket", json={"hotLoadTrainerJob": job})
    refused(answer, "deployments/own-bucket", publisher, job, "another deployment")
    server.add_model("other", model_files)
    answer = server.create_deployment("stranger", baseModel="accounts/local/models/other", hotLoadTrainerJob=job)
    refused(answer, job, "models/tiny", "models/other")
    assert server.create_job("nowhere", fields={"hotLoadDeploymentId": "missing"}).status_code == 404
    for name in ("deployments/own-bucket", "deployments/of-trainer", "rlorTrainerJobs/publisher", "models/other"):
        server.own("DELETE", name)


def test_deployment_goes_over_to_another_trainer(server: Server, job: str) -> None:
    server.create_deployment("moving", hotLoadTrainerJob=job)
    hot_load(server, "moving", "a-base")
    server.create_job("successor")
    save(server, "successor", "e-base")
    patched = server.own(
        "PATCH",
        "deployments/moving",
        params={"updateMask": "hot_load_trainer_job"},
        json={"hotLoadTrainerJob": "accounts/local/rlorTrainerJobs/successor"},
    ).json()
    assert (patched["state"], patched["hotLoadTrainerJob"]) == ("READY", "accounts/local/rlorTrainerJobs/successor")
    assert loaded(server, "moving") == ["a-base"]
    assert hot_load(server, "moving", "b-delta").status_code == 404
    assert hot_load(server, "moving", "e-base").status_code == 200
    assert loaded(server, "moving") == ["e-base"]
    for name in ("deployments/moving", "rlorTrainerJobs/successor"):
        server.own("DELETE", name)
