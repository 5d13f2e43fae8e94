"""Workers as real processes: ready, refused, killed, stubborn, orphaned, adopted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from firebox.launch import local
from firebox.launch.api import WorkerPlan
from firebox.launch.child import run_child
from firebox.launch.lease import ServerLock
from firebox.launch.local import LocalLauncher, LocalWorker
from firebox.launch.probe import ask
from firebox.wire.errors import FailedPrecondition, Internal, Unavailable
from firebox.wire.worker import WORKER_TOKEN_HEADER, TrainerSpec, WorkerRuntime

WORKER = [sys.executable, str(Path(__file__).with_name("worker_app.py"))]


def plan(directory: Path, name: str = "job") -> WorkerPlan:
    def spec(runtime: WorkerRuntime) -> TrainerSpec:
        return TrainerSpec(
            job=f"accounts/local/rlorTrainerJobs/{name}",
            base_model="accounts/local/models/tiny",
            model_dir="",
            job_dir="",
            jobs_dir="",
            max_context_length=8,
            runtime=runtime,
        )

    return WorkerPlan(ident=f"t-{name}", kind="trainer", log=directory / "log", threads=1, spec=spec)


def launched(tmp_path: Path, name: str = "job", run_dir: Path | None = None) -> tuple[LocalLauncher, WorkerPlan]:
    launcher = LocalLauncher(run_dir or tmp_path / "run", tmp_path / "server.lock", command=WORKER)
    return launcher, plan(tmp_path, name)


async def until(changed: asyncio.Event, holds: Callable[[], bool], within_s: float = 20.0) -> None:
    async with asyncio.timeout(within_s):
        while not holds():
            changed.clear()
            await changed.wait()


@pytest.fixture
def lock(tmp_path: Path):  # type: ignore[no-untyped-def]
    held = ServerLock(tmp_path / "server.lock")
    yield held
    held.release()


def test_worker_serves_its_token_only_and_leaves_nothing_behind(tmp_path: Path, lock: ServerLock) -> None:
    async def scenario() -> None:
        launcher, wanted = launched(tmp_path)
        changed = asyncio.Event()
        worker = await launcher.start(wanted, changed.set)
        await until(changed, lambda: worker.ready)
        assert json.loads(await ask(worker.address, "GET", "/api/v1/healthz", None, timeout_s=5)) == {"status": "ok"}
        async with httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=worker.address.socket)) as stranger:
            refused = await stranger.get("http://worker/api/v1/healthz")
        assert (refused.status_code, refused.json()["error"]["code"]) == (401, 16)
        run = tmp_path / "run"
        modes = {path.name: path.stat().st_mode & 0o777 for path in (run, *run.iterdir())}
        assert modes == {"run": 0o700, "t-job.json": 0o600, "t-job.pid": 0o600, "t-job.sock": 0o700}
        begun = time.monotonic()
        await launcher.close()
        assert time.monotonic() - begun < 5
        assert worker.ended is not None
        assert list(run.iterdir()) == []
        assert "worker is starting" in (tmp_path / "log").read_text()

    asyncio.run(scenario())


def test_the_mode_reaches_every_worker(tmp_path: Path, lock: ServerLock) -> None:
    async def scenario() -> None:
        launcher = LocalLauncher(tmp_path / "run", tmp_path / "server.lock", command=WORKER, mode="bitwise")
        changed = asyncio.Event()
        worker = await launcher.start(plan(tmp_path), changed.set)
        await until(changed, lambda: worker.ready)
        assert json.loads((tmp_path / "run" / "t-job.json").read_text())["runtime"]["mode"] == "bitwise"
        await launcher.close()

    asyncio.run(scenario())


def test_idle_connection_stays_open(tmp_path: Path, lock: ServerLock) -> None:
    """Clients keep a connection for 5 s or so; a worker that closed first would meet their next request half way."""

    async def scenario() -> None:
        launcher, wanted = launched(tmp_path)
        changed = asyncio.Event()
        worker = await launcher.start(wanted, changed.set)
        await until(changed, lambda: worker.ready)
        reader, writer = await asyncio.open_unix_connection(worker.address.socket)
        request = (
            f"GET /api/v1/healthz HTTP/1.1\r\nHost: worker\r\n{WORKER_TOKEN_HEADER}: {worker.address.token}\r\n\r\n"
        )
        for pause_s in (6, 0):
            writer.write(request.encode())
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await reader.read(100)
            await asyncio.sleep(pause_s)
        writer.close()
        await launcher.close()

    asyncio.run(scenario())


def test_build_error_reaches_the_server_in_one_line(tmp_path: Path, lock: ServerLock) -> None:
    async def scenario() -> None:
        launcher, wanted = launched(tmp_path, "broken")
        changed = asyncio.Event()
        worker = await launcher.start(wanted, changed.set)
        await until(changed, lambda: worker.ended is not None)
        assert worker.ended == "the weights are not there"
        assert not worker.ready
        assert "Traceback" in (tmp_path / "log").read_text()
        await launcher.close()

    asyncio.run(scenario())


def test_death_is_noticed_at_once(tmp_path: Path, lock: ServerLock) -> None:
    async def scenario() -> None:
        launcher, wanted = launched(tmp_path)
        changed = asyncio.Event()
        worker = await launcher.start(wanted, changed.set)
        await until(changed, lambda: worker.ready)
        assert isinstance(worker, LocalWorker)
        os.kill(worker.pid, signal.SIGKILL)
        await until(changed, lambda: worker.ended is not None, within_s=2)
        assert worker.ended == "ended by signal 9"
        await launcher.close()

    asyncio.run(scenario())


def test_stubborn_worker_is_killed_after_the_deadline(
    tmp_path: Path, lock: ServerLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "STOP_WITHIN_S", 1.0)

    async def scenario() -> None:
        launcher, wanted = launched(tmp_path, "stubborn")
        changed = asyncio.Event()
        worker = await launcher.start(wanted, changed.set)
        await until(changed, lambda: worker.ready)
        worker.stop()
        await until(changed, lambda: worker.ended is not None, within_s=5)
        assert worker.ended == "ended by signal 9"
        await launcher.close()

    asyncio.run(scenario())


def test_silent_worker_misses_its_deadline(tmp_path: Path, lock: ServerLock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "START_WITHIN_S", 0.5)

    async def scenario() -> None:
        silent = [sys.executable, "-c", "import time; time.sleep(60)"]
        launcher = LocalLauncher(tmp_path / "run", tmp_path / "server.lock", command=silent)
        changed = asyncio.Event()
        worker = await launcher.start(plan(tmp_path), changed.set)
        await until(changed, lambda: worker.gone.is_set())  # type: ignore[attr-defined]
        assert worker.ended == "not ready within 0 s"
        await launcher.close()

    asyncio.run(scenario())


def test_long_directory_gets_a_short_private_socket(tmp_path: Path, lock: ServerLock) -> None:
    async def scenario() -> None:
        launcher, wanted = launched(tmp_path, run_dir=tmp_path / ("x" * 100))
        changed = asyncio.Event()
        worker = await launcher.start(wanted, changed.set)
        await until(changed, lambda: worker.ready)
        folder = Path(worker.address.socket).parent
        assert len(worker.address.socket) < 100
        assert folder.stat().st_mode & 0o777 == 0o700
        await launcher.close()
        assert not folder.exists()

    asyncio.run(scenario())


def test_second_server_is_refused_with_the_fix(tmp_path: Path, lock: ServerLock) -> None:
    with pytest.raises(FailedPrecondition, match="another Firebox server"):
        ServerLock(tmp_path / "server.lock")


SERVER = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_launch import launched
from firebox.launch.lease import ServerLock

async def main():
    home = Path(sys.argv[1])
    lock = ServerLock(home / "server.lock")
    launcher, wanted = launched(home)
    ready = asyncio.Event()
    worker = await launcher.start(wanted, ready.set)
    await ready.wait()
    print(worker.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


def start_server(tmp_path: Path) -> tuple[subprocess.Popen[str], int]:
    arguments = [sys.executable, "-c", SERVER, str(tmp_path), str(Path(__file__).parent)]
    server = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, int(server.stdout.readline())


def kill(server: subprocess.Popen[str]) -> None:
    server.kill()
    server.wait()


def test_no_worker_survives_its_server_by_ten_seconds(tmp_path: Path) -> None:
    server, worker = start_server(tmp_path)
    kill(server)
    begun = time.monotonic()
    assert local.started_at(worker) is not None
    while local.started_at(worker) is not None and time.monotonic() - begun < 15:
        time.sleep(0.05)
    survived = time.monotonic() - begun
    print(f"the worker survived its server by {survived:.1f} s")
    assert 6 < survived < 10


def test_restarted_server_takes_its_worker_back(tmp_path: Path) -> None:
    server, pid = start_server(tmp_path)
    kill(server)
    lock = ServerLock(tmp_path / "server.lock")

    async def scenario() -> None:
        launcher, _ = launched(tmp_path)
        changed = asyncio.Event()
        worker = launcher.adopt("t-job", changed.set)
        assert worker is not None
        launcher.sweep()
        await asyncio.sleep(9)  # longer than the grace: the new server's lock is the lease now
        assert json.loads(await ask(worker.address, "GET", "/api/v1/healthz", None, timeout_s=5)) == {"status": "ok"}
        os.kill(pid, signal.SIGKILL)
        await until(changed, lambda: worker.ended is not None, within_s=2)
        assert launcher.adopt("t-job", changed.set) is None

    asyncio.run(scenario())
    lock.release()


def test_worker_that_nobody_adopts_is_killed(tmp_path: Path) -> None:
    server, pid = start_server(tmp_path)
    kill(server)
    lock = ServerLock(tmp_path / "server.lock")
    launcher, _ = launched(tmp_path)
    launcher.sweep()
    deadline = time.monotonic() + 2
    while local.started_at(pid) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert list((tmp_path / "run").iterdir()) == []
    lock.release()


def test_reused_pid_is_left_alone(tmp_path: Path, lock: ServerLock) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "t-old.pid").write_text(json.dumps({"pid": os.getpid(), "started": "1"}))
    launcher, _ = launched(tmp_path)
    assert launcher.adopt("t-old", lambda: None) is None
    launcher.sweep()  # this very process would be the victim
    assert list(run.iterdir()) == []


def test_child_answers_fails_or_is_cut_off() -> None:
    with pytest.raises(Internal, match="gave no answer"):
        asyncio.run(run_child(["no-such-command"], b"", 30))
    with pytest.raises(Unavailable, match="did not finish"):
        asyncio.run(run_child(["--help"], b"", 0.001))
    assert b"Usage" in asyncio.run(run_child(["--help"], b"", 30))
