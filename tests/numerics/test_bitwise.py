"""Bitwise mode: the sampler's log-probs and the trainer's are equal, not merely close; and what it refuses."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
import torch
from proofs import Record, count
from test_sampler_matches_trainer import RUNTIME, Trainer, differences

from firebox.modeling.bitwise import check_row_invariance
from firebox.modeling.causal_lm import load_causal_lm
from firebox.trainer.engine import Engine
from firebox.wire.errors import FailedPrecondition
from firebox.wire.training import LoraConfig
from firebox.wire.worker import WorkerRuntime


@pytest.fixture
def bitwise(tiny_dir: Path) -> WorkerRuntime:
    """A runtime in bitwise mode; skips, with the probe's reason, where that mode refuses to start."""
    torch.set_num_threads(1)
    try:
        load_causal_lm(tiny_dir, bitwise=True)
    except FailedPrecondition as refusal:
        pytest.skip(str(refusal))
    return WorkerRuntime(socket=RUNTIME.socket, token=RUNTIME.token, mode="bitwise")


@pytest.mark.prove
def test_sampler_equals_trainer(tiny_dir: Path, tmp_path: Path, record: Record, bitwise: WorkerRuntime) -> None:
    trainer = Trainer(tiny_dir, tmp_path, LoraConfig(), bitwise)
    found = asyncio.run(differences(tiny_dir, trainer, ["base", "delta"], count(10, 50)))
    record("sequences", len(found))
    record("sequences whose bits differ", sum(difference != 0.0 for difference in found))
    assert set(found) == {0.0}


def test_without_the_mode_bits_depend_on_company(tiny_dir: Path, bitwise: WorkerRuntime) -> None:
    with pytest.raises(FailedPrecondition, match=r"differ from those computed together by \d\.\de-0\d"):
        check_row_invariance(load_causal_lm(tiny_dir))


def test_gradients_are_those_of_the_plain_kernels(tiny_dir: Path, bitwise: WorkerRuntime) -> None:
    tokens = torch.randint(1000, (150,), generator=torch.Generator().manual_seed(1))
    gradients = []
    for mode in (False, True):
        lm = load_causal_lm(tiny_dir, bitwise=mode)
        lm.score(tokens).mean().backward()
        gradients.append({name: p.grad for name, p in lm.model.named_parameters()})
    for name, plain in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], plain, rtol=1e-4, atol=1e-6)


def test_other_precisions_are_refused(tiny_dir: Path, tmp_path: Path, bitwise: WorkerRuntime) -> None:
    with pytest.raises(FailedPrecondition, match="it needs float32 on a CPU"):
        load_causal_lm(tiny_dir, dtype=torch.bfloat16, bitwise=True)
    spec = Trainer(tiny_dir, tmp_path, LoraConfig(), bitwise).spec
    with pytest.raises(FailedPrecondition, match="bitwise mode: bfloat16"):
        Engine(msgspec.structs.replace(spec, dtype="bfloat16"))
