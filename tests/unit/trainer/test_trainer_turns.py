"""Whose command is executed next: models take turns, the commands of one model keep their order."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from firebox.trainer.steps import Steps
from firebox.trainer.turns import EngineThread
from firebox.wire.training import Command, ModelUnloaded, Result, UnloadModel

WITHIN_S = 10


class Executor:
    """Writes down whose command it got. The first one keeps it busy until everything else has been submitted."""

    def __init__(self, shares_weights: bool, shared: str = "", pauses: int = 0) -> None:
        self.shares_weights = shares_weights
        self.order: list[str] = []
        self._shared = shared
        self._pauses = pauses
        self.busy, self.filled = threading.Event(), threading.Event()

    def begin(self, command: Command) -> Steps[Result]:
        self.busy.set()
        assert self.filled.wait(WITHIN_S)
        for part in range(self._pauses if command.model_id == "a" else 0):
            self.order.append(f"a{part}")
            yield
        self.order.append(command.model_id)
        return ModelUnloaded(model_id=command.model_id)

    def may_share(self, command: Command) -> bool:
        return command.model_id in self._shared

    def execute_together(self, commands: Sequence[Command]) -> list[Result]:
        self.order.append("+".join(command.model_id for command in commands))
        return [ModelUnloaded(model_id=command.model_id) for command in commands]


@pytest.mark.parametrize(
    ("shares_weights", "shared", "expected"),
    [
        (False, "", ["a", "b", "c", "a", "c", "a", "a"]),
        (True, "", ["a", "a", "a", "a", "b", "c", "c"]),
        (False, "ac", ["a+c", "b", "a+c", "a", "a"]),
        (False, "b", ["a", "b", "c", "a", "c", "a", "a"]),
    ],
)
def test_who_sent_many_waits_behind_who_sent_one(shares_weights: bool, shared: str, expected: list[str]) -> None:
    executor, answered = Executor(shares_weights, shared), threading.Semaphore(0)
    thread = EngineThread(executor)
    answers: list[Result] = []

    def answer(result: Result) -> None:
        answers.append(result)
        answered.release()

    thread.submit(Command(model_id="first", operation=UnloadModel()), answer)
    assert executor.busy.wait(WITHIN_S)
    for model in ("a", "a", "a", "a", "b", "c", "c"):
        thread.submit(Command(model_id=model, operation=UnloadModel()), answer)
    executor.filled.set()
    assert all(answered.acquire(timeout=WITHIN_S) for _ in range(8))
    thread.stop(WITHIN_S)
    assert executor.order == ["first", *expected]
    assert [result.model_id for result in answers] == "+".join(executor.order).split("+")


def test_who_sent_little_does_not_wait_for_all_of_a_long_one() -> None:
    executor, answered = Executor(shares_weights=False, pauses=2), threading.Semaphore(0)
    thread = EngineThread(executor)
    thread.submit(Command(model_id="first", operation=UnloadModel()), lambda result: answered.release())
    assert executor.busy.wait(WITHIN_S)
    for model in ("a", "a", "b", "b", "b", "b"):
        thread.submit(Command(model_id=model, operation=UnloadModel()), lambda result: answered.release())
    executor.filled.set()
    assert all(answered.acquire(timeout=WITHIN_S) for _ in range(7))
    thread.stop(WITHIN_S)
    assert executor.order == ["first", "a0", "b", "a1", "b", "a", "b", "a0", "b", "a1", "a"]


def test_stopping_lets_the_running_command_finish_and_drops_the_others() -> None:
    executor = Executor(shares_weights=False)
    thread = EngineThread(executor)
    for model in ("a", "b"):
        thread.submit(Command(model_id=model, operation=UnloadModel()), lambda result: None)
    assert executor.busy.wait(WITHIN_S)
    thread.stop(0.0)
    executor.filled.set()
    thread.stop(WITHIN_S)
    assert executor.order == ["a"]
