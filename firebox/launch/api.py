"""What control may ask of any launcher, wherever its workers run.

Owns the two Protocols. A worker is a process that serves one job or one replica; it reports through its `changed`
callback and is then looked at again, so nobody waits on it. Invariant: once `ended` is set it never changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import msgspec

from firebox.wire.worker import SamplerSpec, TrainerSpec, WorkerAddress, WorkerRuntime

SpecFactory = Callable[[WorkerRuntime], TrainerSpec | SamplerSpec]


class WorkerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A worker to start: `ident` is unique on this server, `log` gets its stdout and stderr, and `devices` are the
    accelerators that it sees, none of them by default."""

    ident: str
    kind: Literal["trainer", "sampler"]
    log: Path
    threads: int
    devices: Sequence[str] = ()
    spec: SpecFactory


class Worker(Protocol):
    """A started worker. `ended` says how it ended, in one line, and is None while it runs."""

    @property
    def ident(self) -> str: ...
    @property
    def address(self) -> WorkerAddress: ...
    @property
    def devices(self) -> Sequence[str]: ...
    @property
    def ready(self) -> bool: ...
    @property
    def ended(self) -> str | None: ...
    def stop(self) -> None:
        """Begin to stop the worker; returns at once, `ended` follows within the launcher's stop deadline."""


class Launcher(Protocol):
    """Starts workers and takes back those that an earlier server left running."""

    async def start(self, plan: WorkerPlan, changed: Callable[[], None]) -> Worker:
        """Start the process; `changed` is called when it is ready and when it has ended."""

    def adopt(self, ident: str, changed: Callable[[], None]) -> Worker | None:
        """The worker `ident` that an earlier server started, or None when it no longer runs."""

    def sweep(self) -> None:
        """Kill what earlier servers left running and nobody adopted, and remove its files."""

    async def close(self) -> None:
        """Stop every worker and return when all have ended."""
