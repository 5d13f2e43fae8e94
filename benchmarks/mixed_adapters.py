"""The throughput mode: small requests of many LoRA models in shared passes, against one pass for each.

Both sides are our own engine on the same requests; the losses must agree before anything is timed.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import torch

from benchmarks.harness import Comparison, interleave
from firebox.modeling.tiny import make_tiny
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
    Result,
    TensorData,
)
from firebox.wire.worker import TrainerSpec, WorkerRuntime

PAIRS = 9
RANK = 8


def run() -> list[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder) / "tiny"
        make_tiny(model_dir)
        return [
            compare(model_dir, models, tokens) for models, tokens in ((32, 16), (8, 32), (32, 32), (8, 128), (8, 512))
        ]


def compare(model_dir: Path, num_models: int, num_tokens: int) -> Comparison:
    engine = make_engine(model_dir, num_models)
    rng = random.Random(0)
    commands = [
        Command(model_id=f"m{i}", operation=request([rng.randrange(1000) for _ in range(num_tokens)]))
        for i in range(num_models)
    ]

    def together() -> list[float]:
        return losses(engine.execute_together(commands))

    def alone() -> list[float]:
        return losses([engine.execute(command) for command in commands])

    for ours, expected in zip(together(), alone(), strict=True):
        assert abs(ours - expected) < 1e-6 * abs(expected), (ours, expected)
    what = f"forward_backward, {num_models} LoRA models, {num_tokens} tokens each"
    return interleave(what, "each in its own pass", together, alone, PAIRS)


def make_engine(model_dir: Path, num_models: int) -> Engine:
    jobs = Path(tempfile.mkdtemp(dir=model_dir.parent))
    (jobs / "job").mkdir()
    spec = TrainerSpec(
        job="accounts/local/rlorTrainerJobs/job",
        base_model="accounts/local/models/tiny",
        model_dir=str(model_dir),
        job_dir=str(jobs / "job"),
        jobs_dir=str(jobs),
        max_context_length=4096,
        lora_rank=RANK,
        runtime=WorkerRuntime(socket="", token="", threads=torch.get_num_threads(), mode="throughput"),
    )
    engine = Engine(spec)
    for seed in range(num_models):
        create = CreateModel(base_model=spec.base_model, lora_config=LoraConfig(rank=RANK, seed=seed))
        engine.execute(Command(model_id=f"m{seed}", operation=create))
    return engine


def request(tokens: list[int]) -> Forward:
    datum = Datum(
        model_input=ModelInput(chunks=[Chunk(tokens=tokens[:-1])]),
        loss_fn_inputs={"target_tokens": TensorData(data=tokens[1:], dtype="int64")},
    )
    return Forward(data=[datum], loss_fn="cross_entropy", backward=True)


def losses(results: list[Result]) -> list[float]:
    assert not [result for result in results if isinstance(result, Failed)]
    return [result.metrics["loss:sum"] for result in results if isinstance(result, ForwardOutput)]
