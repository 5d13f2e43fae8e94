"""A trainer's engine in this process, as the comparisons drive it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from firebox.trainer.engine import Engine
from firebox.wire.training import (
    Chunk,
    Command,
    CreateModel,
    Datum,
    Failed,
    Forward,
    ForwardOutput,
    LoraConfig,
    ModelInput,
    Operation,
    Result,
    TensorData,
)
from firebox.wire.worker import ComputeMode, TrainerSpec, WorkerRuntime


class TrainingEngine:
    """Models named `m0`, `m1`, ... on one engine; of rank 0 they are one set of weights."""

    def __init__(self, model_dir: Path, *, rank: int = 0, num_models: int = 1, mode: ComputeMode = "exact") -> None:
        jobs = Path(tempfile.mkdtemp(dir=model_dir.parent))
        (jobs / "job").mkdir()
        spec = TrainerSpec(
            job="accounts/local/rlorTrainerJobs/job",
            base_model="accounts/local/models/tiny",
            model_dir=str(model_dir),
            job_dir=str(jobs / "job"),
            jobs_dir=str(jobs),
            max_context_length=4096,
            lora_rank=rank,
            runtime=WorkerRuntime(socket="", token="", threads=torch.get_num_threads(), mode=mode),
        )
        self.engine = Engine(spec)
        for number in range(num_models):
            self.do(CreateModel(base_model=spec.base_model, lora_config=LoraConfig(rank=rank, seed=number)), number)

    def do(self, operation: Operation, model: int = 0) -> Result:
        return done(self.engine.execute(command(operation, model)))

    def forward(self, data: Sequence[Datum], *, backward: bool, model: int = 0) -> ForwardOutput:
        output = self.do(Forward(data=list(data), loss_fn="cross_entropy", backward=backward), model)
        assert isinstance(output, ForwardOutput)
        return output


def command(operation: Operation, model: int = 0) -> Command:
    return Command(model_id=f"m{model}", operation=operation)


def done(result: Result) -> Result:
    assert not isinstance(result, Failed), result.error
    return result


def datum(row: Sequence[int]) -> Datum:
    return Datum(
        model_input=ModelInput(chunks=[Chunk(tokens=row[:-1])]),
        loss_fn_inputs={"target_tokens": TensorData(data=row[1:], dtype="int64")},
    )
