"""A client's own loss: the second request starts from the graph of the first, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from proofs import Record
from trainer_harness import Driver, datum, trainer_spec

from firebox.modeling.causal_lm import CausalLM
from firebox.trainer import retained
from firebox.trainer.retained import Retained
from firebox.wire.training import Forward, ForwardOutput, LoraConfig

LENGTHS = (20, 7, 20, 33)


class Trainer(Driver):
    """An engine that counts forward passes through its model."""

    def __init__(self, model_dir: Path, root: Path, lora_rank: int) -> None:
        super().__init__(trainer_spec(model_dir, root, lora_rank=lora_rank), lora_rank)
        self.rank = lora_rank
        self.num_forwards = 0
        self.engine._lm.backbone.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.num_forwards += 1

    def create_another(self, model: str) -> None:
        self.create(LoraConfig(rank=self.rank, seed=7), model)

    def score(self, weights: list[np.ndarray], *, backward: bool, seed: int = 0, model: str = "m") -> ForwardOutput:
        return self.forward(request(weights, backward=backward, seed=seed), model)

    def custom(self, seed: int = 0) -> ForwardOutput:
        """What both SDKs send for a loss of the client's: here the sum of squared log-probs."""
        scored = self.score(zeros(), backward=False, seed=seed)
        weights = [-2 * output["logprobs"].data for output in scored.loss_fn_outputs]
        return self.score(weights, backward=True, seed=seed)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self.state().items() if name.startswith("gradients/")}


def zeros() -> list[np.ndarray]:
    return [np.zeros(n, dtype=np.float32) for n in LENGTHS]


def request(weights: list[np.ndarray], *, backward: bool, seed: int) -> Forward:
    rng = np.random.default_rng(seed)
    data = [datum(rng.integers(0, 1000, len(own) + 1), weights=own) for own in weights]
    return Forward(data=data, loss_fn="cross_entropy", backward=backward)


@pytest.fixture(params=[0, 4], ids=["full", "lora"])
def trainer(tiny_dir: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(tiny_dir, tmp_path, request.param)


def used(output: ForwardOutput) -> bool:
    return output.metrics["reused_forward:sum"] == 1.0


@pytest.mark.prove
def test_the_second_forward_does_not_run_and_the_gradients_are_the_same(trainer: Trainer, record: Record):
    kept = trainer.custom()
    assert used(kept)
    assert trainer.num_forwards == 1
    ours = trainer.gradients()
    for parameter in trainer.engine._models["m"].parameters.values():
        parameter.grad = None
    weights = [-2 * output["logprobs"].data for output in kept.loss_fn_outputs]
    plain = trainer.score(weights, backward=True)
    assert not used(plain)
    assert trainer.num_forwards == 2
    theirs = trainer.gradients()
    assert ours.keys() == theirs.keys()
    worst = max(((ours[n] - g).norm() / g.norm().clamp(min=1e-12)).item() for n, g in theirs.items())
    record("largest relative difference of a gradient", worst)
    assert worst <= 1e-6
    assert kept.metrics["loss:sum"] == pytest.approx(plain.metrics["loss:sum"], rel=1e-6)


def test_a_step_drops_what_was_kept(trainer: Trainer):
    trainer.score(zeros(), backward=False)
    trainer.step()
    assert not used(trainer.score(zeros(), backward=True))


def test_another_active_model_drops_what_was_kept(tiny_dir: Path, tmp_path: Path):
    trainer = Trainer(tiny_dir, tmp_path, 4)
    trainer.create_another("other")
    trainer.score(zeros(), backward=False)
    trainer.score(zeros(), backward=False, model="other")
    assert not used(trainer.score(zeros(), backward=True))
    assert used(trainer.custom()), "being pushed out teaches nothing"


@pytest.mark.parametrize("changed", ["tokens", "targets"])
def test_other_data_does_not_match(trainer: Trainer, changed: str):
    trainer.do(request(zeros(), backward=False, seed=1))
    again = request(zeros(), backward=True, seed=1)
    datum = again.data[-1]
    array = datum.model_input.chunks[0].tokens if changed == "tokens" else datum.loss_fn_inputs["target_tokens"].data
    array[0] += 1
    result = trainer.do(again)
    assert isinstance(result, ForwardOutput)
    assert not used(result)


def test_chunks_come_back_in_their_order(trainer: Trainer):
    for seed in (1, 2, 3):
        trainer.score(zeros(), backward=False, seed=seed)
    ones = [np.ones(n, dtype=np.float32) for n in LENGTHS]
    assert all(used(trainer.score(ones, backward=True, seed=seed)) for seed in (1, 2, 3))
    assert trainer.num_forwards == 3


def test_a_session_that_never_comes_back_stops_paying(trainer: Trainer):
    trainer.score(zeros(), backward=False)
    trainer.step()
    trainer.score(zeros(), backward=False)
    assert not trainer.engine._retained._kept
    assert not used(trainer.score(zeros(), backward=True)), "it was not expected"
    assert used(trainer.custom()), "now it is"


def test_a_pass_beyond_the_budget_is_not_kept(trainer: Trainer):
    trainer.engine._retained = Retained(budget=10_000)
    assert not used(trainer.custom())
    assert not trainer.engine._retained._kept
    assert trainer.gradients()


def test_the_measured_size_is_that_of_the_graph(trainer: Trainer):
    trainer.score(zeros(), backward=False)
    (recording,) = trainer.engine._retained._kept.values()
    lm: CausalLM = trainer.engine._lm
    logits = 4 * sum(LENGTHS) * lm.vocab_size
    assert logits < recording.num_bytes < 40 * logits


def test_a_container_has_less_memory_than_its_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = retained.memory_budget(torch.device("cpu"))
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(retained, "_CONTAINER_LIMITS", (limit, tmp_path / "absent"))
    for text, expected in (("max", None), ("8000000", 1_000_000)):
        limit.write_text(f"{text}\n")
        budget = retained.memory_budget(torch.device("cpu"))
        assert budget == expected if expected else budget >= whole
