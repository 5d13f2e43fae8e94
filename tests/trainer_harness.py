"""Specs for a tiny model, a trainer served on TCP by a process of its own, and an engine driven in this one."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from firebox.trainer.engine import Engine
from firebox.wire.training import (
    AdamParams,
    Chunk,
    Command,
    CreateModel,
    Datum,
    Failed,
    Forward,
    ForwardOutput,
    LoraConfig,
    ModelInput,
    Normalization,
    Operation,
    OptimStep,
    Result,
    TensorData,
)
from firebox.wire.worker import TrainerSpec, WorkerRuntime

BASE_MODEL = "accounts/local/models/tiny"

_SERVE = """
import socket, sys, msgspec, uvicorn
from firebox.trainer.server import build_app
from firebox.wire.worker import TrainerSpec
spec = msgspec.json.decode(sys.argv[1], type=TrainerSpec)
listener = socket.socket(fileno=int(sys.argv[2]))
uvicorn.Server(uvicorn.Config(build_app(spec), log_level="warning")).run(sockets=[listener])
"""


def trainer_spec(model_dir: Path, root: Path, job: str = "job", **changes: object) -> TrainerSpec:
    (root / "jobs" / job).mkdir(parents=True, exist_ok=True)
    settings = {
        "job": f"accounts/local/rlorTrainerJobs/{job}",
        "base_model": BASE_MODEL,
        "model_dir": str(model_dir),
        "job_dir": str(root / "jobs" / job),
        "jobs_dir": str(root / "jobs"),
        "max_context_length": 256,
        "runtime": WorkerRuntime(socket="", token=""),
    }
    return TrainerSpec(**(settings | changes))


@contextlib.contextmanager
def serving(spec: TrainerSpec, prelude: str = "") -> Iterator[str]:
    """Run a trainer process inside the block and yield its base URL; `prelude` is code that it runs first."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        command = [sys.executable, "-c", prelude + _SERVE, msgspec.json.encode(spec).decode(), str(listener.fileno())]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        # The listener exists already: the first request waits in its backlog until the model is loaded.
        assert httpx.get(f"{url}/api/v1/healthz", timeout=60).json() == {"status": "ok"}
        yield url
    finally:
        process.terminate()
        process.wait(timeout=20)


class Driver:
    """An engine in this process, and the models that it trains: `m` unless another one is named."""

    def __init__(self, spec: TrainerSpec, rank: int = 0) -> None:
        self.engine = Engine(spec)
        self.create(LoraConfig(rank=rank, seed=7))

    def create(self, lora: LoraConfig, model: str = "m") -> None:
        self.do(CreateModel(base_model=self.engine._spec.base_model, lora_config=lora), model)

    def do(self, operation: Operation, model: str = "m") -> Result:
        result = self.engine.execute(Command(model_id=model, operation=operation))
        assert not isinstance(result, Failed), result.error
        return result

    def forward(self, request: Forward, model: str = "m") -> ForwardOutput:
        output = self.do(request, model)
        assert isinstance(output, ForwardOutput)
        return output

    def error(self, operation: Operation, model: str = "m") -> str:
        result = self.engine.execute(Command(model_id=model, operation=operation))
        assert isinstance(result, Failed)
        assert result.category == "user"
        return result.error

    def backward(self, seed: int) -> None:
        self.do(forward(seed, backward=True))

    def step(self, learning_rate: float = 1e-3, normalization: Normalization = "num_loss_tokens") -> None:
        self.do(OptimStep(adam_params=AdamParams(learning_rate=learning_rate), normalization=normalization))

    def state(self, model: str = "m") -> dict[str, torch.Tensor]:
        """Copies of everything that a checkpoint of this model holds."""
        return {name: tensor.clone() for name, tensor in self.engine._models[model].tensors().items()}


def datum(row: Sequence[int] | NDArray[np.int64], **inputs: NDArray[np.float32]) -> Datum:
    """A row [T] as T-1 tokens and their targets; `inputs` are further loss inputs, float32 of [T-1]."""
    tensors = {name: TensorData(data=values, dtype="float32") for name, values in inputs.items()}
    tensors["target_tokens"] = TensorData(data=row[1:], dtype="int64")
    return Datum(model_input=ModelInput(chunks=[Chunk(tokens=row[:-1])]), loss_fn_inputs=tensors)


def forward(seed: int, *, backward: bool = False) -> Forward:
    rows = torch.randint(0, 1000, (2, 20), generator=torch.Generator().manual_seed(seed)).tolist()
    return Forward(data=[datum(row) for row in rows], loss_fn="cross_entropy", backward=backward)
