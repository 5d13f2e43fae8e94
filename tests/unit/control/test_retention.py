"""What is kept when the operator limits it: never less than somebody needs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from control_harness import Server  # type: ignore[import-not-found]
from hypothesis import given
from hypothesis import strategies as st

from firebox.control.services.retention import Artifact, Limits, choose
from firebox.weights.manifest import CheckpointManifest, SnapshotManifest, committed_dir, describe, seal

MODEL = "accounts/local/models/tiny"
JOB = Path("/jobs/job")


def state(number: int, job: Path = JOB) -> Artifact:
    return Artifact(job / "checkpoints" / f"s{number}", f"2026-01-01T00:00:{number:02}Z", 10, None)


def snapshot(number: int, parent: int | None = None, job: Path = JOB) -> Artifact:
    folder = job / "snapshots"
    link = None if parent is None else folder / f"n{parent}"
    return Artifact(folder / f"n{number}", f"2026-01-01T00:00:{number:02}Z", 10, link)


def names(artifacts: list[Artifact]) -> list[str]:
    return [artifact.directory.name for artifact in artifacts]


def test_nothing_goes_without_limits() -> None:
    assert choose([state(1), state(2), snapshot(3)], set(), Limits()) == []


def test_newest_of_each_job_and_kind_stay() -> None:
    other = Path("/jobs/other")
    artifacts = [state(1), state(2), state(3), snapshot(4), snapshot(5), state(6, other)]
    assert names(choose(artifacts, set(), Limits(keep_last=1))) == ["s1", "s2", "n4"]
    assert names(choose(artifacts, set(), Limits(keep_last=2))) == ["s1"]


def test_what_is_needed_and_what_it_builds_upon_stay() -> None:
    chain = [snapshot(1), snapshot(2, 1), snapshot(3, 2), snapshot(4), snapshot(5, 4), snapshot(6)]
    needed = {chain[2].directory}
    assert names(choose(chain, needed, Limits(keep_last=1))) == ["n4", "n5"]
    assert names(choose(chain, set(), Limits(disk_bytes=30))) == ["n1", "n2", "n3"]
    assert names(choose(chain, needed, Limits(disk_bytes=1))) == ["n4", "n5"]


@given(
    links=st.lists(st.tuples(st.booleans(), st.integers(0, 2)), max_size=20),
    needed=st.sets(st.integers(0, 19)),
    keep_last=st.none() | st.integers(1, 5),
    disk_bytes=st.none() | st.integers(0, 250),
)
def test_no_limit_breaks_a_chain_or_takes_the_newest(
    links: list[tuple[bool, int]], needed: set[int], keep_last: int | None, disk_bytes: int | None
) -> None:
    artifacts: list[Artifact] = []
    newest: dict[int, int] = {}
    for number, (delta, job) in enumerate(links):
        artifacts.append(snapshot(number, newest.get(job) if delta else None, Path(f"/jobs/{job}")))
        newest[job] = number
    wanted = {artifacts[number].directory for number in needed if number < len(artifacts)}
    gone = choose(artifacts, wanted, Limits(keep_last, disk_bytes))
    left = [a for a in artifacts if a not in gone]
    places = {a.directory for a in left}
    assert wanted <= places
    assert {artifacts[number].directory for number in newest.values()} <= places
    assert all(a.parent is None or a.parent in places for a in left)
    if disk_bytes is not None and sum(a.size for a in left) > disk_bytes:
        stripped = choose(artifacts, wanted, Limits(keep_last=1))
        assert {a.directory for a in stripped} <= {a.directory for a in gone}, "over the budget, with more to take"


def save(folder: Path, name: str, at: int, *, parent: str | None = None) -> None:
    created = f"2026-01-01T00:00:{at:02}Z"
    with committed_dir(folder / name) as scratch:
        (scratch / "weights").write_bytes(bytes(1000))
        about = {"base_model": MODEL, "step": at, "created_at": created, "files": describe(scratch)}
        kind = "delta" if parent else "base"
        manifest = (
            CheckpointManifest(name=name, **about)
            if folder.name == "checkpoints"
            else SnapshotManifest(identity=name, kind=kind, parent=parent, dtype="float32", **about)
        )
        seal(scratch, manifest)


def test_server_keeps_what_it_is_told_to_keep(new_server: Callable[[], Server], model_files: Path) -> None:
    server = new_server()
    server.add_model("tiny", model_files)
    server.create_job("job")
    server.create_deployment("served", hotLoadTrainerJob="accounts/local/rlorTrainerJobs/job")
    folder = server.data / "jobs" / "local" / "job"
    for at, name in enumerate(("one", "two", "three")):
        save(folder / "checkpoints", name, at)
        save(folder / "snapshots", name, at)
    headers = {"fireworks-deployment": "accounts/local/deployments/served"}
    loaded = server.ask("POST", "/hot_load/v1/models/hot_load", headers=headers, json={"identity": "one"})
    assert loaded.status_code == 200
    server.own("PATCH", "deployments/served", json={"minReplicaCount": 0, "maxReplicaCount": 0})
    server.own("DELETE", "rlorTrainerJobs/job")
    server.stop()

    command = [sys.executable, "-m", "firebox", "up", "--port", "0", "--data-dir", str(server.data)]
    options = ["--keep-last", "1", "--log-json", "--allow-host", "firebox.example"]
    with (server.data.parent / "limited.log").open("ab") as log:
        limited = subprocess.Popen([*command, *options], stdout=subprocess.DEVNULL, stderr=log)
    try:
        deadline = time.monotonic() + 30
        while {path.name for path in (folder / "snapshots").iterdir()} != {"one", "three"}:
            assert time.monotonic() < deadline, "the deployment's snapshot and the newest should be left"
            time.sleep(0.05)
        while {path.name for path in (folder / "checkpoints").iterdir()} != {"three"}:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        while not (server.data / "server.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.url = json.loads((server.data / "server.json").read_text())["url"]
        for name, status in (("Firebox.Example", 200), ("another.example", 403)):
            asked = server.ask("GET", "/v1/accounts", headers={"Host": name, "X-Request-ID": f"as-{status}"})
            assert asked.status_code == status
    finally:
        limited.send_signal(signal.SIGTERM)
        limited.wait(20)
    lines = [json.loads(line) for line in (server.data.parent / "limited.log").read_text().splitlines()]
    assert sum("is removed" in line["message"] for line in lines) == 3
    assert {line["request"]: line["status"] for line in lines if "request" in line} == {"as-200": 200, "as-403": 403}
