"""The trainer's numbers against slow references: plain transformers with autograd, peft, and formulas by hand."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from proofs import Record
from transformers import AutoModelForCausalLM

from firebox.modeling.causal_lm import CausalLM, load_causal_lm
from firebox.trainer import passes
from firebox.trainer.lora import Adapter
from firebox.trainer.optimizer import AdamW
from firebox.trainer.state import ModelState
from firebox.wire.errors import FailedPrecondition
from firebox.wire.training import AdamParams, Chunk, Datum, Forward, LoraConfig, ModelInput, TensorData

LENGTHS = (5, 31, 12, 12, 1)


@pytest.fixture(scope="module")
def lm(tiny_dir: Path) -> CausalLM:
    torch.set_num_threads(1)
    return load_causal_lm(tiny_dir)


def rows(lm: CausalLM) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, lm.vocab_size, (n + 1,), generator=generator) for n in LENGTHS]


def request(rows: list[torch.Tensor], loss_fn: str = "cross_entropy", **inputs: list[torch.Tensor]) -> Forward:
    data = [
        Datum(
            model_input=ModelInput(chunks=[Chunk(tokens=row[:-1].tolist())]),
            loss_fn_inputs={
                "target_tokens": TensorData(data=row[1:].tolist(), dtype="int64"),
                **{name: TensorData(data=values[i].tolist(), dtype="float32") for name, values in inputs.items()},
            },
        )
        for i, row in enumerate(rows)
    ]
    return Forward(data=data, loss_fn=loss_fn, backward=True)


def per_token(scale: float, shift: float = 0.0, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) * scale + shift for n in LENGTHS]


def plain_logprobs(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=row[None, :-1]).logits[0].float()
    return logits.log_softmax(-1).gather(-1, row[1:, None])[:, 0]


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of any tensor, which is at most 1e-5."""
    assert ours.keys() == theirs.keys()
    differences = {n: ((g - theirs[n]).norm() / theirs[n].norm().clamp(min=1e-12)).item() for n, g in ours.items()}
    worst = max(differences, key=lambda name: differences[name])
    assert differences[worst] <= 1e-5, f"{worst}: relative difference {differences[worst]:.2e}"
    return differences[worst]


def reference_loss(name: str, new: torch.Tensor, old: torch.Tensor, advantage: torch.Tensor) -> torch.Tensor:
    ratio = torch.exp(new - old)
    if name == "importance_sampling":
        return -(ratio * advantage).sum()
    clipped = torch.clamp(ratio, 0.8, 1.2)
    return -torch.min(ratio * advantage, clipped * advantage).sum()


@pytest.mark.prove
def test_cross_entropy_gradient_equals_plain_transformers(lm: CausalLM, tiny_dir: Path, record: Record):
    data, weights = rows(lm), per_token(1.0)
    state = ModelState(dict(lm.model.named_parameters()))
    with state.accumulating():
        result = passes.run(lm, request(data, weights=weights), 256)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    loss = -sum((w * plain_logprobs(model, row)).sum() for row, w in zip(data, weights, strict=True))
    loss.backward()
    worst = assert_close(
        {n: p.grad for n, p in lm.model.named_parameters()}, {n: p.grad for n, p in model.named_parameters()}
    )
    record("largest relative difference of a gradient", worst)
    record("relative difference of the loss", abs(result.output.metrics["loss:sum"] / loss.item() - 1))
    assert result.output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
    for row, output in zip(data, result.output.loss_fn_outputs, strict=True):
        torch.testing.assert_close(
            torch.from_numpy(output["logprobs"].data), plain_logprobs(model, row).detach(), atol=1e-5, rtol=0
        )
    assert (result.num_loss_tokens, result.num_sequences) == (sum(LENGTHS), len(LENGTHS))
    lm.model.zero_grad(set_to_none=True)


@pytest.mark.prove
@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo"])
def test_policy_gradients_equal_plain_transformers(lm: CausalLM, tiny_dir: Path, loss_fn: str, record: Record):
    data, advantages, noise = rows(lm), per_token(1.0), per_token(0.3, seed=2)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    new = [plain_logprobs(model, row) for row in data]
    old = [n.detach() + e for n, e in zip(new, noise, strict=True)]
    loss = sum(reference_loss(loss_fn, *parts) for parts in zip(new, old, advantages, strict=True))
    loss.backward()
    with ModelState(dict(lm.model.named_parameters())).accumulating():
        result = passes.run(lm, request(data, loss_fn, logprobs=old, advantages=advantages), 256)
    worst = assert_close(
        {n: p.grad for n, p in lm.model.named_parameters()}, {n: p.grad for n, p in model.named_parameters()}
    )
    record("largest relative difference of a gradient", worst)
    assert result.output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-4)
    if loss_fn == "ppo":
        assert 0 < result.num_loss_tokens < sum(LENGTHS), "some tokens are clipped, and those do not count"
    lm.model.zero_grad(set_to_none=True)


def test_gradients_of_two_requests_add_up_and_a_failed_one_leaves_no_trace(lm: CausalLM):
    data = rows(lm)
    state = ModelState(dict(lm.model.named_parameters()))
    with state.accumulating():
        passes.run(lm, request(data), 256)
    whole = {n: p.grad.clone() for n, p in state.parameters.items()}
    lm.model.zero_grad(set_to_none=True)
    for part in (data[:2], data[2:]):
        with state.accumulating():
            passes.run(lm, request(part), 256)
    assert_close({n: p.grad for n, p in state.parameters.items()}, whole)
    before = {n: p.grad.clone() for n, p in state.parameters.items()}
    extreme = [torch.full((n,), 3e38) for n in LENGTHS]
    with pytest.raises(FailedPrecondition, match="not finite"), state.accumulating():
        passes.run(lm, request(data, "ppo", logprobs=per_token(0, -90), advantages=extreme), 256)
    assert all(torch.equal(p.grad, before[n]) for n, p in state.parameters.items())
    lm.model.zero_grad(set_to_none=True)


def test_forward_alone_touches_no_gradient(lm: CausalLM):
    asked = request(rows(lm))
    passes.run(lm, Forward(data=asked.data, loss_fn="cross_entropy", loss_fn_config={"top_k": 3}), 256)
    assert all(parameter.grad is None for parameter in lm.model.parameters())


def test_top_k_lists_the_best_tokens(lm: CausalLM, tiny_dir: Path):
    data = rows(lm)[:2]
    asked = Forward(data=request(data).data, loss_fn="cross_entropy", loss_fn_config={"top_k": 3})
    outputs = passes.run(lm, asked, 256).output.loss_fn_outputs
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    for row, output in zip(data, outputs, strict=True):
        expected = model(input_ids=row[None, :-1]).logits[0].log_softmax(-1).topk(3)
        assert output["top_k_indices"].data.tolist() == expected.indices.flatten().tolist()
        torch.testing.assert_close(
            torch.from_numpy(output["top_k_logprobs"].data), expected.values.flatten().detach(), atol=1e-5, rtol=0
        )


@pytest.mark.prove
def test_lora_equals_peft(lm: CausalLM, tiny_dir: Path, record: Record):
    adapter = Adapter(lm, LoraConfig(rank=4, seed=3, alpha=16))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in adapter.parameters.items():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    lm.model.requires_grad_(False)
    state = ModelState(adapter.parameters, adapter)
    with state.active(), state.accumulating():
        result = passes.run(lm, request(rows(lm)), 256)
    lm.model.requires_grad_(True)

    config = peft.LoraConfig(r=4, lora_alpha=16, target_modules=adapter.info.target_modules, task_type="CAUSAL_LM")
    base = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    model = peft.get_peft_model(base, config)
    theirs = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    assert theirs.keys() == adapter.parameters.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(adapter.parameters[name])
    loss = -sum(plain_logprobs(model, row).sum() for row in rows(lm))
    loss.backward()
    assert result.output.metrics["loss:sum"] == pytest.approx(loss.item(), rel=1e-5)
    worst = assert_close({n: p.grad for n, p in adapter.parameters.items()}, {n: p.grad for n, p in theirs.items()})
    record("largest relative difference of a gradient", worst)


def test_adapters_are_seeded_and_start_as_the_base_model(lm: CausalLM):
    one, same, other = (Adapter(lm, LoraConfig(rank=2, seed=seed)) for seed in (1, 1, 2))
    downs = [name for name in one.parameters if "lora_A" in name]
    assert all(torch.equal(one.parameters[n], same.parameters[n]) for n in one.parameters)
    assert not any(torch.equal(one.parameters[n], other.parameters[n]) for n in downs)
    plain = passes.run(lm, Forward(data=request(rows(lm)).data, loss_fn="cross_entropy"), 256).output.metrics
    with one.active():
        adapted = passes.run(lm, Forward(data=request(rows(lm)).data, loss_fn="cross_entropy"), 256).output.metrics
    assert adapted == plain


@pytest.mark.parametrize("normalization", ["none", "num_loss_tokens", "num_sequences"])
def test_step_is_normalize_then_clip_then_adamw(normalization: str):
    parameter = torch.nn.Parameter(torch.linspace(-1, 1, 12))
    theirs = torch.nn.Parameter(parameter.detach().clone())
    state = ModelState({"p": parameter})
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    divisor = {"none": 1, "num_loss_tokens": 7, "num_sequences": 2}[normalization]
    params = AdamParams(
        learning_rate=1e-2, eps=1e-8, weight_decay=0.1, grad_clip_norm=0.5, emit_grad_norm_metrics="basic"
    )
    for step in range(3):
        gradient = torch.randn(12, generator=torch.Generator().manual_seed(step)) * 4
        parameter.grad = gradient.clone()
        state.count(7, 2)
        metrics = state.optim_step(params, normalization)
        theirs.grad = gradient / divisor
        norm = torch.nn.utils.clip_grad_norm_([theirs], 0.5)
        reference.step()
        torch.testing.assert_close(parameter, theirs, atol=1e-7, rtol=1e-6)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
        assert metrics["grad_norm_post_clip"] == pytest.approx(min(norm.item(), 0.5))
    assert state.tensors()["counters"].tolist() == [3, 0, 0]


def test_gradients_that_are_not_finite_are_never_applied():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW({"p": parameter})
    parameter.grad = torch.tensor([1.0, float("nan"), 0.0])
    with pytest.raises(FailedPrecondition, match="not applied"):
        optimizer.step(AdamParams(), 1)
    assert parameter.tolist() == [1, 1, 1]
    assert parameter.grad is None
