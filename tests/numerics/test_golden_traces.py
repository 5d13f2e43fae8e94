"""Fifty steps of SFT, DPO, ORPO and GRPO on a pinned model, against losses and gradient norms recorded before.

Equal bit for bit on the kind of machine and the library that recorded them, to 1e-5 elsewhere. A change that is meant
to move them records them anew with FIREBOX_RECORD_GOLDEN=1 and says why in its commit.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from live_engine import Floats, LiveEngine, Row, random_rows
from proofs import Record, count
from torch import Tensor

from training.utils.losses import group_advantages

STEPS = 50
GOLDEN = Path(__file__).parent / "golden"
PROMPT = 5
"""Tokens in front of each row that only give context."""

Trace = dict[str, list[float]]
OneStep = Callable[[LiveEngine, int, Sequence[Floats]], float]


def fingerprint() -> dict[str, object]:
    """What decides the bits: the processor, the instructions torch chose on it, torch itself, the threads."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().partition("\n\n")[0].splitlines() if cpuinfo.exists() else []
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    cpu = [facts.get(name, "") for name in ("model name", "cpu family", "model", "stepping")]
    capability = torch.backends.cpu.get_cpu_capability()
    return {
        "cpu": [platform.machine(), *cpu],
        "instructions": [capability, os.environ.get("MKL_ENABLE_INSTRUCTIONS", "")],
        "torch": torch.__version__,
        "threads": 1,
    }


def rows_of(step: int) -> list[Row]:
    """Two pairs; the rows of a pair share their prompt."""
    rows = random_rows(step, (18, 24, 24, 15))
    for first, second in ((0, 1), (2, 3)):
        rows[second][:PROMPT] = rows[first][:PROMPT]
    return rows


def mask(row: Row) -> Floats:
    values = np.ones(len(row) - 1, dtype=np.float32)
    values[: PROMPT - 1] = 0
    return values


def sft(engine: LiveEngine, step: int, _: Sequence[Floats]) -> float:
    rows = rows_of(step)
    loss, _ = engine.backward("cross_entropy", rows, weights=[mask(row) for row in rows])
    return loss


def grpo(engine: LiveEngine, step: int, _: Sequence[Floats]) -> float:
    """The sampler's log-probs are the trainer's with noise, so that some ratios are clipped."""
    rows, rng = rows_of(step), np.random.default_rng(1000 + step)
    sampled = [own + rng.normal(0, 0.2, len(own)).astype(np.float32) for own in engine.logprobs(rows)]
    advantages = group_advantages(rng.random(len(rows)).tolist())
    values = [mask(row) * np.float32(advantage) for row, advantage in zip(rows, advantages, strict=True)]
    loss, _ = engine.backward("ppo", rows, logprobs=sampled, advantages=values)
    return loss


def dpo_loss(ours: Sequence[Tensor], reference: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    ratio = [((o - r) * m).sum() for o, r, m in zip(ours, reference, masks, strict=True)]
    return -(F.logsigmoid(0.5 * (ratio[0] - ratio[1])) + F.logsigmoid(0.5 * (ratio[2] - ratio[3])))


def orpo_loss(ours: Sequence[Tensor], reference: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    mean = [(o * m).sum() / m.sum() for o, m in zip(ours, masks, strict=True)]
    odds = [m - torch.log1p(-m.exp()) for m in mean]
    return -(mean[0] + mean[2]) - 0.5 * (F.logsigmoid(odds[0] - odds[1]) + F.logsigmoid(odds[2] - odds[3]))


def custom(formula: Callable[..., Tensor]) -> OneStep:
    """What clients do with a loss of their own: score, differentiate at home, send minus the derivative as weights."""

    def one_step(engine: LiveEngine, step: int, reference: Sequence[Floats]) -> float:
        rows = rows_of(step)
        leaves = [torch.from_numpy(own.copy()).requires_grad_() for own in engine.logprobs(rows)]
        loss = formula(leaves, [torch.from_numpy(r) for r in reference], [torch.from_numpy(mask(r)) for r in rows])
        slopes = torch.autograd.grad(loss, leaves)
        engine.backward("cross_entropy", rows, weights=[-slope.numpy() for slope in slopes])
        return loss.item()

    return one_step


LOSSES: dict[str, OneStep] = {"sft": sft, "dpo": custom(dpo_loss), "orpo": custom(orpo_loss), "grpo": grpo}


def run(tiny_dir: Path, root: Path, name: str, steps: int) -> Trace:
    engine = LiveEngine(tiny_dir, root, name)
    references = [[r.copy() for r in engine.logprobs(rows_of(step))] if name == "dpo" else [] for step in range(steps)]
    trace: Trace = {"loss": [], "grad_norm": []}
    for step in range(steps):
        trace["loss"].append(LOSSES[name](engine, step, references[step]))
        trace["grad_norm"].append(engine.step(learning_rate=3e-4))
    return trace


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The largest, relative to the trace's mean size: a loss of advantages of both signs may be next to nothing."""
    scale = float(np.abs(theirs).mean())
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / scale


@pytest.mark.prove
@pytest.mark.parametrize("name", LOSSES)
def test_the_trace_is_the_recorded_one(tiny_dir: Path, tmp_path: Path, name: str, record: Record):
    steps = count(10, STEPS)
    page = GOLDEN / f"{name}.json"
    if os.environ.get("FIREBOX_RECORD_GOLDEN") == "1":
        recorded = {"fingerprint": fingerprint(), **run(tiny_dir, tmp_path / "recorded", name, STEPS)}
        page.write_text(json.dumps(recorded, indent=1) + "\n")
    golden = json.loads(page.read_text())
    trace = run(tiny_dir, tmp_path / "first", name, steps)
    assert trace == run(tiny_dir, tmp_path / "second", name, steps), "two runs of one process differ"
    same_machine = golden["fingerprint"] == fingerprint()
    worst = max(difference(trace[key], golden[key][:steps]) for key in trace)
    record("steps", steps)
    record("recorded on the same kind of machine", same_machine)
    record("largest relative difference", worst)
    assert worst <= (0.0 if same_machine else 1e-5)
    assert len(golden["loss"]) == len(golden["grad_norm"]) == STEPS
