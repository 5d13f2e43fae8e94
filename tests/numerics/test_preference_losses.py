"""DPO and ORPO against TRL's own trainers, on one batch and one model: losses and gradients.

TRL's ORPO imitates prompt and answer, ours the answer alone; with a prompt of one token, which nobody predicts, the two
are the same, so that is the batch on which whole losses are compared. The odds ratio is compared on longer prompts too.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from proofs import Record

from training.utils import preference
from training.utils.pairs import RenderedPair, answer_lengths, answer_logprobs
from training.utils.render import Rendered

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def models(tiny_dir: Path) -> tuple[Any, Any]:
    """(policy, reference): the tiny model, and one whose weights are a little off."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    policy = copy.deepcopy(reference)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return policy, reference


def random_pairs(prompt_lengths: list[int], seed: int = 0) -> list[RenderedPair]:
    """Pairs with answers of 3 to 12 random tokens behind prompts of these lengths."""
    rng = np.random.default_rng(seed)
    pairs = []
    for length in prompt_lengths:
        prompt = rng.integers(20, 1000, length).tolist()
        answers = [rng.integers(20, 1000, rng.integers(3, 13)).tolist() for _ in range(2)]
        pairs.append(
            RenderedPair(*(Rendered(prompt + answer, [0.0] * length + [1.0] * len(answer)) for answer in answers))
        )
    return pairs


def logprobs(model: Any, pairs: list[RenderedPair]) -> list[torch.Tensor]:
    """Log-probs [T-1] of every conversation of the pairs, one at a time, no padding anywhere."""
    rows = []
    for tokens in (torch.tensor(side.tokens) for pair in pairs for side in pair):
        logits = model(tokens[None, :-1]).logits[0]
        rows.append(logits.log_softmax(-1).gather(1, tokens[1:, None])[:, 0])
    return rows


def gradients(model: Any, loss: torch.Tensor) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def trl_dpo(tmp_path: Path, models: tuple[Any, Any], tokenizer: Any, pairs: list[RenderedPair]) -> Any:
    """TRL's loss on the batch that its own collator makes of these pairs."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    settings = DPOConfig(output_dir=str(tmp_path), beta=0.3, report_to=[], use_cpu=True, bf16=False)
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    policy, reference = models
    trainer = DPOTrainer(policy, reference, settings, train_dataset=rows, processing_class=tokenizer)
    examples = []
    for pair in pairs:
        start = pair.chosen.weights.index(1.0)
        answers = {"chosen_ids": pair.chosen.tokens[start:], "rejected_ids": pair.rejected.tokens[start:]}
        examples.append({"prompt_ids": pair.chosen.tokens[:start], **answers})
    batch = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)(examples)
    trainer.model.eval()
    return trainer.compute_loss(trainer.model, batch)


def trl_orpo(tmp_path: Path, policy: Any, tokenizer: Any, pairs: list[RenderedPair]) -> tuple[Any, dict[str, float]]:
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    settings = ORPOConfig(output_dir=str(tmp_path), beta=0.3, report_to=[], use_cpu=True, bf16=False)
    rows = Dataset.from_dict({"prompt": ["a"], "chosen": ["b"], "rejected": ["c"]})
    trainer = ORPOTrainer(policy, settings, train_dataset=rows, processing_class=tokenizer)
    batch: dict[str, Any] = {}
    for name in ("chosen", "rejected"):
        sides = [getattr(pair, name) for pair in pairs]
        labels = [[t if w else -100 for t, w in zip(side.tokens, side.weights, strict=True)] for side in sides]
        batch[f"{name}_input_ids"] = padded([side.tokens for side in sides], tokenizer.pad_token_id)
        batch[f"{name}_attention_mask"] = padded([[1] * len(side.tokens) for side in sides], 0)
        batch[f"{name}_labels"] = padded(labels, -100)
    trainer.model.eval()
    return trainer.get_batch_loss_metrics(trainer.model, batch)


def padded(rows: list[list[int]], value: int) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_dir)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


@pytest.mark.prove
def test_dpo_equals_trl(models: tuple[Any, Any], tokenizer: Any, tmp_path: Path, record: Record) -> None:
    pytest.importorskip("trl")
    policy, reference = models
    pairs = random_pairs([1, 4, 9, 2, 6])
    theirs = trl_dpo(tmp_path, models, tokenizer, pairs)
    with torch.no_grad():
        ref_chosen, ref_rejected = answer_logprobs(logprobs(reference, pairs), pairs)
    chosen, rejected = answer_logprobs(logprobs(policy, pairs), pairs)
    ours, metrics = preference.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.3, label_smoothing=0.0)
    record("loss", metrics["loss"])
    record("difference of the loss from TRL's", abs(ours.item() - theirs.item()))
    difference = relative(gradients(policy, ours), gradients(policy, theirs))
    record("relative difference of the gradient from TRL's", difference)
    assert abs(ours.item() - math.log(2)) > 0.01, "policy and reference are too alike for the comparison to mean much"
    assert abs(ours.item() - theirs.item()) <= TOLERANCE
    assert difference <= TOLERANCE


@pytest.mark.prove
def test_orpo_equals_trl(models: tuple[Any, Any], tokenizer: Any, tmp_path: Path, record: Record) -> None:
    pytest.importorskip("trl")
    policy, _ = models
    for name, lengths in (("one-token prompts", [1, 1, 1, 1]), ("long prompts", [1, 4, 9, 2])):
        pairs = random_pairs(lengths, seed=1)
        theirs, told = trl_orpo(tmp_path, policy, tokenizer, pairs)
        chosen, rejected = answer_logprobs(logprobs(policy, pairs), pairs)
        ours, metrics = preference.orpo(chosen, rejected, *answer_lengths(pairs), weight=0.3)
        record(f"{name}: difference of the odds loss from TRL's", abs(metrics["odds_loss"] + told["log_odds_ratio"]))
        assert abs(metrics["odds_loss"] + told["log_odds_ratio"]) <= TOLERANCE
        assert metrics["margin"] == pytest.approx(told["log_odds_chosen"], abs=TOLERANCE)
        assert metrics["accuracy"] == told["rewards/accuracies"]
        if name == "one-token prompts":
            difference = relative(gradients(policy, ours), gradients(policy, theirs))
            record("difference of the loss from TRL's", abs(ours.item() - theirs.item()))
            record("relative difference of the gradient from TRL's", difference)
            assert abs(ours.item() - theirs.item()) <= TOLERANCE
            assert difference <= TOLERANCE
