"""One request's forward, and backward, over its micro-batches.

Owns the way from a checked request to log-probs, loss and gradients. Does not know which model is active, nor whether
gradients will be kept.

Invariant: the loss is differentiated on its own, with the log-probs as leaves. So what counts as a loss token, one
whose dLoss/dlogp is not zero, is the same for a built-in loss and for a client's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from firebox.modeling.attention import PackedCausal
from firebox.modeling.causal_lm import CausalLM, logprobs_of, packed_positions
from firebox.trainer.batch import Example, MicroBatch, check_datums, join, pack, token_budget
from firebox.trainer.losses import Loss, find_loss, resolve_config
from firebox.trainer.retained import Kept, Recording, Retained
from firebox.trainer.steps import Steps, at_one_go
from firebox.wire.errors import FailedPrecondition, InvalidArgument
from firebox.wire.training import Forward, ForwardOutput, OutputTensor, output_tensor


class PassResult(NamedTuple):
    output: ForwardOutput
    num_loss_tokens: int
    num_sequences: int


class _Scored(NamedTuple):
    """A micro-batch and its log-probs, with their graph when one was built."""

    batch: MicroBatch
    logprobs: Tensor
    top: dict[str, Tensor]


class Pass:
    """One checked request on its way: its examples, and what its micro-batches have given so far."""

    def __init__(self, lm: CausalLM, request: Forward, max_length: int) -> None:
        """Raises InvalidArgument, before any computation, when the request is wrong."""
        self.request = request
        self._loss = find_loss(request.loss_fn)
        self.top_k, given = _split_top_k(request, lm.vocab_size)
        self._config = resolve_config(request.loss_fn, self._loss, given)
        self.examples = check_datums(request.data, self._loss.required, vocab_size=lm.vocab_size, max_length=max_length)
        self._outputs: list[dict[str, OutputTensor]] = [{} for _ in self.examples]
        self._total, self._num_loss_tokens, self._num_sequences = 0.0, 0, 0

    def add(self, batch: MicroBatch, logprobs: Tensor, top: Mapping[str, Tensor]) -> Tensor:
        """Take in the log-probs of one micro-batch and return the derivative of its loss by them, of their shape.

        Raises FailedPrecondition when the loss or its derivative is not finite.
        """
        loss_sum, slope = _differentiate(self._loss, logprobs, batch, self._config)
        self._total += loss_sum
        counts = [int(_cells(part).any(-1).sum()) for part in slope.split(batch.lengths)]
        self._num_loss_tokens += sum(counts)
        self._num_sequences += sum(count > 0 for count in counts)
        _collect(self._outputs, batch, {"logprobs": logprobs.detach(), **top})
        return slope

    def result(self, metrics: Mapping[str, float] | None = None) -> PassResult:
        output = ForwardOutput(
            loss_fn_output_type=f"{self.request.loss_fn}_output",
            loss_fn_outputs=self._outputs,
            metrics={"loss:sum": self._total, **(metrics or {})},
        )
        return PassResult(output, self._num_loss_tokens, self._num_sequences)


def run(lm: CausalLM, request: Forward, max_length: int) -> PassResult:
    """All `steps` at one go."""
    return at_one_go(steps(lm, request, max_length))


def steps(lm: CausalLM, request: Forward, max_length: int, retained: Retained | None = None) -> Steps[PassResult]:
    """Compute `request` with the model as it is; with `request.backward` gradients end up in the parameters' `grad`.

    Pauses behind each micro-batch, and returns the result at the end. With `retained`, a forward pass may be kept
    there, and a backward pass on the same data starts from it. Raises what `Pass` and its `add` do.
    """
    going = Pass(lm, request, max_length)
    kept: list[Kept] = []
    recording = None
    if retained and request.loss_fn == "cross_entropy":
        if request.backward:
            kept = retained.take(going.examples)
        else:
            recording = retained.record(going.examples, lm)
    for batch, logprobs, top in _again(kept, going.examples) if kept else _score(lm, going, recording):
        slope = going.add(batch, logprobs, top)
        if request.backward:
            logprobs.backward(slope)
        yield
    if retained and recording:
        retained.keep(recording)
    counts_reuse = request.backward and request.loss_fn == "cross_entropy"
    return going.result({"reused_forward:sum": float(bool(kept))} if counts_reuse else None)


def _score(lm: CausalLM, going: Pass, recording: Recording | None) -> Iterator[_Scored]:
    for batch in pack(going.examples, token_budget(lm.vocab_size), lm.device):
        with recording.watch() if recording else torch.set_grad_enabled(going.request.backward):
            logits = lm.logits(hidden_states(lm, batch))
            logprobs = logprobs_of(logits, batch.targets)
        if recording:
            recording.add(batch.indices, logprobs)
        yield _Scored(batch, logprobs, _top(logits.detach(), going.top_k))


def _again(kept: Sequence[Kept], examples: Sequence[Example]) -> Iterator[_Scored]:
    """The micro-batches of an earlier pass, with the inputs that have come now."""
    for indices, logprobs in kept:
        yield _Scored(join(examples, indices, logprobs.device), logprobs, {})


def hidden_states(lm: CausalLM, batch: MicroBatch) -> Tensor:
    """The model's last hidden states [T, D] of a micro-batch."""
    return lm.hidden(batch.tokens, packed_positions(batch.lengths, lm.device), PackedCausal(batch.lengths))


def _differentiate(
    loss: Loss, logprobs: Tensor, batch: MicroBatch, config: Mapping[str, float]
) -> tuple[float, Tensor]:
    """The summed loss of a micro-batch and its derivative by the log-probs, of their shape."""
    with torch.enable_grad():
        leaf = logprobs.detach().requires_grad_()
        per_token = loss(leaf, batch.inputs, config, batch.lengths)
        (slope,) = torch.autograd.grad(per_token.sum(), leaf)
    loss_sum = per_token.detach().double().sum().item()
    if not (torch.isfinite(slope).all() and torch.isfinite(per_token).all()):
        raise FailedPrecondition(
            f"data: the loss or its derivative is not finite for datums {sorted(batch.indices)[:8]}; "
            "look for extreme advantages, weights or log-probs",
            reason="LOSS_NOT_FINITE",
        )
    return loss_sum, slope


def _split_top_k(request: Forward, vocab_size: int) -> tuple[int, dict[str, Any]]:
    given = dict(request.loss_fn_config)
    if request.backward or request.loss_fn != "cross_entropy" or "top_k" not in given:
        return 0, given
    top_k = given.pop("top_k")
    if isinstance(top_k, bool) or top_k != int(top_k) or not 1 <= top_k <= vocab_size:
        raise InvalidArgument(f"loss_fn_config.top_k: {top_k!r} must be a whole number from 1 to {vocab_size}")
    return int(top_k), given


def _top(logits: Tensor, top_k: int) -> dict[str, Tensor]:
    if not top_k:
        return {}
    values, indices = logits.topk(top_k, dim=-1)
    return {"top_k_logprobs": values - logits.logsumexp(-1, keepdim=True), "top_k_indices": indices}


def _cells(slope: Tensor) -> Tensor:
    """[T] or [T, K] -> whether each cell contributes, [T, K]."""
    return (slope != 0).reshape(slope.shape[0], -1)


def _collect(outputs: Sequence[dict[str, OutputTensor]], batch: MicroBatch, tensors: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        for index, part in zip(batch.indices, tensor.cpu().split(batch.lengths), strict=True):
            outputs[index][name] = output_tensor(part.numpy())
