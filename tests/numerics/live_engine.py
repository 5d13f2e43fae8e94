"""An engine in this process on the tiny model, one thread, full-parameter or with adapters of any number of models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from trainer_harness import Driver, datum, trainer_spec

from firebox.trainer.engine import Engine
from firebox.wire.training import (
    AdamParams,
    Forward,
    LoadState,
    LoraConfig,
    OptimStep,
    OptimStepOutput,
    SaveState,
)
from firebox.wire.worker import ComputeMode, WorkerRuntime

Row = NDArray[np.int64]
Floats = NDArray[np.float32]


class LiveEngine(Driver):
    """`models` are created at once; jobs beneath the same `root` can load each other's checkpoints."""

    def __init__(
        self,
        model_dir: Path,
        root: Path,
        job: str,
        *,
        rank: int = 0,
        models: Sequence[str] = ("m",),
        mode: ComputeMode = "exact",
    ) -> None:
        runtime = WorkerRuntime(socket="", token="", threads=1, mode=mode)
        self.engine = Engine(trainer_spec(model_dir, root, job, lora_rank=rank, runtime=runtime))
        for seed, model in enumerate(models):
            self.create(LoraConfig(rank=rank, seed=seed), model)

    def logprobs(self, rows: Sequence[Row]) -> list[Floats]:
        """Log-probs [T-1] of each row [T]."""
        return self._forward("cross_entropy", rows, {}, False, "m")[1]

    def backward(
        self, loss_fn: str, rows: Sequence[Row], model: str = "m", **inputs: Sequence[Floats]
    ) -> tuple[float, list[Floats]]:
        """Accumulate the gradient; each keyword is a loss input with [T-1] floats per row. The loss and log-probs."""
        return self._forward(loss_fn, rows, inputs, True, model)

    def step(self, model: str = "m", learning_rate: float = 1e-3) -> float:
        """One step over what was accumulated; the gradient norm before it."""
        adam = AdamParams(learning_rate=learning_rate, eps=1e-8, grad_clip_norm=1.0, emit_grad_norm_metrics="basic")
        result = self.do(OptimStep(adam_params=adam, normalization="num_loss_tokens"), model)
        assert isinstance(result, OptimStepOutput)
        return result.metrics["grad_norm"]

    def save(self, name: str, model: str = "m") -> None:
        self.do(SaveState(name=name), model)

    def load(self, ref: str, model: str = "m") -> None:
        self.do(LoadState(ref=ref, optimizer=True), model)

    def state(self, model: str = "m") -> dict[str, torch.Tensor]:
        """Copies of all that the next result depends on, but for torch's generator, from which nothing here draws."""
        return {name: tensor for name, tensor in super().state(model).items() if name != "rng"}

    def _forward(
        self, loss_fn: str, rows: Sequence[Row], inputs: dict[str, Sequence[Floats]], backward: bool, model: str
    ) -> tuple[float, list[Floats]]:
        parts = [{name: values[index] for name, values in inputs.items()} for index in range(len(rows))]
        data = [datum(row, **part) for row, part in zip(rows, parts, strict=True)]
        result = self.forward(Forward(data=data, loss_fn=loss_fn, backward=backward), model)
        return result.metrics["loss:sum"], [output["logprobs"].data for output in result.loss_fn_outputs]


def random_rows(seed: int, lengths: Sequence[int] = (12, 20, 12, 17)) -> list[Row]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 1000, length) for length in lengths]
