"""Embeddings, similarities and the contrastive loss against plain transformers with autograd."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from proofs import Record
from transformers import AutoModel

from firebox.modeling.causal_lm import CausalLM, load_causal_lm
from firebox.trainer import embeddings
from firebox.trainer.passes import PassResult
from firebox.trainer.state import ModelState
from firebox.wire.errors import InvalidArgument
from firebox.wire.training import Chunk, Datum, Forward, ModelInput, TensorData

LENGTHS = (5, 31, 12, 12, 1, 8)


@pytest.fixture(scope="module")
def lm(tiny_dir: Path) -> CausalLM:
    torch.set_num_threads(1)
    return load_causal_lm(tiny_dir)


@pytest.fixture(params=[False, True], ids=["one_batch", "many_batches"])
def small_batches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(embeddings, "token_budget", lambda vocab_size: 13)


def rows(lm: CausalLM) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, lm.vocab_size, (n,), generator=generator) for n in LENGTHS]


def run(lm: CausalLM, grads: list[torch.Tensor] | None = None, *, backward: bool, **config: float | str) -> PassResult:
    data = [
        Datum(
            model_input=ModelInput(chunks=[Chunk(tokens=row.numpy())]),
            loss_fn_inputs={} if grads is None else {"embedding_grads": tensor_data(grads[i])},
        )
        for i, row in enumerate(rows(lm))
    ]
    request = Forward(data=data, loss_fn="cross_entropy", loss_fn_config=config, backward=backward)
    return embeddings.run(lm, request, 256)


def tensor_data(values: torch.Tensor) -> TensorData:
    return TensorData(data=values.numpy(), dtype="float32", shape=list(values.shape))


def embedded(output: PassResult) -> torch.Tensor:
    return torch.stack([torch.from_numpy(out["embedding"].data) for out in output.output.loss_fn_outputs])


def plain(model: torch.nn.Module, lm: CausalLM, pooling: str) -> torch.Tensor:
    hidden = [model(input_ids=row[None]).last_hidden_state[0] for row in rows(lm)]
    return torch.stack([h.mean(0) if pooling == "mean" else h[-1] for h in hidden])


def gradients_of(lm: CausalLM, **asked: object) -> tuple[PassResult, dict[str, torch.Tensor]]:
    with ModelState(dict(lm.model.named_parameters())).accumulating():
        result = run(lm, backward=True, **asked)
    ours = {n: p.grad for n, p in lm.backbone.named_parameters()}
    lm.model.zero_grad(set_to_none=True)
    return result, ours


def worst(ours: dict[str, torch.Tensor], model: torch.nn.Module) -> float:
    theirs = {n: p.grad for n, p in model.named_parameters()}
    assert ours.keys() == theirs.keys()
    return max(((g - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-12)).item() for n, g in ours.items())


@pytest.mark.prove
@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("output", ["embedding", "cos_similarity_matrix"])
def test_the_clients_gradient_goes_through(lm: CausalLM, tiny_dir: Path, output: str, pooling: str, record: Record):
    model = AutoModel.from_pretrained(tiny_dir, dtype=torch.float32)
    expected = plain(model, lm, pooling)
    if output == "cos_similarity_matrix":
        expected = F.normalize(expected, dim=-1) @ F.normalize(expected, dim=-1).T
    scored = embedded(run(lm, backward=False, output=output, pooling=pooling))
    torch.testing.assert_close(scored, expected.detach(), atol=1e-5, rtol=1e-5)
    assert all(parameter.grad is None for parameter in lm.model.parameters())

    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    slope[2] = 0
    expected.backward(slope)
    result, ours = gradients_of(lm, grads=list(slope), output=output, pooling=pooling)
    record("largest relative difference of a gradient", worst(ours, model))
    assert worst(ours, model) <= 1e-5
    if output == "embedding":
        assert (result.num_loss_tokens, result.num_sequences) == (5, 5), "the third datum has no gradient"


@pytest.mark.prove
@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize(("num_queries", "negatives"), [(3, 0), (2, 2)])
def test_contrastive_loss(lm: CausalLM, tiny_dir: Path, num_queries: int, negatives: int, record: Record):
    model = AutoModel.from_pretrained(tiny_dir, dtype=torch.float32)
    unit = plain(model, lm, "last")
    unit = unit / unit.norm(dim=-1, keepdim=True)
    loss = torch.zeros(())
    for i in range(num_queries):
        found = torch.stack([unit[i] @ unit[j] / 0.05 for j in range(num_queries, len(LENGTHS))])
        back = torch.stack([unit[j] @ unit[num_queries + i] / 0.05 for j in range(num_queries)])
        loss = loss - (found.log_softmax(0)[i] + back.log_softmax(0)[i]) / (2 * num_queries)
    loss.backward()
    result, ours = gradients_of(
        lm, output="contrastive_loss", num_queries=num_queries, num_extra_negatives=negatives, temperature=0.05
    )
    record("largest relative difference of a gradient", worst(ours, model))
    assert worst(ours, model) <= 1e-5
    assert result.output.metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"output": "projection"}, "output: 'projection' is not supported; use one of embedding"),
        ({"output": "embedding", "pooling": "max"}, "pooling: 'max' must be one of mean, last"),
        ({"output": "embedding", "temperature": 1.0}, "embedding has no key 'temperature'; its keys: output, pooling"),
        ({"output": "embedding"}, r"data\[0\].loss_fn_inputs: \[\] must be 'embedding_grads' alone"),
        ({"output": "contrastive_loss", "num_queries": 4, "temperature": 1}, "6 datums are not num_queries 4"),
        ({"output": "contrastive_loss", "num_queries": 1.5, "temperature": 1}, "num_queries: 1.5 must be a whole"),
        ({"output": "contrastive_loss", "num_queries": 3}, "temperature: None must be a number above 0"),
    ],
)
def test_mistakes_are_the_users(lm: CausalLM, config: dict[str, float | str], told: str):
    with pytest.raises(InvalidArgument, match=told):
        run(lm, backward=True, **config)


def test_a_gradient_of_another_shape_is_refused(lm: CausalLM):
    with pytest.raises(InvalidArgument, match=r"data\[0\].loss_fn_inputs.embedding_grads: shape \[3\] must be"):
        run(lm, [torch.zeros(3)] * len(LENGTHS), backward=True, output="embedding")
