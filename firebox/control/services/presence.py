"""Who was heard of when, and which training runs are in memory where. In memory itself: a new server starts afresh.

Whatever may fall idle is here under its resource name: sessions, and the pooled jobs and deployments that serve them.
Knows no deadline of its own and stops nothing. Invariant: a run is loaded in at most one place, and a run that is
touched under its pool's lock is not parked before it was used.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from typing import NamedTuple

from firebox.control.tables.models import ModelRow
from firebox.wire.worker import SnapshotRef, WorkerAddress


class Place(NamedTuple):
    """One process of a pooled job: the job's id and resource name, the process and where it listens."""

    job: str
    job_name: str
    worker: str
    address: WorkerAddress


class Sampled(NamedTuple):
    """What a sampler stands for: a base model, and its snapshot unless it is the base model itself."""

    model: ModelRow
    snapshot: SnapshotRef | None


class Presence:
    """`idle_s` is how long a name may go unheard, unless it was first heard of with another number of seconds."""

    def __init__(self, idle_s: float) -> None:
        self.grown = asyncio.Event()
        """Set whenever a name is added, for who waits for the first to fall idle."""
        self._idle_s = idle_s
        self._allowed: dict[str, float] = {}
        self._seen: dict[str, float] = {}
        self._loaded: dict[str, Place] = {}
        self.sampled: dict[str, Sampled] = {}
        """By sampler name; never out of date, because samplers do not change."""
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    def touch(self, name: str, idle_s: float | None = None) -> None:
        """`name` is in use right now."""
        if name not in self._seen:
            self._allowed[name] = self._idle_s if idle_s is None else idle_s
            self.grown.set()
        self._seen[name] = time.monotonic()

    def renew(self, name: str) -> None:
        """`name` is in use right now, if anyone watches it."""
        if name in self._seen:
            self.touch(name)

    def knows(self, name: str) -> bool:
        return name in self._seen

    def forget(self, name: str) -> None:
        self._seen.pop(name, None)
        self._allowed.pop(name, None)

    def idle_names(self) -> list[str]:
        """What was not touched for as long as it may be."""
        now = time.monotonic()
        return [name for name, seen in self._seen.items() if seen + self._allowed[name] <= now]

    def first_idle_in(self) -> float | None:
        """Seconds until some name will have been untouched for as long as it may be; None when there is none."""
        ends = [seen + self._allowed[name] for name, seen in self._seen.items()]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def lock(self, pool: str) -> asyncio.Lock:
        """Held by whoever starts the pooled job or deployment `pool`, or changes which runs it holds."""
        return self._locks[pool]

    def place(self, run: str) -> Place | None:
        return self._loaded.get(run)

    def load(self, run: str, place: Place) -> None:
        self._loaded[run] = place

    def unload(self, run: str) -> None:
        self._loaded.pop(run, None)

    def loaded_in(self, address: WorkerAddress) -> list[str]:
        """The runs in the process at `address`."""
        return [run for run, place in self._loaded.items() if place.address == address]
