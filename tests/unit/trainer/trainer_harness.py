"""Specs for a tiny model, a trainer served on TCP by a process of its own, and an engine driven in this one."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import msgspec
import torch

from firebox.trainer.engine import Engine
from firebox.wire.training import (
    AdamParams,
    Chunk,
    Command,
    CreateModel,
    Datum,
    Failed,
    Forward,
    LoraConfig,
    ModelInput,
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
    """One model on an engine in this process."""

    def __init__(self, spec: TrainerSpec, rank: int) -> None:
        self.engine = Engine(spec)
        lora = LoraConfig(rank=rank, seed=7)
        self.model_id = "m"
        self.do(CreateModel(base_model=spec.base_model, lora_config=lora))

    def do(self, operation: Operation) -> Result:
        result = self.engine.execute(Command(model_id=self.model_id, operation=operation))
        assert not isinstance(result, Failed), result.error
        return result

    def error(self, operation: Operation) -> str:
        result = self.engine.execute(Command(model_id=self.model_id, operation=operation))
        assert isinstance(result, Failed)
        assert result.category == "user"
        return result.error

    def backward(self, seed: int) -> None:
        self.do(forward(seed, backward=True))

    def step(self) -> None:
        self.do(OptimStep(adam_params=AdamParams(learning_rate=1e-3), normalization="num_loss_tokens"))

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.engine._models[self.model_id].tensors().items()}


def forward(seed: int, *, backward: bool = False) -> Forward:
    tokens = torch.randint(0, 1000, (2, 20), generator=torch.Generator().manual_seed(seed)).tolist()
    data = [
        Datum(
            model_input=ModelInput(chunks=[Chunk(tokens=row[:-1])]),
            loss_fn_inputs={"target_tokens": TensorData(data=row[1:], dtype="int64")},
        )
        for row in tokens
    ]
    return Forward(data=data, loss_fn="cross_entropy", backward=backward)
