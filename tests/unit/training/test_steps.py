"""Which rows a step takes, and what is on its way when a step is handed out."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from training.utils.steps import Plan, Sent, Step, pipelined

PLAN = Plan(num_rows=10, batch_size=4, epochs=2, max_steps=None, seed=3, start=0, consumed=0)


def test_epochs_visit_every_row_and_the_last_step_takes_what_is_left() -> None:
    steps = list(PLAN.steps())
    assert [step.number for step in steps] == [1, 2, 3, 4, 5] == list(range(1, PLAN.total_steps + 1))
    assert [step.consumed for step in steps] == [4, 8, 12, 16, 20]
    visits = [row for step in steps for row in step.rows]
    assert sorted(visits[:10]) == sorted(visits[10:]) == list(range(10))
    assert [len(step.rows) for step in replace(PLAN, num_rows=9).steps()] == [4, 4, 4, 4, 2]


def test_max_steps_goes_on_over_as_many_epochs_as_it_takes() -> None:
    steps = list(replace(PLAN, max_steps=7).steps())
    assert [len(step.rows) for step in steps] == [4] * 7


@pytest.mark.parametrize("max_steps", [None, 7])
def test_a_resumed_run_takes_the_steps_that_are_left(max_steps: int | None) -> None:
    whole = replace(PLAN, max_steps=max_steps)
    for done in list(whole.steps()):
        rest = replace(whole, start=done.number, consumed=done.consumed)
        assert list(rest.steps()) == list(whole.steps())[done.number :]
        assert rest.total_steps == whole.total_steps


def test_a_resumed_run_with_another_batch_size_ends_with_the_epoch() -> None:
    rest = list(replace(PLAN, batch_size=7, start=2, consumed=8).steps())
    assert [(step.number, len(step.rows)) for step in rest] == [(3, 7), (4, 5)]


@dataclass
class Trainer:
    """Counts what is on its way; an answer comes when it is waited for."""

    on_their_way: list[int] = field(default_factory=list)
    most: int = 0

    def send(self, step: Step) -> Sent:
        self.on_their_way.append(step.number)
        self.most = max(self.most, len(self.on_their_way))
        return Sent(step, 10, 0.1, Answer(self, {"loss:sum": 2.0}), Answer(self, {"grad_norm": 3.0}, step))


@dataclass
class Answer:
    trainer: Trainer
    metrics: dict[str, float]
    ends: Step | None = None

    def result(self, timeout: float | None = None) -> Any:
        if self.ends:
            self.trainer.on_their_way.remove(self.ends.number)
        return SimpleNamespace(metrics=self.metrics)


def test_two_steps_are_in_flight_and_a_stop_leaves_none() -> None:
    trainer, seen = Trainer(), []
    for step, metrics in pipelined(PLAN.steps(), trainer.send, lambda number: number in (3, 5), timeout=1):
        seen.append((step.number, list(trainer.on_their_way)))
        assert metrics["train/loss"] == 2.0
        assert (metrics["optim/grad_norm"], metrics["optim/lr"]) == (3.0, 0.1)
    assert trainer.most == 2
    assert seen == [(1, [2]), (2, [3]), (3, []), (4, [5]), (5, [])]
