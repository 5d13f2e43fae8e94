"""Which workers serve which resource right now. In memory, written by reconcile, read on every proxied request.

Invariant: an address is listed only while its worker is ready and running.
"""

from __future__ import annotations

from collections.abc import Sequence

from firebox.wire.worker import WorkerAddress


class Fleet:
    """Addresses by resource name, in the order of their replicas."""

    def __init__(self) -> None:
        self._serving: dict[str, tuple[WorkerAddress, ...]] = {}
        self._applied: dict[str, int] = {}

    def publish(self, name: str, addresses: Sequence[WorkerAddress]) -> None:
        """Replace the addresses of `name`; none takes it out of service."""
        if addresses:
            self._serving[name] = tuple(addresses)
        else:
            self._serving.pop(name, None)
            self._applied.pop(name, None)

    def record_applied(self, name: str, sequence: int) -> None:
        """Every replica of `name` has answered hot-load number `sequence`, whether it loaded or refused it."""
        self._applied[name] = sequence

    def applied(self, name: str) -> int:
        return self._applied.get(name, 0)

    def all(self, name: str) -> Sequence[WorkerAddress]:
        return self._serving.get(name, ())

    def first(self, name: str) -> WorkerAddress | None:
        """The address of what is served by one worker, or None when nothing serves it."""
        return next(iter(self.all(name)), None)
