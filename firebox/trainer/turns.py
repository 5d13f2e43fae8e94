"""The engine's thread, and whose command it executes next.

Owns the lanes, one per model, and takes from them in turns: who has sent a hundred requests waits behind who has sent
one. Knows nothing of what a command does.

Invariant: the commands of one lane are executed in the order in which they came. Models that share their weights, which
are all models of a full-parameter job, share a lane.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import Protocol

from firebox.wire.training import Command, Result

Answer = Callable[[Result], None]


class Executor(Protocol):
    """What the thread drives; `execute` never raises."""

    @property
    def shares_weights(self) -> bool: ...
    def execute(self, command: Command) -> Result: ...


class EngineThread:
    """Executes commands one after the other, each answered from this thread."""

    def __init__(self, engine: Executor) -> None:
        self._engine = engine
        self._stopping = False
        self._lanes: dict[str, deque[tuple[Command, Answer]]] = {}  # the first lane is next; none is empty
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, command: Command, answer: Answer) -> None:
        lane = "" if self._engine.shares_weights else command.model_id
        with self._changed:
            self._lanes.setdefault(lane, deque()).append((command, answer))
            self._changed.notify()

    def stop(self, timeout_s: float) -> None:
        """Let the running command finish, for at most `timeout_s` seconds, and drop the others."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while (received := self._next()) is not None:
            command, answer = received
            result = self._engine.execute(command)
            if self._stopping:
                return  # whoever waited for the answer is gone
            answer(result)

    def _next(self) -> tuple[Command, Answer] | None:
        """The oldest command of the lane whose turn it is, which then goes behind the others; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._lanes or self._stopping)
            if self._stopping:
                return None
            lane = next(iter(self._lanes))
            waiting = self._lanes.pop(lane)
            taken = waiting.popleft()
            if waiting:
                self._lanes[lane] = waiting
            return taken
