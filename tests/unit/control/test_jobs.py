"""The life of a trainer job over HTTP, its failures included."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
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
    ],
)
def test_wrong_request_names_the_fix(server: Server, shape: str, config: dict, status: int, words: str) -> None:  # type: ignore[type-arg]
    answer = server.create_job("wrong", shape, **config)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert server.own("GET", "rlorTrainerJobs/wrong").status_code == 404


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
