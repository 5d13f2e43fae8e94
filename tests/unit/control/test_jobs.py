"""The life of a trainer job over HTTP, its failures included."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from control_harness import Server, wait_for  # type: ignore[import-not-found]

from firebox.launch.local import started_at
from firebox.weights.manifest import CheckpointManifest, committed_dir, seal


def test_create_answers_running_and_delete_leaves_a_tombstone(server: Server) -> None:
    made = server.create_job("life").json()
    assert made["name"] == "accounts/local/rlorTrainerJobs/life"
    assert made["state"] == "JOB_STATE_RUNNING"
    assert made["trainingConfig"]["maxContextLength"] == 512
    healthz = server.ask("GET", "/training/v1/rlorTrainerJobs/local/life/api/v1/healthz")
    assert healthz.json() == {"status": "ok"}
    assert server.create_job("life").status_code == 409
    assert server.own("DELETE", "rlorTrainerJobs/life").json() == {}
    assert server.state("life") == "JOB_STATE_DELETED"
    assert server.own("GET", "rlorTrainerJobs/life/checkpoints").json()["checkpoints"] == []
    listed = [job["name"] for job in server.own("GET", "rlorTrainerJobs").json()["rlorTrainerJobs"]]
    assert made["name"] not in listed
    assert server.own("POST", "rlorTrainerJobs/life:resume").status_code == 400


def test_cancelled_job_can_be_resumed(server: Server) -> None:
    server.create_job("pause")
    before = server.workers()
    assert server.own("POST", "rlorTrainerJobs/pause:cancel").json()["state"] == "JOB_STATE_CANCELLED"
    assert len(server.workers()) == len(before) - 1
    assert server.own("POST", "rlorTrainerJobs/pause:resume").json()["state"] == "JOB_STATE_RUNNING"
    server.own("DELETE", "rlorTrainerJobs/pause")


def test_killed_trainer_fails_the_job_and_its_open_futures(server: Server) -> None:
    server.create_job("doomed")
    folder = server.data / "jobs" / "local" / "doomed" / "checkpoints" / "step-7"
    with committed_dir(folder) as scratch:
        model = "accounts/local/models/tiny"
        seal(
            scratch,
            CheckpointManifest(name="step-7", base_model=model, step=7, created_at="2026-01-01T00:00:00Z", files=[]),
        )
    gateway = "/training/v1/rlorTrainerJobs/local/doomed/api/v1"
    died = server.ask("POST", f"{gateway}/die", json={})
    assert (died.status_code, died.json()["error"]["code"]) == (503, 14)
    wait_for(lambda: server.state("doomed") == "JOB_STATE_FAILED")
    job = server.own("GET", "rlorTrainerJobs/doomed").json()
    assert "ended by signal 9" in job["statusMessage"]
    assert "'step-7'" in job["statusMessage"]
    assert "worker is starting" in job["statusMessage"]
    future = server.ask("POST", f"{gateway}/retrieve_future", json={"request_id": "1"})
    assert future.status_code == 200
    assert "step-7" in future.json()["error"]
    refused = server.ask("POST", f"{gateway}/forward_backward", json={})
    assert refused.status_code == 400
    assert "resume" in refused.json()["error"]["message"]
    assert server.own("POST", "rlorTrainerJobs/doomed:resume").json()["state"] == "JOB_STATE_RUNNING"
    rows = server.own("GET", "rlorTrainerJobs/doomed/checkpoints").json()["checkpoints"]
    assert [(row["name"].rsplit("/")[-1], row["checkpointType"]) for row in rows] == [
        ("step-7", "CHECKPOINT_TYPE_TRAINING")
    ]
    assert server.own("DELETE", "rlorTrainerJobs/doomed/checkpoints/step-7").json() == {}
    assert server.own("GET", "rlorTrainerJobs/doomed/checkpoints").json()["checkpoints"] == []
    assert not folder.exists()
    for name in ("step-7", "%2e%2e"):
        assert server.own("DELETE", f"rlorTrainerJobs/doomed/checkpoints/{name}").status_code == 404


def test_repeated_create_is_told_from_another_one(server: Server) -> None:
    first = server.create_job("twice", fields={"displayName": "one"}).json()
    again = server.create_job("twice", fields={"displayName": "one"})
    assert again.status_code == 409
    assert "these very settings" in again.json()["error"]["message"]
    other = server.create_job("twice", "tiny-cpu-small", fields={"displayName": "two"})
    assert other.status_code == 409
    assert "displayName is 'one' there and 'two' here" in other.json()["error"]["message"]
    assert "trainingShape is 'accounts/local/trainingShapes/tiny-cpu/versions/1'" in other.json()["error"]["message"]
    assert server.own("GET", "rlorTrainerJobs/twice").json() == first
    server.own("DELETE", "rlorTrainerJobs/twice")
    assert "was deleted" in server.create_job("twice").json()["error"]["message"]


def test_settings_of_a_job_are_shown_and_used(server: Server) -> None:
    made = server.create_job(
        "settled", fields={"displayName": "my job", "inactivityTimeout": "1800s"},
        region="US_VIRGINIA_1", extraArgs=["--threads", "3"],
    ).json()  # fmt: skip
    assert (made["displayName"], made["inactivityTimeout"]) == ("my job", "1800s")
    assert made["trainingConfig"]["region"] == "US_VIRGINIA_1"
    assert server.trainer("settled")["threads"] == "3"
    for expression in ('display_name="my job"', "state=JOB_STATE_RUNNING AND training_config.region=US_VIRGINIA_1"):
        found = server.own("GET", "rlorTrainerJobs", params={"filter": expression}).json()["rlorTrainerJobs"]
        assert [job["name"].rpartition("/")[2] for job in found] == ["settled"]
    server.own("DELETE", "rlorTrainerJobs/settled")


@pytest.mark.parametrize("shape", ["tiny-cpu-forward", "tiny-cpu", "tiny-cpu-lora", ""])
def test_reference_runs_on_any_shape_and_trains_nothing(server: Server, shape: str) -> None:
    made = server.create_job("reference-" + (shape or "auto"), shape, fields={"forwardOnly": True}).json()
    assert (made["state"], made["forwardOnly"]) == ("JOB_STATE_RUNNING", True)
    assert made["trainingShape"].split("/")[3] == (shape or "tiny-cpu-forward")
    server.own("DELETE", f"rlorTrainerJobs/{made['name'].rpartition('/')[2]}")


def test_unused_job_is_paused_and_can_be_resumed(server: Server) -> None:
    server.create_job("kept", fields={"inactivityTimeout": "1s", "disableInactivityCleanup": True})
    server.create_job("disk-full", fields={"inactivityTimeout": "1s"})
    server.create_job("idle", fields={"inactivityTimeout": "2s"})
    for _ in range(6):
        time.sleep(0.4)
        server.trainer("idle")
    assert server.state("idle") == "JOB_STATE_RUNNING"
    wait_for(lambda: server.state("idle") == "JOB_STATE_PAUSED")
    message = server.own("GET", "rlorTrainerJobs/idle").json()["statusMessage"]
    assert "after 2 s without a call" in message
    assert "load what it held: silent-1" in message
    refused = server.ask("POST", "/training/v1/rlorTrainerJobs/local/idle/api/v1/forward", json={})
    assert "resume it" in refused.json()["error"]["message"]
    assert server.own("POST", "rlorTrainerJobs/idle:resume").json()["state"] == "JOB_STATE_RUNNING"
    assert server.trainer("idle")["path"] == "/api/v1/echo"
    assert server.state("kept") == "JOB_STATE_RUNNING"
    assert server.state("disk-full") == "JOB_STATE_RUNNING", "what cannot be saved is not stopped"
    for job in ("idle", "kept", "disk-full"):
        server.own("DELETE", f"rlorTrainerJobs/{job}")


def test_deleted_job_is_kept_for_thirty_days(new_server: Callable[..., Server], model_files: Path) -> None:
    server = new_server()
    server.add_model("tiny", model_files)
    for job in ("old", "recent"):
        server.create_job(job)
        with committed_dir(server.data / "jobs" / "local" / job / "checkpoints" / "last") as scratch:
            made = "2026-01-01T00:00:00Z"
            seal(scratch, CheckpointManifest(name="last", base_model="m", step=1, created_at=made, files=[]))
        server.own("DELETE", f"rlorTrainerJobs/{job}")
    server.stop()
    with sqlite3.connect(server.data / "firebox.db") as database:
        for job, days in (("old", 31), ("recent", 29)):
            then = (datetime.now(UTC) - timedelta(days=days)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
            database.execute("UPDATE trainer_jobs SET update_time = ? WHERE id = ?", (then, job))
    server.start()
    wait_for(lambda: server.state("old") == "JOB_STATE_ARCHIVED")
    assert not (server.data / "jobs" / "local" / "old").exists()
    assert server.state("recent") == "JOB_STATE_DELETED"
    counts = [
        len(server.own("GET", f"rlorTrainerJobs/{j}/checkpoints").json()["checkpoints"]) for j in ("old", "recent")
    ]
    assert counts == [0, 1]
    assert server.own("DELETE", "rlorTrainerJobs/old").json() == {}
    assert server.own("GET", "rlorTrainerJobs").json()["totalSize"] == 0
    assert server.own("GET", "rlorTrainerJobs", params={"showDeleted": True}).json()["totalSize"] == 2


def test_trainer_that_cannot_start_fails_the_job_with_its_own_words(server: Server) -> None:
    job = server.create_job("broken").json()
    assert job["state"] == "JOB_STATE_FAILED"
    assert "the weights are not there" in job["status"]["message"]


def test_shape_is_selected_when_none_is_named(server: Server) -> None:
    job = server.create_job("auto", shape="", loraRank=8).json()
    assert job["trainingShape"].endswith("/tiny-cpu-lora/versions/1")
    server.own("DELETE", "rlorTrainerJobs/auto")


@pytest.mark.parametrize(
    ("shape", "config", "status", "words"),
    [
        ("tiny-gpu1", {}, 400, "tiny-cpu"),
        ("nope-cpu", {}, 404, "tiny-cpu-lora"),
        ("tiny-cpu", {"loraRank": 8}, 400, "tiny-cpu-lora"),
        ("tiny-cpu-lora", {}, 400, "tiny-cpu"),
        ("tiny-cpu", {"baseModel": "accounts/local/models/unknown"}, 404, "known models: tiny"),
        ("tiny-cpu", {"baseModel": "tiny"}, 400, "trainingConfig.baseModel"),
        ("tiny-cpu", {"baseModel": ""}, 400, "trainingConfig.baseModel"),
        ("tiny-cpu", {"maxContextLength": 4096}, 400, "512"),
        ("tiny-cpu", {"projectionHeadDim": 4}, 400, "projectionHeadDim"),
        ("tiny-cpu", {"loraRank": "many"}, 400, "loraRank"),
        ("", {"acceleratorType": "NVIDIA_H200_141GB"}, 400, "tiny-cpu"),
        ("", {"acceleratorCount": 8}, 400, "acceleratorCount"),
        ("", {"maxContextLength": 4096}, 400, "maxContextLength"),
        ("tiny-cpu", {"acceleratorType": "NVIDIA_H200_141GB"}, 400, "trainingConfig.acceleratorType: the shape"),
        ("tiny-cpu", {"acceleratorCount": 1}, 400, "trainingConfig.acceleratorCount: the shape"),
        ("tiny-cpu", {"maxContextLength": 64}, 400, "trainingConfig.maxContextLength: the shape"),
        ("tiny-cpu", {"customImageTag": "9.9"}, 400, "trainingConfig.customImageTag"),
        ("tiny-cpu", {"extraArgs": ["--fast"]}, 400, "known: --threads"),
        ("tiny-nodes2", {}, 400, "2 nodes"),
    ],
)
def test_wrong_request_names_the_fix(server: Server, shape: str, config: dict, status: int, words: str) -> None:  # type: ignore[type-arg]
    answer = server.create_job("wrong", shape, **config)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert server.own("GET", "rlorTrainerJobs/wrong").status_code == 404


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"inactivityTimeout": "half an hour"}, "inactivityTimeout"),
        ({"inactivityTimeout": "10801s"}, "up to 10800"),
        ({"nodeCount": 2}, "nodeCount"),
        ({"trainerReplicaCount": 2}, "trainerReplicaCount"),
        ({"displayName": "x" * 64}, "displayName"),
        ({"extraValues": {"a": "b"}}, "extraValues"),
    ],
)
def test_wrong_setting_names_the_fix(server: Server, fields: dict, words: str) -> None:  # type: ignore[type-arg]
    answer = server.create_job("wrong", fields=fields)
    assert answer.status_code == 400
    assert words in answer.json()["error"]["message"]


def test_restart_takes_live_jobs_back_and_tells_the_truth_about_dead_ones(
    new_server: Callable[[], Server], model_files: Path
) -> None:
    server = new_server()
    server.add_model("tiny", model_files)
    server.create_job("alive")
    alive = server.workers()
    server.create_job("dead")
    dead = [pid for pid in server.workers() if pid not in alive]
    server.create_deployment("served")
    served = [pid for pid in server.workers() if pid not in (*alive, *dead)]
    server.stop(signal.SIGKILL)
    os.kill(dead[0], signal.SIGKILL)
    server.start()
    assert server.state("alive") == "JOB_STATE_RUNNING"
    assert server.own("GET", "deployments/served").json()["state"] == "READY"
    assert sorted(server.workers()) == sorted(alive + served)
    wait_for(lambda: server.state("dead") == "JOB_STATE_FAILED")
    healthz = server.ask("GET", "/training/v1/rlorTrainerJobs/local/alive/api/v1/healthz")
    assert healthz.json() == {"status": "ok"}
    server.stop()
    assert not [pid for pid in alive + served if started_at(pid)]
    server.start()
    assert server.state("alive") == "JOB_STATE_FAILED"
    assert server.own("POST", "rlorTrainerJobs/alive:resume").json()["state"] == "JOB_STATE_RUNNING"
