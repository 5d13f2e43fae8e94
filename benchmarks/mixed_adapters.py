"""The throughput mode: small requests of many LoRA models in shared passes, against one pass for each.

Both sides are our own engine on the same requests; the losses must agree before anything is timed.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

from benchmarks._engine import TrainingEngine, command, datum, done
from benchmarks.harness import Comparison, interleave
from firebox.modeling.tiny import make_tiny
from firebox.wire.training import Forward, ForwardOutput, Result

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
    engine = TrainingEngine(model_dir, rank=RANK, num_models=num_models, mode="throughput").engine
    rng = random.Random(0)
    rows = [[rng.randrange(1000) for _ in range(num_tokens)] for _ in range(num_models)]
    commands = [
        command(Forward(data=[datum(row)], loss_fn="cross_entropy", backward=True), model)
        for model, row in enumerate(rows)
    ]

    def together() -> list[float]:
        return losses(engine.execute_together(commands))

    def alone() -> list[float]:
        return losses([engine.execute(command) for command in commands])

    for ours, expected in zip(together(), alone(), strict=True):
        assert abs(ours - expected) < 1e-6 * abs(expected), (ours, expected)
    what = f"forward_backward, {num_models} LoRA models, {num_tokens} tokens each"
    return interleave(what, "each in its own pass", together, alone, PAIRS)


def losses(results: list[Result]) -> list[float]:
    outputs = [done(result) for result in results]
    return [output.metrics["loss:sum"] for output in outputs if isinstance(output, ForwardOutput)]
