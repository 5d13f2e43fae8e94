"""Workers as processes of this machine, each in a process group of its own, reached through a unix socket.

Owns pids, sockets, spec files and log redirection; knows nothing about what a worker serves. Invariant: a worker
this launcher started or adopted is either running or has `ended` set, and its files in the run folder go with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import tempfile
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Final

import msgspec

from firebox.launch.api import Worker, WorkerPlan
from firebox.launch.child import FIREBOX
from firebox.wire.worker import ComputeMode, ReadyNotice, WorkerAddress, WorkerRuntime

START_WITHIN_S: Final = 600.0
STOP_WITHIN_S: Final = 6.0
_MAX_SOCKET_PATH: Final = 100


class _Mark(msgspec.Struct, frozen=True):
    """Beside the spec file: which process a worker is, told apart from a later one with the same pid."""

    pid: int
    started: str


class _SpecFile(msgspec.Struct, frozen=True):
    """The part of a spec file that is needed to reach the worker again."""

    runtime: WorkerRuntime


class LocalWorker:
    """One process group. `changed` is called when it becomes ready and when it ends."""

    def __init__(self, ident: str, runtime: WorkerRuntime, pid: int, changed: Callable[[], None]) -> None:
        self.ident = ident
        self.address = WorkerAddress(runtime.socket, runtime.token)
        self.devices = runtime.devices
        self.pid = pid
        self.ready = False
        self.ended: str | None = None
        self.gone = asyncio.Event()
        self._changed = changed
        self._kill: asyncio.TimerHandle | None = None

    def become_ready(self) -> None:
        self.ready = True
        self._changed()

    def fail(self, reason: str) -> None:
        """End the process for `reason`, which is kept as the way it ended."""
        self.ended = self.ended or reason
        _signal_group(self.pid, signal.SIGKILL)

    def finish(self, reason: str) -> None:
        """The process is gone: record how, take what is left of its group with it, wake everyone."""
        if self._kill is not None:
            self._kill.cancel()
        _signal_group(self.pid, signal.SIGKILL)
        self.ready = False
        self.ended = self.ended or reason
        self.gone.set()
        self._changed()

    def stop(self) -> None:
        if self._kill is None and self.ended is None:
            _signal_group(self.pid, signal.SIGTERM)
            loop = asyncio.get_running_loop()
            self._kill = loop.call_later(STOP_WITHIN_S, _signal_group, self.pid, signal.SIGKILL)


class LocalLauncher:
    """Starts `command <kind> --spec <file>` below `run_dir` (0700); `lease` is the lock file the workers watch."""

    def __init__(
        self,
        run_dir: Path,
        lease: Path,
        *,
        command: Sequence[str] = FIREBOX,
        orphan_grace_s: float = 8.0,
        mode: ComputeMode = "exact",
    ) -> None:
        self._command = command
        self._run_dir = run_dir
        self._lease = lease
        self._grace_s = orphan_grace_s
        self._mode = mode
        self._workers: dict[str, LocalWorker] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)

    async def start(self, plan: WorkerPlan, changed: Callable[[], None]) -> Worker:
        read_fd, write_fd = os.pipe()
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, read_fd)
            undo.callback(self._forget, plan.ident)
            runtime = self._runtime(plan, write_fd)
            spec = self._run_dir / f"{plan.ident}.json"
            try:
                _write_private(spec, msgspec.json.encode(plan.spec(runtime)))
                process = await _spawn([*self._command, plan.kind, "--spec", str(spec)], plan, write_fd)
            finally:
                os.close(write_fd)
            undo.pop_all()
        mark = _Mark(process.pid, started_at(process.pid) or "")
        _write_private(self._run_dir / f"{plan.ident}.pid", msgspec.json.encode(mark))
        worker = LocalWorker(plan.ident, runtime, process.pid, changed)
        self._workers[plan.ident] = worker
        self._follow(self._until_ready(worker, read_fd))
        self._follow(self._until_gone(worker, process))
        return worker

    def adopt(self, ident: str, changed: Callable[[], None]) -> Worker | None:
        """Take a worker back; needs a death event for a process that is not a child (Linux), else None."""
        mark = self._mark(ident)
        spec = self._run_dir / f"{ident}.json"
        if mark is None or not _is_running(mark) or not hasattr(os, "pidfd_open") or not spec.exists():
            return None
        try:
            pidfd = os.pidfd_open(mark.pid)
        except ProcessLookupError:
            return None
        runtime = msgspec.json.decode(spec.read_bytes(), type=_SpecFile).runtime
        worker = LocalWorker(ident, runtime, mark.pid, changed)
        worker.ready = True
        self._workers[ident] = worker
        loop = asyncio.get_running_loop()

        def gone() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._end(worker, "the process ended")

        loop.add_reader(pidfd, gone)
        return worker

    def sweep(self) -> None:
        # The spec comes first: a server killed right after it has left one without a mark. A process that was started
        # in between finds nobody to report its readiness to, and ends.
        for ident in {path.stem for path in self._run_dir.iterdir()} - self._workers.keys():
            mark = self._mark(ident)
            if mark is not None and _is_running(mark):
                _signal_group(mark.pid, signal.SIGKILL)
            self._forget(ident)

    async def close(self) -> None:
        waiting = list(self._workers.values())
        for worker in waiting:
            worker.stop()
        await asyncio.gather(*(worker.gone.wait() for worker in waiting))
        await asyncio.gather(*self._tasks)

    async def _until_ready(self, worker: LocalWorker, read_fd: int) -> None:
        try:
            line = await asyncio.wait_for(_read_line(read_fd), START_WITHIN_S)
        except TimeoutError:
            worker.fail(f"not ready within {START_WITHIN_S:.0f} s")
            return
        if not line:
            return  # it ended without a word: `_until_gone` tells how
        notice = msgspec.json.decode(line, type=ReadyNotice)
        if notice.ready:
            worker.become_ready()
        else:
            worker.fail(notice.error)

    async def _until_gone(self, worker: LocalWorker, process: asyncio.subprocess.Process) -> None:
        code = await process.wait()
        self._end(worker, f"ended by signal {-code}" if code < 0 else f"ended with status {code}")

    def _end(self, worker: LocalWorker, reason: str) -> None:
        self._workers.pop(worker.ident, None)
        self._forget(worker.ident)
        worker.finish(reason)

    def _follow(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _runtime(self, plan: WorkerPlan, ready_fd: int) -> WorkerRuntime:
        return WorkerRuntime(
            socket=self._socket_path(plan.ident),
            token=secrets.token_hex(24),
            lease=str(self._lease),
            orphan_grace_s=self._grace_s,
            ready_fd=ready_fd,
            threads=plan.threads,
            devices=list(plan.devices),
            mode=self._mode,
        )

    def _socket_path(self, ident: str) -> str:
        path = str(self._run_dir / f"{ident}.sock")
        if len(path) < _MAX_SOCKET_PATH:
            return path
        return str(Path(tempfile.mkdtemp(prefix="firebox-")) / f"{ident}.sock")

    def _mark(self, ident: str) -> _Mark | None:
        with contextlib.suppress(FileNotFoundError):
            return msgspec.json.decode((self._run_dir / f"{ident}.pid").read_bytes(), type=_Mark)
        return None

    def _forget(self, ident: str) -> None:
        spec = self._run_dir / f"{ident}.json"
        if spec.exists():
            socket = Path(msgspec.json.decode(spec.read_bytes(), type=_SpecFile).runtime.socket)
            socket.unlink(missing_ok=True)
            if socket.parent != self._run_dir:
                socket.parent.rmdir()
        for path in (spec, self._run_dir / f"{ident}.pid"):
            path.unlink(missing_ok=True)


def started_at(pid: int) -> str | None:
    """A text that two processes with the same pid do not share, or None when no such process runs."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else fields[18]


def _is_running(mark: _Mark) -> bool:
    return started_at(mark.pid) == mark.started


async def _spawn(command: Sequence[str], plan: WorkerPlan, ready_fd: int) -> asyncio.subprocess.Process:
    plan.log.parent.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(plan.threads),
        "MKL_NUM_THREADS": str(plan.threads),
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": ",".join(plan.devices),  # empty hides them all: a CPU worker leaves them to others
    }
    with plan.log.open("ab") as log:
        return await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
            pass_fds=(ready_fd,),
        )


async def _read_line(read_fd: int) -> bytes:
    """The first line written to the pipe; empty when its writers close it without one."""
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(read_fd, "rb")
    )
    try:
        return await reader.readline()
    finally:
        transport.close()


def _write_private(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(content)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)
