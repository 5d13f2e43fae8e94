"""Requests that the server answers itself, because a worker may first have to start: begun at once, fetched later.

Invariant: a request id of an account gets one answer, which stays readable for minutes; the same id begun again is the
same request. No account ever reads another's.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from firebox.wire.errors import FireboxError, Internal, NotFound, ResourceExhausted

_KEEP_S: Final = 600.0
_MAX_PENDING: Final = 4096

log = logging.getLogger(__name__)


class Futures:
    """Answers are JSON bodies; a failure is one too, as clients expect it."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[str, str], asyncio.Task[bytes]] = {}
        self._ended: deque[tuple[float, tuple[str, str]]] = deque()

    def start(self, account: str, request_id: str, work: Callable[[], Awaitable[bytes]]) -> None:
        """Begin `work`, unless this request was begun before; raises ResourceExhausted when too many are under way."""
        self._forget_expired()
        request = (account, request_id)
        if request in self._tasks:
            return
        if len(self._tasks) - len(self._ended) >= _MAX_PENDING:
            raise ResourceExhausted(f"{_MAX_PENDING} requests are waiting already; try again later")
        task = self._tasks[request] = asyncio.create_task(_answer(work))
        task.add_done_callback(lambda _: self._ended.append((time.monotonic(), request)))

    def failed(self, account: str, error: FireboxError) -> str:
        """The id of a request that is answered with `error`."""

        async def fail() -> bytes:
            raise error

        request_id = uuid.uuid4().hex
        self.start(account, request_id, fail)
        return request_id

    async def wait(self, account: str, request_id: str, hold_s: float) -> bytes | None:
        """The answer, or None when it is not there within `hold_s` seconds; raises NotFound."""
        task = self._tasks.get((account, request_id))
        if task is None:
            raise NotFound(f"request_id: {request_id!r} is not known, or its answer expired; send the request again")
        await asyncio.wait({task}, timeout=hold_s)
        return task.result() if task.done() else None

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _forget_expired(self) -> None:
        deadline = time.monotonic() - _KEEP_S
        while self._ended and self._ended[0][0] < deadline:
            del self._tasks[self._ended.popleft()[1]]


def failure(error: FireboxError) -> dict[str, Any]:
    """The answer of a request that failed: whose mistake it was, and what to do."""
    return {"error": error.message, "category": error.category}


async def _answer(work: Callable[[], Awaitable[bytes]]) -> bytes:
    try:
        return await work()
    except FireboxError as error:
        return msgspec.json.encode(failure(error))
    except Exception as error:  # noqa: BLE001 - nobody awaits this task: what went wrong must become the answer
        return msgspec.json.encode(failure(_bug(error)))


def _bug(error: Exception) -> Internal:
    log.error("a request of the root API failed", exc_info=error)
    return Internal(f"the server failed on this request ({type(error).__name__}); its log has the cause")
