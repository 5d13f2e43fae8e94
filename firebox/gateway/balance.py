"""Which replica gets a request.

Prompts that begin alike go to the same replica, which may have computed that beginning already, unless it has clearly
more to do than the others. Knows addresses and how many requests each has now, not what they are. Runs on one event
loop.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final

from firebox.wire.worker import WorkerAddress

_SLACK: Final = 1.25
"""A replica may have this many times its fair share before requests that belong to it go elsewhere."""


class Balance:
    def __init__(self) -> None:
        self._busy: Counter[WorkerAddress] = Counter()

    def order(self, replicas: Sequence[WorkerAddress], prefix: bytes) -> list[WorkerAddress]:
        """`replicas` with the one to ask first in front, then those to ask when it is gone.

        Each prefix ranks the replicas in an order of its own (rendezvous hashing), so one that comes or goes moves
        only the prefixes that are its own.
        """
        ranked = sorted(replicas, key=lambda replica: _weight(replica, prefix))
        limit = math.ceil(_SLACK * (1 + sum(self._busy[replica] for replica in replicas)) / len(replicas))
        return sorted(ranked, key=lambda replica: self._busy[replica] >= limit)

    @contextlib.contextmanager
    def busy(self, replica: WorkerAddress) -> Iterator[None]:
        """Inside the block, `replica` has one request more."""
        self._busy[replica] += 1
        try:
            yield
        finally:
            self._busy[replica] -= 1
            if not self._busy[replica]:
                del self._busy[replica]


def _weight(replica: WorkerAddress, prefix: bytes) -> bytes:
    return hashlib.blake2b(replica.socket.encode() + b"\0" + prefix, digest_size=8).digest()
