"""Preference losses against the papers' formulas, pairs cut to what fits, and a reference that is asked once."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from training.recipes import dpo_loop, orpo_loop
from training.utils import CheckpointError, ConfigError, DataError, InfraConfig, preference, validate
from training.utils.pairs import RenderedPair, answer_lengths, answer_logprobs, load_pairs, pair_datums, score
from training.utils.reference_logprobs import FIRST_WEIGHTS, ask, recall, who_is_reference
from training.utils.render import Rendered, load_tokenizer

PAIRS = [
    RenderedPair(Rendered([1, 2, 3, 4], [0, 0, 1, 1]), Rendered([1, 2, 9], [0, 0, 1])),
    RenderedPair(Rendered([5, 6], [0, 1]), Rendered([5, 7, 8], [0, 1, 1])),
]
LOGPROBS = [torch.tensor(row) for row in ([-0.1, -0.2, -0.4], [-0.5, -2.0], [-1.0], [-3.0, -0.25])]


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_is_the_formula_of_the_paper(smoothing: float) -> None:
    chosen, rejected, ref_chosen, ref_rejected = [-3.0, -8.0], [-4.0, -5.0], [-3.5, -7.0], [-3.0, -6.5]
    loss, metrics = preference.dpo(
        *(double(*values) for values in (chosen, rejected, ref_chosen, ref_rejected)),
        beta=0.4,
        label_smoothing=smoothing,
    )
    margins = [
        0.4 * (math.log(math.exp(c) / math.exp(rc)) - math.log(math.exp(r) / math.exp(rr)))
        for c, r, rc, rr in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)
    ]
    by_hand = [-(1 - smoothing) * math.log(sigmoid(m)) - smoothing * math.log(1 - sigmoid(m)) for m in margins]
    assert loss.item() == pytest.approx(sum(by_hand) / 2, rel=1e-12)
    assert metrics == {
        "loss": loss.item(),
        "margin": pytest.approx(sum(margins) / 2),
        "accuracy": 0.5,
        "chosen_reward": pytest.approx(0.4 * (0.5 - 1.0) / 2),
        "rejected_reward": pytest.approx(0.4 * (-1.0 + 1.5) / 2),
    }


def test_orpo_is_the_formula_of_the_paper() -> None:
    chosen, rejected, lengths = [-3.0, -8.0], [-4.0, -5.0], ([2, 4], [5, 3])
    loss, metrics = preference.orpo(
        double(*chosen), double(*rejected), double(*lengths[0]), double(*lengths[1]), weight=0.7
    )
    nll = (3.0 + 8.0) / 6
    odds = [[(p := math.exp(s / n)) / (1 - p) for s, n in zip(sums, ns, strict=True)]
            for sums, ns in zip((chosen, rejected), lengths, strict=True)]  # fmt: skip
    ratios = [c / r for c, r in zip(*odds, strict=True)]
    odds_loss = -sum(math.log(sigmoid(math.log(ratio))) for ratio in ratios) / 2
    assert loss.item() == pytest.approx(nll + 0.7 * odds_loss, rel=1e-12)
    assert metrics["nll"] == pytest.approx(nll)
    assert metrics["odds_loss"] == pytest.approx(odds_loss)
    assert metrics["margin"] == pytest.approx(sum(map(math.log, ratios)) / 2)


def test_an_answer_that_is_certain_has_finite_odds_and_gradients() -> None:
    sure = double(0.0).requires_grad_()
    loss, _ = preference.orpo(sure, double(-1.0), double(1), double(1), weight=1.0)
    loss.backward()
    assert math.isfinite(loss.item())
    assert sure.grad is not None
    assert torch.isfinite(sure.grad).all()


def test_only_answers_count_and_pairs_come_back_in_order() -> None:
    chosen, rejected = answer_logprobs(LOGPROBS, PAIRS)
    assert chosen.tolist() == pytest.approx([-0.6, -1.0])
    assert rejected.tolist() == pytest.approx([-2.0, -3.25])
    assert [side.tolist() for side in answer_lengths(PAIRS)] == [[2, 1], [1, 2]]
    tokens = [datum.model_input.to_ints() for datum in pair_datums(PAIRS)]
    assert tokens == [[1, 2, 3], [1, 2], [5], [5, 7]]


class Trainer:
    """Answers with the log-probs of `PAIRS`, and counts how often it is asked."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def forward(self, datums: Any) -> Any:
        start = sum(self.batches)
        self.batches.append(len(datums))
        rows = LOGPROBS[start : start + len(datums)]
        return SimpleNamespace(loss_fn_outputs=[{"logprobs": SimpleNamespace(data=row.tolist())} for row in rows])


def test_a_reference_is_asked_once_and_remembered(tmp_path: Path) -> None:
    trainer = Trainer()
    reference = ask(trainer.forward, "base", PAIRS, batch_size=1)
    assert trainer.batches == [2, 2]
    reference.save(tmp_path / "run")
    again = recall(tmp_path / "run", "base", PAIRS[::-1])
    assert again == reference
    assert [side.tolist() for side in again.of(PAIRS[::-1])] == [
        pytest.approx([-1.0, -0.6]),
        pytest.approx([-3.25, -2.0]),
    ]
    assert len(score(Trainer().forward, PAIRS, 8)) == 4


def test_a_reference_that_cannot_be_remembered_is_an_error(tmp_path: Path) -> None:
    assert recall(tmp_path, "base", PAIRS) is None
    with pytest.raises(CheckpointError, match="the weights this run began with are gone"):
        recall(tmp_path, FIRST_WEIGHTS, PAIRS)
    ask(Trainer().forward, FIRST_WEIGHTS, PAIRS, 2).save(tmp_path)
    with pytest.raises(CheckpointError, match=f"log-probs of {FIRST_WEIGHTS}, not of base"):
        recall(tmp_path, "base", PAIRS)
    other = RenderedPair(PAIRS[0].chosen, PAIRS[1].rejected)
    with pytest.raises(CheckpointError, match="lacks 1 of 3 pairs"):
        recall(tmp_path, FIRST_WEIGHTS, [*PAIRS, other])
    (tmp_path / "logprobs.json").write_text('{"who": "base", "logprobs": {"a": 1}}')
    with pytest.raises(CheckpointError, match="does not hold a reference's log-probs"):
        recall(tmp_path, "base", PAIRS)


def test_the_base_model_is_the_reference_where_it_can_be_asked() -> None:
    with_shape = InfraConfig(ref_training_shape_id="accounts/local/trainingShapes/tiny-cpu-forward")
    assert who_is_reference("base", 0, with_shape) == who_is_reference("base", 8, InfraConfig()) == "base"
    assert who_is_reference("base", 0, InfraConfig()) == FIRST_WEIGHTS


@pytest.fixture
def tokenizer(tiny_dir: Path) -> Any:
    return load_tokenizer(str(tiny_dir))


def write(path: Path, *rows: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_long_answers_are_cut_and_what_teaches_nothing_is_left_out(tokenizer: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "one", "chosen": "yes " * 40, "rejected": "no " * 40},
        {"prompt": "one", "chosen": "same " * 40 + "a", "rejected": "same " * 40 + "b"},
        {"prompt": "long " * 60, "chosen": "a", "rejected": "b"},
        {"prompt": "two", "chosen": "a", "rejected": "b"},
    ]
    notes: list[str] = []
    path = write(tmp_path / "a.jsonl", *rows)
    train, held_out = load_pairs(path, tokenizer, 32, eval_fraction=0.0, seed=0, note=notes.append)
    assert held_out == []
    assert [len(side.tokens) for side in train[0]] == [32, 32]
    assert tokenizer.decode(train[1].chosen.trained_tokens) == "a<|im_end|>"
    assert notes == [
        f"{path}: 4 rows of TRL preferences",
        "cut 6 of 8 training answers at 32 tokens, stop token included",
        "left out 2 of 4 training pairs: within 32 tokens their answers are alike or missing",
        "training on 2 pairs; 0 pairs held out",
    ]
    with pytest.raises(DataError, match="no training pair fits 4 tokens"):
        load_pairs(path, tokenizer, 4, eval_fraction=0.0, seed=0, note=notes.append)


@pytest.mark.parametrize("recipe", [dpo_loop, orpo_loop])
def test_a_loss_that_is_a_mean_already_is_not_normalized_again(recipe: Any) -> None:
    shape = InfraConfig(training_shape_id="accounts/local/trainingShapes/tiny-cpu")
    config = recipe.Config(base_model="m", tokenizer_model="t", dataset="d", infra=shape)
    assert config.grad_accumulation_normalization is None
    validate(config)
    config.weight_sync.weight_sync_before_training = True
    with pytest.raises(ConfigError, match="this recipe has no deployment"):
        validate(config)
