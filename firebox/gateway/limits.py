"""How often, and how many at a time, each API key may ask.

Knows keys by name and the limits they carry. In memory: a new server starts afresh. Invariant: in no sixty seconds are
more requests of a key let in than it allows, and never more at once.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from firebox.wire.errors import ResourceExhausted

_WINDOW_S: Final = 60.0
_SOON_S: Final = 1.0


class Key(Protocol):
    """What the front door needs of an API key; limits that are None limit nothing."""

    @property
    def name(self) -> str: ...
    @property
    def account(self) -> str: ...
    @property
    def operator(self) -> bool: ...
    @property
    def requests_per_minute(self) -> int | None: ...
    @property
    def max_concurrent(self) -> int | None: ...


class Limits:
    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._let_in: dict[str, deque[float]] = defaultdict(deque)
        self._open: Counter[str] = Counter()

    @contextlib.contextmanager
    def slot(self, key: Key) -> Iterator[None]:
        """Count a request while it is served; raises ResourceExhausted, with the seconds to wait, beyond a limit."""
        if key.max_concurrent is not None and self._open[key.name] >= key.max_concurrent:
            raise ResourceExhausted(
                f"this API key may have {key.max_concurrent} requests open at a time; wait for one to end",
                reason="TOO_MANY_AT_ONCE",
                retry_after_s=_SOON_S,
            )
        if key.requests_per_minute is not None:
            self._count(key.name, key.requests_per_minute)
        self._open[key.name] += 1
        try:
            yield
        finally:
            self._open[key.name] -= 1

    def _count(self, name: str, per_minute: int) -> None:
        now, let_in = self._clock(), self._let_in[name]
        while let_in and let_in[0] <= now - _WINDOW_S:
            let_in.popleft()
        if len(let_in) >= per_minute:
            raise ResourceExhausted(
                f"this API key may send {per_minute} requests per minute; try again later",
                reason="TOO_MANY_REQUESTS",
                retry_after_s=let_in[0] + _WINDOW_S - now,
            )
        let_in.append(now)
