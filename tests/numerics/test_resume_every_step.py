"""A run that is saved and resumed, at any step and between two requests of one step, ends in the same bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from live_engine import LiveEngine, random_rows
from proofs import Record, count

MODELS = ("a", "b")


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def accumulate(engine: LiveEngine, step: int, part: int, models: tuple[str, ...]) -> None:
    for number, model in enumerate(models):
        engine.backward("cross_entropy", random_rows(100 * step + 10 * part + number), model)


def train(engine: LiveEngine, first: int, last: int, models: tuple[str, ...], *, pending: bool = False) -> None:
    """Steps `first` to `last`, two requests each and the models in turn; `pending` when the first request is done."""
    for step in range(first, last):
        for part in range(1 if pending and step == first else 0, 2):
            accumulate(engine, step, part, models)
        for model in models:
            engine.step(model)


@pytest.mark.prove
@pytest.mark.parametrize(("rank", "models"), [(0, ("m",)), (4, MODELS)], ids=["full", "two adapters"])
def test_resume_at_every_step_is_bit_exact(
    tiny_dir: Path, tmp_path: Path, rank: int, models: tuple[str, ...], record: Record
):
    steps = count(4, 20)
    straight = LiveEngine(tiny_dir, tmp_path, "straight", rank=rank, models=models)
    for step in range(steps):
        for model in models:
            straight.save(f"{model}-{step}-whole", model)
        accumulate(straight, step, 0, models)
        for model in models:
            straight.save(f"{model}-{step}-half", model)
        train(straight, step, step + 1, models, pending=True)
    expected = {model: straight.state(model) for model in models}
    resumed = LiveEngine(tiny_dir, tmp_path, "resumed", rank=rank, models=models)
    for step in range(steps):
        for pending in (False, True):
            for model in models:
                resumed.load(f"cross_job://straight/{model}-{step}-{'half' if pending else 'whole'}", model)
            train(resumed, step, steps, models, pending=pending)
            for model in models:
                assert same(resumed.state(model), expected[model]), (model, step, pending)
    assert all(state["counters"].tolist() == [steps, 0, 0] for state in expected.values())
    record("resumes", 2 * steps)


def test_adapters_in_turns_train_as_alone(tiny_dir: Path, tmp_path: Path):
    together = LiveEngine(tiny_dir, tmp_path, "together", rank=4, models=MODELS)
    train(together, 0, 3, MODELS)
    for number, model in enumerate(MODELS):
        alone = LiveEngine(tiny_dir, tmp_path, f"alone-{model}", rank=4, models=MODELS)
        for step in range(3):
            for part in (0, 1):
                alone.backward("cross_entropy", random_rows(100 * step + 10 * part + number), model)
            alone.step(model)
        assert same(alone.state(model), together.state(model))
