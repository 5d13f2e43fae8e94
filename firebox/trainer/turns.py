"""The engine's thread, and whose command it executes next.

Owns the lanes, one per model, and takes from them in turns: who has sent a hundred requests waits behind who has sent
one, and behind a long request's next step comes whoever else has something to do. Commands at the head of several lanes
are executed together where the engine allows it. Knows nothing of what a command does.

Invariant: the commands of one lane are executed in the order in which they came. Models that share their weights, which
are all models of a full-parameter job, share a lane.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from firebox.trainer.steps import Steps
from firebox.wire.training import Command, Result

Answer = Callable[[Result], None]

_MAX_TOGETHER: Final = 32
"""Commands that are answered at once; who comes first should not wait for too much of others'."""


class Executor(Protocol):
    """What the thread drives; executing never raises."""

    @property
    def shares_weights(self) -> bool: ...
    def may_share(self, command: Command) -> bool: ...
    def begin(self, command: Command) -> Steps[Result]: ...
    def execute_together(self, commands: Sequence[Command]) -> list[Result]: ...


class _Work:
    """A command that waits for its turn, or for its next one."""

    def __init__(self, command: Command, answer: Answer) -> None:
        self.command = command
        self.answer = answer
        self.steps: Steps[Result] | None = None


class EngineThread:
    """Executes one command, or one step of it, after the other; each is answered from this thread."""

    def __init__(self, engine: Executor) -> None:
        self._engine = engine
        self._stopping = False
        self._lanes: dict[str, deque[_Work]] = {}  # the first lane is next; none is empty
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, command: Command, answer: Answer) -> None:
        with self._changed:
            self._lanes.setdefault(self._lane(command), deque()).append(_Work(command, answer))
            self._changed.notify()

    def stop(self, timeout_s: float) -> None:
        """Let the running step finish, for at most `timeout_s` seconds, and drop the rest."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        while works := self._next():
            results = self._step(works[0]) if len(works) == 1 else self._together(works)
            if self._stopping:
                return  # whoever waited for the answers is gone
            for work, result in zip(works, results, strict=False):
                work.answer(result)

    def _step(self, work: _Work) -> list[Result]:
        """One step of a command: its result, or none yet, and then its lane goes behind the others."""
        work.steps = work.steps or self._engine.begin(work.command)
        try:
            next(work.steps)
        except StopIteration as end:
            return [end.value]
        with self._changed:
            lane = self._lane(work.command)
            self._lanes[lane] = deque([work, *self._lanes.pop(lane, ())])
        return []

    def _together(self, works: Sequence[_Work]) -> list[Result]:
        return self._engine.execute_together([work.command for work in works])

    def _next(self) -> list[_Work]:
        """What the lane whose turn it is has in front, with what others have that may share its passes.

        Their lanes then go behind the others. Empty at the end.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._lanes or self._stopping)
            if self._stopping:
                return []
            lanes = list(self._lanes)
            lanes = [lane for lane in lanes if self._may_share(lane)] if self._may_share(lanes[0]) else lanes[:1]
            return [self._take(lane) for lane in lanes[:_MAX_TOGETHER]]

    def _may_share(self, lane: str) -> bool:
        work = self._lanes[lane][0]
        return work.steps is None and self._engine.may_share(work.command)

    def _take(self, lane: str) -> _Work:
        waiting = self._lanes.pop(lane)
        taken = waiting.popleft()
        if waiting:
            self._lanes[lane] = waiting
        return taken

    def _lane(self, command: Command) -> str:
        return "" if self._engine.shares_weights else command.model_id
