"""One training step of our engine against plain Hugging Face: a padded batch, its own loss, torch's AdamW.

Both take the same rows of uneven length from the same weights; the losses must agree before anything is timed.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks._engine import TrainingEngine, datum
from benchmarks.harness import Comparison, interleave
from firebox.modeling.tiny import make_tiny
from firebox.wire.training import AdamParams, OptimStep

LEARNING_RATE = 1e-5
PAIRS = 9


def run() -> list[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder) / "tiny"
        make_tiny(model_dir)
        return [
            compare(model_dir, "SFT step, 16 rows of 16 to 256 tokens", 16, 16, 256),
            compare(model_dir, "SFT step, 16 rows of 256 tokens", 16, 256, 256),
        ]


def compare(model_dir: Path, what: str, num_rows: int, shortest: int, longest: int) -> Comparison:
    rng = random.Random(0)
    rows = [[rng.randrange(1000) for _ in range(rng.randint(shortest, longest))] for _ in range(num_rows)]
    ours, theirs = Ours(model_dir, rows), Plain(model_dir, rows)
    loss, expected = ours.step(), theirs.step()
    assert abs(loss - expected) < 1e-4 * abs(expected), (loss, expected)
    return interleave(what, "plain transformers, padded", ours.step, theirs.step, PAIRS)


class Ours(TrainingEngine):
    """forward_backward and optim_step as commands to the engine."""

    def __init__(self, model_dir: Path, rows: list[list[int]]) -> None:
        super().__init__(model_dir)
        self.data = [datum(row) for row in rows]

    def step(self) -> float:
        output = self.forward(self.data, backward=True)
        self.do(OptimStep(adam_params=AdamParams(learning_rate=LEARNING_RATE), normalization="num_loss_tokens"))
        return output.metrics["loss:sum"]


class Plain:
    """What one would write without a server."""

    def __init__(self, model_dir: Path, rows: list[list[int]]) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="sdpa").train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LEARNING_RATE)
        width = max(map(len, rows))
        self.tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        self.mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        self.labels = self.tokens.masked_fill(self.mask == 0, -100)
        self.num_targets = sum(len(row) - 1 for row in rows)

    def step(self) -> float:
        loss = self.model(input_ids=self.tokens, attention_mask=self.mask, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item() * self.num_targets
