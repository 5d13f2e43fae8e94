"""Models that share a base model and pause in the middle of a request compute what each of them computes alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from trainer_harness import Driver, datum

from firebox.trainer import passes
from firebox.trainer.steps import Steps
from firebox.wire.training import Command, Forward, ForwardOutput, LoraConfig, Operation, Result
from firebox.wire.worker import TrainerSpec

LORA = {"a": LoraConfig(rank=4, seed=1), "b": LoraConfig(rank=2, seed=2)}
LENGTHS = (20, 9, 31, 14, 25)


@pytest.fixture
def engines(
    make_spec: Callable[..., TrainerSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Driver, Driver]:
    """Two engines with the same two models, and micro-batches of a sequence or two."""
    monkeypatch.setattr(passes, "token_budget", lambda vocab_size: 32)
    torch.set_num_threads(1)
    drivers = []
    for job in ("turns", "alone"):
        driver = Driver(make_spec(job, lora_rank=4), rank=1)
        for model, lora in LORA.items():
            driver.create(lora, model)
        drivers.append(driver)
    return drivers[0], drivers[1]


def request(seed: int, *, backward: bool, weight: float = 1.0) -> Forward:
    rng = np.random.default_rng(seed)
    rows = [(rng.integers(0, 1000, n), np.full(n - 1, weight, np.float32)) for n in LENGTHS]
    data = [datum(row, weights=weights) for row, weights in rows]
    return Forward(data=data, loss_fn="cross_entropy", backward=backward)


def in_turns(driver: Driver, *orders: tuple[str, Operation]) -> list[Result]:
    """One step of each in turn, as the engine's thread does it."""
    begun: list[Steps[Result]] = [driver.engine.begin(Command(model_id=m, operation=op)) for m, op in orders]
    results: dict[int, Result] = {}
    num_steps = 0
    while len(results) < len(begun):
        for number, steps in enumerate(begun):
            if number not in results:
                num_steps += 1
                try:
                    next(steps)
                except StopIteration as end:
                    results[number] = end.value
    assert num_steps > 2 * len(begun), "nothing paused"
    return [results[number] for number in range(len(begun))]


def same(turns: Driver, alone: Driver) -> bool:
    states = [(turns.state(model), alone.state(model)) for model in LORA]
    return all(ours.keys() == theirs.keys() for ours, theirs in states) and all(
        torch.equal(ours[name], theirs[name]) for ours, theirs in states for name in ours if name != "rng"
    )


def test_requests_that_pause_for_each_other_give_the_same_bits(engines: tuple[Driver, Driver]) -> None:
    turns, alone = engines
    orders = [("a", request(1, backward=True)), ("b", request(2, backward=True))]
    together = in_turns(turns, *orders)
    for (model, order), ours in zip(orders, together, strict=True):
        theirs = alone.forward(order, model)
        assert isinstance(ours, ForwardOutput)
        assert ours.metrics == theirs.metrics
    assert same(turns, alone)


def test_one_that_fails_half_way_leaves_both_as_they_were(engines: tuple[Driver, Driver]) -> None:
    turns, alone = engines
    extreme = request(1, backward=True, weight=3e38)
    failed, done = in_turns(turns, ("a", extreme), ("b", request(2, backward=True)))
    assert "not finite" in failed.error  # type: ignore[union-attr]
    assert isinstance(done, ForwardOutput)
    alone.forward(request(2, backward=True), "b")
    assert same(turns, alone)


def test_what_is_kept_for_a_custom_loss_is_never_anothers(engines: tuple[Driver, Driver]) -> None:
    """One scores tokens while another is at work, which then sends the same tokens for its backward pass."""
    turns, alone = engines
    in_turns(turns, ("a", request(1, backward=False, weight=0.0)), ("b", request(2, backward=False, weight=0.0)))
    for model in ("b", "a"):
        turns.forward(request(1, backward=True), model)
        alone.forward(request(1, backward=True), model)
    assert same(turns, alone)
