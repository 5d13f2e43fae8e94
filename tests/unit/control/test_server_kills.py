"""The server killed with -9 again and again, at any moment of what its clients do: what it said is done stays done."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from control_harness import SERVED, ForkedServer  # type: ignore[import-not-found]
from proofs import Record, count

from firebox.weights.manifest import SnapshotManifest, committed_dir, seal

SNAPSHOTS = ("one", "two", "three")
CLIENTS = 4
ORPHANS_GONE_WITHIN_S = 10
BAD = (
    "acknowledged and lost",
    "orphans beside the running server",
    "orphans 10 s after the last kill",
    "leaked ports",
)


@dataclass
class Known:
    """What a client may rely on about one resource: `certain` is False while an answer is missing."""

    collection: str
    ident: str
    there: bool = False
    certain: bool = False
    loaded: set[str | None] = field(default_factory=lambda: {None})


class Client:
    """Creates, deletes, promotes and hot-loads at random, and keeps what was acknowledged."""

    def __init__(self, server: ForkedServer, number: int) -> None:
        self._server, self._number = server, number
        self._random = random.Random(number)
        self._made = 0
        self.known: list[Known] = []
        self.acknowledged: Counter[str] = Counter()

    def run(self, stop: threading.Event) -> None:
        with httpx.Client(base_url=self._server.url, headers={"X-Api-Key": self._server.key}, timeout=20) as http:
            while not stop.is_set():
                with contextlib.suppress(httpx.TransportError):
                    self._act(http)

    def _act(self, http: httpx.Client) -> None:
        there = [known for known in self.known if known.there and known.certain]
        workers = [known for known in there if known.collection != "models"]
        if len(workers) >= 2 or (there and self._random.random() < 0.2):
            deployments = [known for known in there if known.collection == "deployments"]
            if deployments and self._random.random() < 0.6:
                self._hot_load(http, self._random.choice(deployments))
            else:
                self._delete(http, self._random.choice(there))
        else:
            self._create(http, self._random.choice(["rlorTrainerJobs", "deployments", "models"]))

    def _create(self, http: httpx.Client, collection: str) -> None:
        self._made += 1
        known = Known(collection, f"c{self._number}-{self._made}")
        self.known.append(known)
        base = {"baseModel": "accounts/local/models/tiny"}
        source = "accounts/local/rlorTrainerJobs/source"
        if collection == "models":
            path, params = f"checkpoints/{SNAPSHOTS[0]}:promote", {}
            body: dict[str, Any] = {
                "output_model": f"accounts/local/models/{known.ident}",
                "trainer_job_id": source,
                "base_model": base["baseModel"],
            }
        elif collection == "deployments":
            path, params = collection, {"deploymentId": known.ident}
            body = base | {"enableHotLoad": True, "hotLoadTrainerJob": source}
        else:
            path, params = collection, {"rlorTrainerJobId": known.ident}
            body = {"trainingConfig": base}
        answer = http.post(f"/v1/accounts/local/{path}", params=params, json=body)
        if self._accepted(answer, f"create {collection}"):
            known.there = known.certain = True

    def _delete(self, http: httpx.Client, known: Known) -> None:
        known.certain = False
        answer = http.delete(f"/v1/accounts/local/{known.collection}/{known.ident}")
        known.certain = True
        if self._accepted(answer, f"delete {known.collection}"):
            known.there = False

    def _hot_load(self, http: httpx.Client, known: Known) -> None:
        identity = self._random.choice(SNAPSHOTS)
        before = set(known.loaded)
        known.loaded.add(identity)
        answer = http.post(
            "/hot_load/v1/models/hot_load",
            headers={"fireworks-deployment": f"accounts/local/deployments/{known.ident}"},
            json={"identity": identity},
        )
        known.loaded = {identity} if self._accepted(answer, "hot-load") else before

    def _accepted(self, answer: httpx.Response, what: str) -> bool:
        assert answer.status_code < 500, f"{what}: {answer.status_code} {answer.text}"
        self.acknowledged[what] += answer.is_success
        return answer.is_success


def lost(server: ForkedServer, clients: list[Client]) -> list[str]:
    """What was acknowledged and is not so; what was never answered is looked up, and counts from now on."""
    states: dict[str, dict[str, str]] = {}
    for collection in ("rlorTrainerJobs", "deployments", "models"):
        listed = server.own("GET", collection).json()[collection]
        states[collection] = {row["name"].rpartition("/")[2]: row["state"] for row in listed}
    wrong = []
    for known in (known for client in clients for known in client.known):
        state = states[known.collection].get(known.ident)
        there = state is not None
        if known.certain and known.there != there:
            wrong.append(f"{known.collection}/{known.ident}: {'lost' if known.there else 'is back'}")
        # A promotion or a deletion that was not answered goes on in the next server, and may still be under way.
        under_way = known.collection == "models" if state is None else state.endswith("DELETING")
        known.there, known.certain = there, known.certain or not under_way
        if known.there and known.collection == "deployments":
            wrong += wrongly_loaded(server, known)
    return wrong


def wrongly_loaded(server: ForkedServer, known: Known) -> Iterator[str]:
    header = {"fireworks-deployment": f"accounts/local/deployments/{known.ident}"}
    replicas = server.ask("GET", "/hot_load/v1/models/hot_load", headers=header).json()["replicas"]
    loaded = {replica["current_snapshot_identity"] for replica in replicas}
    if len(loaded) != 1 or not loaded <= known.loaded:
        yield f"{known.ident}: serves {loaded}, should be one of {known.loaded}"
    known.loaded = loaded


def workers_of(server: ForkedServer) -> set[int]:
    """Every process that this server, or one before it on the same data, has started; zombies do not count."""
    found = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(SERVED) == str(server.data) and process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found


def strays(server: ForkedServer) -> set[int]:
    """Processes that the running server does not know of."""
    children = psutil.Process(server.fork.pid).children(recursive=True)
    return workers_of(server) - {child.pid for child in children} - set(server.workers())


def wait_for_none(find: Callable[[], set[int]]) -> None:
    deadline = time.monotonic() + ORPHANS_GONE_WITHIN_S
    while find() and time.monotonic() < deadline:
        time.sleep(0.05)


def is_open(url: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(url.rsplit(":", 1)[1]))) == 0


@contextlib.contextmanager
def prepared(folder: Path, model_files: Path) -> Iterator[ForkedServer]:
    """A server with a model and a job that has saved three snapshots."""
    server = ForkedServer(folder / "data")
    server.data.mkdir(parents=True)
    server.start()
    try:
        assert server.add_model("tiny", model_files).status_code == 200
        server.create_job("source")
        for number, identity in enumerate(SNAPSHOTS):
            with committed_dir(server.data / "jobs" / "local" / "source" / "snapshots" / identity) as scratch:
                manifest = SnapshotManifest(
                    identity=identity, kind="base", base_model="accounts/local/models/tiny", dtype="float32",
                    step=number, created_at=f"2026-01-01T00:00:0{number}Z", files=[],
                )  # fmt: skip
                seal(scratch, manifest)
        yield server
    finally:
        server.stop()


def load_until_killed(server: ForkedServer, clients: list[Client], rng: random.Random) -> None:
    """Let the clients work until some number of answers has arrived, and then a moment longer."""

    def answers() -> int:
        return sum(client.acknowledged.total() for client in clients)

    stop, enough, deadline = threading.Event(), answers() + rng.randrange(8), time.monotonic() + 3
    with ThreadPoolExecutor() as pool:
        running = [pool.submit(client.run, stop) for client in clients]
        while answers() < enough and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.3))
        server.stop(9)
        stop.set()
        for client in running:
            client.result(30)


def ordeal(server: ForkedServer, seed: int, kills: int) -> Counter[str]:
    """Kill and restart the server, and count what became of it."""
    rng = random.Random(seed)
    clients = [Client(server, number) for number in range(CLIENTS)]
    counted: Counter[str] = Counter(kills=kills)
    for number in range(kills):
        load_until_killed(server, clients, rng)
        counted["leaked ports"] += is_open(server.url)
        if number % 20 == 3:
            time.sleep(server.orphan_grace_s + 1)  # the server comes back too late for its workers
        server.start()
        wrong = lost(server, clients)
        counted["acknowledged and lost"] += len(wrong)
        print(*wrong, sep="\n", end="")
    wait_for_none(lambda: strays(server))
    counted["orphans beside the running server"] += len(strays(server))
    server.stop(9)
    wait_for_none(lambda: workers_of(server))
    counted["orphans 10 s after the last kill"] += len(workers_of(server))
    for client in clients:
        counted.update({f"acknowledged: {what}": times for what, times in client.acknowledged.items()})
    return counted


@pytest.mark.prove
@pytest.mark.timeout(900)
def test_what_was_acknowledged_survives(tmp_path: Path, model_files: Path, record: Record) -> None:
    lanes = count(1, 4)
    with contextlib.ExitStack() as stack, ThreadPoolExecutor() as pool:
        servers = [stack.enter_context(prepared(tmp_path / str(lane), model_files)) for lane in range(lanes)]
        counts = list(pool.map(ordeal, servers, range(lanes), [count(5, 50)] * lanes))
        logs = "".join((server.data.parent / "up.log").read_text() for server in servers)
    total = sum(counts, Counter())
    for name in sorted({*total, *BAD}):
        record(name, total[name])
    assert not any(total[name] for name in BAD)
    assert "Traceback" not in logs
