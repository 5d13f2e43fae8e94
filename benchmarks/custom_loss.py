"""A client's own loss against the built-in one, as the engine executes them, and with no graph kept in between.

Three engines take the same steps on the same rows: forward, then forward_backward with the derivative of the loss. The
same custom loss as the built-in one (the negative log-likelihood), so that only the way differs.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import Comparison, interleave
from benchmarks.train_step import Ours
from firebox.modeling.tiny import make_tiny
from firebox.trainer.retained import Retained
from firebox.wire.training import Datum, TensorData

PAIRS = 11
NUM_ROWS, SHORTEST, LONGEST = 16, 16, 256


def run() -> list[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder) / "tiny"
        make_tiny(model_dir)
        rng = random.Random(0)
        rows = [[rng.randrange(1000) for _ in range(rng.randint(SHORTEST, LONGEST))] for _ in range(NUM_ROWS)]
        kept, plain, builtin = (Trainer(model_dir, rows) for _ in range(3))
        plain.engine._retained = Retained(budget=0)
        loss, expected, reused = kept.custom(), builtin.builtin(), kept.num_reused
        assert reused == 1
        assert abs(loss - expected) < 1e-4 * abs(expected), (loss, expected)
        return [
            interleave("custom loss, graph kept", "built-in loss", kept.custom, builtin.builtin, PAIRS),
            interleave("custom loss, forward run twice", "built-in loss", plain.custom, builtin.builtin, PAIRS),
        ]


class Trainer(Ours):
    """Gradients only: the optimizer's step would be the same on both sides."""

    num_reused = 0

    def builtin(self) -> float:
        output = self.forward(self.data, backward=True)
        self.drop_gradients()
        return output.metrics["loss:sum"]

    def custom(self) -> float:
        weighed = [self.weigh(datum, np.zeros(len(datum.model_input.chunks[0].tokens))) for datum in self.data]
        scored = self.forward(weighed, backward=False)
        logprobs = [torch.from_numpy(out["logprobs"].data).requires_grad_() for out in scored.loss_fn_outputs]
        (-torch.cat(logprobs).sum()).backward()
        weighed = [self.weigh(d, -leaf.grad.numpy()) for d, leaf in zip(self.data, logprobs, strict=True)]
        output = self.forward(weighed, backward=True)
        self.num_reused += int(output.metrics["reused_forward:sum"])
        self.drop_gradients()
        return output.metrics["loss:sum"]

    def drop_gradients(self) -> None:
        self.engine._lm.model.zero_grad(set_to_none=True)

    @staticmethod
    def weigh(datum: Datum, weights: np.ndarray) -> Datum:
        weights_T = TensorData(data=weights.astype(np.float32), dtype="float32")
        return Datum(model_input=datum.model_input, loss_fn_inputs={**datum.loss_fn_inputs, "weights": weights_T})
