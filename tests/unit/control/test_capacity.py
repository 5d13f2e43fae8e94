"""Capacity: nothing is given twice, nobody overtakes, and a job that does not fit says what it waits for."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from control_harness import Server, wait_for  # type: ignore[import-not-found]
from hypothesis import given, settings
from proofs import Record, count

from firebox.control.services.capacity import Capacity, Need
from firebox.launch.machine import HOST, Device, Machine

GIB = 2**30
MACHINE = Machine(8, (Device(HOST, 10), Device("NVIDIA_H100", 80, "0"), Device("NVIDIA_H100", 80, "1")))
FOR_FOUR = [4, ["CPU", 2 * GIB + 2**20]]
NEEDS = st.one_of(
    st.builds(Need, st.just(HOST), st.just(1), st.integers(1, 10), st.just(True)),
    st.builds(Need, st.sampled_from(["NVIDIA", "NVIDIA_H100"]), st.integers(1, 2), st.integers(1, 80), st.booleans()),
)


@pytest.mark.prove
def test_devices_are_never_given_twice_and_lines_are_kept(record: Record) -> None:
    examples = count(100, 3000)
    actions = st.lists(st.one_of(NEEDS, st.integers(0, 30)), max_size=40)
    settings(max_examples=examples, deadline=None)(given(actions)(_act))()
    record("sequences of claims and releases", examples)


def _act(actions: list[Need | int]) -> None:
    """A need is claimed by a new holder; a number releases the holder of that number, whether it has or waits."""
    held: dict[str, Need] = {}
    line: list[tuple[str, Need]] = []
    granted: list[str] = []
    capacity = Capacity(MACHINE, granted.append)
    for number, action in enumerate(actions):
        if isinstance(action, Need):
            line.append((str(number), action))
        else:
            capacity.release(str(action))
            held.pop(str(action), None)
            line = [(holder, need) for holder, need in line if holder != str(action)]
        for holder, need in list(line):
            if capacity.claim(holder, need) is not None:
                held[holder] = need
                line.remove((holder, need))
        _check_devices(capacity, held)
        for place, (holder, need) in enumerate(line, 1):
            assert f"number {place} in line" in capacity.why_waiting(holder)
            before = [other for _, other in line[: place - 1] if other.kind[:6] == need.kind[:6]]
            assert before or not _fits(capacity, held, need), "it waits though it is its turn and there is room"


def _check_devices(capacity: Capacity, held: dict[str, Need]) -> None:
    there: dict[Device, list[Need]] = {device: [] for device in MACHINE.devices}
    for holder, need in held.items():
        devices = capacity.claim(holder, need)
        assert devices is not None
        assert len(devices) == need.count
        for device in devices:
            assert device.kind.startswith(need.kind)
            there[device].append(need)
    for device, needs in there.items():
        assert sum(need.memory for need in needs) <= device.memory
        assert len(needs) < 2 or all(need.shared for need in needs)


def _fits(capacity: Capacity, held: dict[str, Need], need: Need) -> bool:
    used = {
        device: [n for h, n in held.items() if device in (capacity.claim(h, n) or ())] for device in MACHINE.devices
    }
    free = [
        device
        for device, needs in used.items()
        if device.kind.startswith(need.kind)
        and (not needs or (need.shared and all(other.shared for other in needs)))
        and sum(other.memory for other in needs) + need.memory <= device.memory
    ]
    return len(free) >= need.count


def test_cores_are_shares() -> None:
    capacity = Capacity(MACHINE, lambda _: None)
    seen = []
    for holder in "abcdefghij":
        assert capacity.claim(holder, Need(HOST, 1, 1, shared=True))
        seen.append(capacity.threads("share"))
    assert seen == [4, 4, 2, 2, 1, 1, 1, 1, 1, 1]
    assert capacity.threads(3) == 3
    assert capacity.threads("all") == 8


def test_jobs_wait_in_line_and_say_why(new_server: Callable[..., Server], model_files: Path) -> None:
    """Four workers fit into the memory of this machine: the fifth and sixth job wait, and start in this order."""
    server = new_server(FOR_FOUR)
    server.add_model("tiny", model_files)
    for number in range(3):
        assert server.create_job(f"job-{number}").json()["state"] == "JOB_STATE_RUNNING"
    server.create_deployment("served")
    waiting = server.create_job("job-4").json()
    assert waiting["state"] == "JOB_STATE_PENDING"
    assert "number 1 in line" in waiting["statusMessage"]
    assert "0.5 GiB of memory, and 0.0 GiB of 2.0 GiB are free" in waiting["statusMessage"]
    assert "number 2 in line" in server.create_job("job-5").json()["statusMessage"]
    refused = server.ask("POST", "/training/v1/rlorTrainerJobs/local/job-4/api/v1/forward", json={})
    assert "in line" in refused.json()["error"]["message"]

    server.stop(signal.SIGKILL)
    server.start()
    assert "number 1 in line" in server.own("GET", "rlorTrainerJobs/job-4").json()["statusMessage"]
    assert server.own("DELETE", "rlorTrainerJobs/job-0").json() == {}
    wait_for(lambda: server.state("job-4") == "JOB_STATE_RUNNING")
    assert "number 1 in line" in server.own("GET", "rlorTrainerJobs/job-5").json()["statusMessage"]
    os.kill(server.trainer("job-1")["pid"], signal.SIGKILL)
    wait_for(lambda: server.state("job-5") == "JOB_STATE_RUNNING")

    assert server.create_job("job-6").json()["state"] == "JOB_STATE_PENDING"
    assert server.own("POST", "rlorTrainerJobs/job-6:cancel").json()["state"] == "JOB_STATE_CANCELLED"
    assert server.own("POST", "rlorTrainerJobs/job-6:resume").json()["state"] == "JOB_STATE_PENDING"
    assert server.own("DELETE", "rlorTrainerJobs/job-6").json() == {}
    assert server.state("job-6") == "JOB_STATE_DELETED"


def test_replica_that_does_not_fit_waits_too(new_server: Callable[..., Server], model_files: Path) -> None:
    server = new_server([4, ["CPU", GIB + 2**20]])
    server.add_model("tiny", model_files)
    server.create_job("first")
    two = {"minReplicaCount": 2, "maxReplicaCount": 2}
    server.create_deployment("served")
    grown = server.own("PATCH", "deployments/served", json=two).json()
    assert grown["state"] == "UPDATING"
    assert "number 1 in line" in grown["statusMessage"]
    server.own("DELETE", "rlorTrainerJobs/first")
    wait_for(lambda: server.own("GET", "deployments/served").json()["state"] == "READY")
    assert len(server.workers()) == 2


def test_two_jobs_never_share_a_gpu(new_server: Callable[..., Server], model_files: Path) -> None:
    gpus: list[Any] = [4, ["CPU", GIB], ["NVIDIA_H100_80GB", 80 * GIB, "0"], ["NVIDIA_H100_80GB", 80 * GIB, "1"]]
    server = new_server(gpus)
    server.add_model("tiny", model_files)
    first, second = (
        server.create_job("first", "tiny-gpu1").json(),
        server.create_job("second", "", acceleratorType="NVIDIA_H100_80GB").json(),
    )
    assert (first["state"], second["state"]) == ("JOB_STATE_RUNNING", "JOB_STATE_RUNNING")
    assert second["trainingShape"] == "accounts/local/trainingShapes/tiny-gpu1/versions/1"
    assert sorted(server.trainer(job)["devices"] for job in ("first", "second")) == ["0", "1"]
    third = server.create_job("third", "tiny-gpu1").json()
    assert third["state"] == "JOB_STATE_PENDING"
    assert "1 NVIDIA, and 0 of 2 are free" in third["statusMessage"]
    assert server.create_job("plain").json()["state"] == "JOB_STATE_RUNNING", "it waits for nothing that is taken"
    assert server.trainer("plain")["devices"] == ""
    all_of_them = server.create_job("big", "tiny-gpus").json()
    assert "number 2 in line" in all_of_them["statusMessage"]

    server.stop(signal.SIGKILL)
    server.start()
    assert server.state("third") == "JOB_STATE_PENDING", "the workers that lived on still have their GPUs"
    freed = server.trainer("first")["devices"]
    server.own("DELETE", "rlorTrainerJobs/first")
    wait_for(lambda: server.state("third") == "JOB_STATE_RUNNING")
    assert server.trainer("third")["devices"] == freed


def test_what_can_never_fit_is_refused_at_once(new_server: Callable[..., Server], model_files: Path) -> None:
    server = new_server([4, ["CPU", GIB // 4]])
    server.add_model("tiny", model_files)
    refused = server.create_job("large")
    assert refused.status_code == 400
    why = "needs 0.5 GiB of memory, and this server may use 0.2 GiB"
    assert why in refused.json()["error"]["message"]
    selected = server.create_job("large", "").json()["error"]["message"]
    assert f"has no shape for POLICY_TRAINER on this server. 'tiny-cpu' {why}" in selected


def test_job_whose_shape_is_gone_does_not_wait_for_ever(new_server: Callable[..., Server], model_files: Path) -> None:
    server = new_server([4, ["CPU", GIB // 2 + 2**20]])
    server.stop()
    own = server.data / "shapes" / "own.yaml"
    own.parent.mkdir()
    text = "id: own\naccelerator_type: CPU\nmax_context_length: 64\nthreads: 1\ndtype: float32\n"
    own.write_text(text)
    server.start()
    server.add_model("tiny", model_files)
    assert server.create_job("runs", "tiny-own").json()["state"] == "JOB_STATE_RUNNING"
    assert server.create_job("waits", "tiny-own").json()["state"] == "JOB_STATE_PENDING"
    server.stop(signal.SIGKILL)
    own.unlink()
    server.start()
    wait_for(lambda: server.state("waits") == "JOB_STATE_FAILED")
    assert "tiny-own" in server.own("GET", "rlorTrainerJobs/waits").json()["statusMessage"]
    assert server.trainer("runs")["path"] == "/api/v1/echo"
    refused = server.own("POST", "rlorTrainerJobs/waits:resume")
    assert (refused.status_code, "tiny-own" in refused.json()["error"]["message"]) == (404, True)
