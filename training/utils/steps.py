"""Which rows each optimizer step takes, and having two steps in flight, so that a trainer never idles.

Knows no loss. Invariants: steps finish in the order they were sent; where a step is a stop, nothing later is on its way
when it is handed out, so that a state or a held-out loss belongs behind exactly that step.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from training.utils import data
from training.utils.client import Waitable, wait
from training.utils.metrics import Timer

STEPS_IN_FLIGHT = 2


@dataclass(frozen=True)
class Step:
    """Which rows one step trains on. `consumed` counts the rows of the data stream up to its end."""

    number: int
    consumed: int
    rows: list[int]


@dataclass(frozen=True)
class Plan:
    """Which rows each step takes behind `start` finished steps and `consumed` rows.

    There are `max_steps` steps if that is given, else as many as `epochs` need; then the last may be smaller.
    """

    num_rows: int
    batch_size: int
    epochs: int
    max_steps: int | None
    seed: int
    start: int = 0
    consumed: int = 0

    @property
    def num_left(self) -> int:
        """Rows until the last epoch ends."""
        return max(self.num_rows * self.epochs - self.consumed, 0)

    @property
    def total_steps(self) -> int:
        return self.max_steps or self.start + math.ceil(self.num_left / self.batch_size)

    def steps(self) -> Iterator[Step]:
        """Every step that is still to be taken."""
        consumed = self.consumed
        for number in range(self.start + 1, self.total_steps + 1):
            left = self.batch_size if self.max_steps else self.num_rows * self.epochs - consumed
            rows = data.batch_at(self.num_rows, consumed, min(self.batch_size, left), self.seed)
            consumed += len(rows)
            yield Step(number, consumed, rows)


@dataclass(frozen=True)
class Sent:
    """A step that was sent and not yet awaited."""

    step: Step
    num_tokens: int
    learning_rate: float
    forward_backward: Waitable
    optim_step: Waitable

    def wait(self, timeout: float) -> dict[str, float]:
        """The step's metrics, once the trainer has taken it. Times are those spent waiting, not those it took."""
        timer, of_step = Timer(), f"of step {self.step.number}"
        with timer("forward_backward"):
            passed = wait(self.forward_backward, timeout, f"forward_backward {of_step}")
        with timer("optim"):
            optim = wait(self.optim_step, timeout, f"optim_step {of_step}").metrics or {}
        metrics = {"train/loss": passed.metrics["loss:sum"], "optim/lr": self.learning_rate} | timer.seconds
        return metrics | ({"optim/grad_norm": optim["grad_norm"]} if "grad_norm" in optim else {})


def pipelined(
    steps: Iterator[Step], send: Callable[[Step], Sent], stops: Callable[[int], bool], timeout: float
) -> Iterator[tuple[Step, dict[str, float]]]:
    """Send every step and hand out (step, metrics) as each finishes. `timeout` (s) bounds each wait.

    A step on which `stops` says so is handed out before the next one is sent.
    """
    in_flight: deque[Sent] = deque()
    last = time.monotonic()
    for step in steps:
        in_flight.append(send(step))
        while in_flight and (stops(step.number) or len(in_flight) >= STEPS_IN_FLIGHT):
            done = in_flight.popleft()
            metrics = done.wait(timeout)
            seconds = time.monotonic() - last
            metrics |= {"perf/tokens_per_s": done.num_tokens / seconds, "time/step_s": seconds}
            yield done.step, metrics
            last = time.monotonic()
    assert not in_flight, "the last step is a stop"
