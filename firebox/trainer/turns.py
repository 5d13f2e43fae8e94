"""The engine's thread, and whose command it executes next.

Owns the lanes, one per model, and takes from them in turns: who has sent a hundred requests waits behind who has sent
one. Commands at the head of several lanes are executed together where the engine allows it. Knows nothing of what a
command does.

Invariant: the commands of one lane are executed in the order in which they came. Models that share their weights, which
are all models of a full-parameter job, share a lane.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from firebox.wire.training import Command, Result

Answer = Callable[[Result], None]

_MAX_TOGETHER: Final = 32
"""Commands that are answered at once; who comes first should not wait for too much of others'."""


class Executor(Protocol):
    """What the thread drives; executing never raises."""

    @property
    def shares_weights(self) -> bool: ...
    def may_share(self, command: Command) -> bool: ...
    def execute(self, command: Command) -> Result: ...
    def execute_together(self, commands: Sequence[Command]) -> list[Result]: ...


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
        while received := self._next():
            commands = [command for command, _ in received]
            together = len(commands) > 1
            results = self._engine.execute_together(commands) if together else [self._engine.execute(commands[0])]
            if self._stopping:
                return  # whoever waited for the answers is gone
            for (_, answer), result in zip(received, results, strict=True):
                answer(result)

    def _next(self) -> list[tuple[Command, Answer]]:
        """The oldest command of the lane whose turn it is, with those of other lanes that may share its passes.

        Their lanes then go behind the others. Empty at the end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._lanes or self._stopping)
            if self._stopping:
                return []
            lanes = list(self._lanes)
            if self._engine.may_share(self._lanes[lanes[0]][0][0]):
                lanes = [lane for lane in lanes if self._engine.may_share(self._lanes[lane][0][0])]
            else:
                lanes = lanes[:1]
            return [self._take(lane) for lane in lanes[:_MAX_TOGETHER]]

    def _take(self, lane: str) -> tuple[Command, Answer]:
        waiting = self._lanes.pop(lane)
        taken = waiting.popleft()
        if waiting:
            self._lanes[lane] = waiting
        return taken
