"""The worked examples of docs/reference/normalization.md, and accumulation however a batch is cut."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from proofs import Record

from firebox.modeling.causal_lm import CausalLM, load_causal_lm
from firebox.trainer import passes
from firebox.trainer.state import ModelState
from firebox.wire.training import AdamParams, Chunk, Datum, Forward, ModelInput, TensorData

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "normalization.md"


def table(first_column: str) -> list[list[str]]:
    """The rows of the page's table with that first column, without backticks."""
    lines = PAGE.read_text().replace("`", "").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    rows = [line.strip("|").split("|") for line in lines[start + 2 : lines.index("", start)]]
    assert rows
    return [[cell.strip() for cell in row] for row in rows]


@pytest.fixture(scope="module")
def lm(tiny_dir: Path) -> CausalLM:
    torch.set_num_threads(1)
    return load_causal_lm(tiny_dir)


def request(loss_fn: str, data: list[dict[str, np.ndarray]], *, backward: bool = True) -> Forward:
    datums = []
    for i, inputs in enumerate(data):
        row = np.random.default_rng(i).integers(0, 1000, len(next(iter(inputs.values()), np.zeros(4))) + 1)
        given = {name: TensorData(data=values.astype(np.float32), dtype="float32") for name, values in inputs.items()}
        given["target_tokens"] = TensorData(data=row[1:], dtype="int64")
        datums.append(Datum(model_input=ModelInput(chunks=[Chunk(tokens=row[:-1])]), loss_fn_inputs=given))
    return Forward(data=datums, loss_fn=loss_fn, backward=backward)


@pytest.mark.parametrize("row", table("request"), ids=lambda row: " ".join(row[:2]).replace(",", ""))
def test_what_counts(lm: CausalLM, row: list[str]):
    asked, cells, num_loss_tokens, num_sequences = row
    loss_fn, what = asked.split(", ")[:2]
    inputs = {what: np.array(cells.split(), dtype=float)} if cells else {}
    if what == "advantages":
        scored = passes.run(lm, request("cross_entropy", [{}], backward=False), 256).output.loss_fn_outputs[0]
        ratio = float(*re.findall(r"every ratio (\d+)", asked) or "1")
        inputs["logprobs"] = scored["logprobs"].data - np.log(ratio)
    with ModelState(dict(lm.model.named_parameters())).accumulating():
        result = passes.run(lm, request(loss_fn, [inputs]), 256)
    lm.model.zero_grad(set_to_none=True)
    assert (result.num_loss_tokens, result.num_sequences) == (int(num_loss_tokens), int(num_sequences))


@pytest.mark.parametrize("row", table("normalization"), ids=lambda row: row[0])
def test_the_step(row: list[str]):
    normalization, divided, norm, clipped = row
    for clip, expected in ((0.0, divided), (2.0, clipped)):
        parameter = torch.nn.Parameter(torch.zeros(2))
        state = ModelState({"p": parameter})
        parameter.grad = torch.tensor([6.0, 8.0])
        state.count(4, 2)
        adam = AdamParams(beta1=0.0, grad_clip_norm=clip, emit_grad_norm_metrics=True)
        metrics = state.optim_step(adam, normalization)  # without momentum, the first moment is the gradient used
        moment = state.tensors()["optimizer/p/exp_avg"]
        torch.testing.assert_close(moment, torch.tensor([float(x) for x in expected.split()]))
        assert metrics["grad_norm"] == pytest.approx(float(norm))


@pytest.mark.prove
def test_however_a_batch_is_cut_the_gradient_is_the_same(lm: CausalLM, record: Record):
    lengths = (20, 7, 33, 12, 12, 5, 41, 18)
    rng = np.random.default_rng(3)
    data = request("cross_entropy", [{"weights": rng.random(n) - 0.3} for n in lengths]).data
    gradients = {}
    for size in (8, 4, 1):
        state = ModelState(dict(lm.model.named_parameters()))
        for start in range(0, 8, size):
            with state.accumulating():
                part = Forward(data=data[start : start + size], loss_fn="cross_entropy", backward=True)
                result = passes.run(lm, part, 256)
            state.count(result.num_loss_tokens, result.num_sequences)
        assert state.tensors()["counters"].tolist() == [0, sum(lengths), 8]
        gradients[size] = torch.cat([p.grad.flatten() for p in state.parameters.values()])
        lm.model.zero_grad(set_to_none=True)
    for size in (4, 1):
        difference = ((gradients[size] - gradients[8]).norm() / gradients[8].norm()).item()
        record(f"relative difference of {8 // size}x{size} from 1x8", difference)
        assert difference <= 1e-6
