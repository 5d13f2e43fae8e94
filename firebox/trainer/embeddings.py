"""Passes over whole sequences: embeddings, their similarities, and a contrastive loss of them.

Owns pooling, the formulas on pooled vectors and their gradients. Does not know about log-probs or which model is
active. A request asks for one of these with `output` in its loss configuration.

Invariant: the whole request is one batch for what compares sequences, however many micro-batches it takes. Then the
hidden states are computed twice, so that no more than one micro-batch's graph is ever held.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from firebox.modeling.causal_lm import CausalLM
from firebox.trainer.batch import Example, MicroBatch, check_floats, check_tokens, pack, token_budget
from firebox.trainer.passes import PassResult, hidden_states
from firebox.wire.errors import FailedPrecondition, InvalidArgument
from firebox.wire.training import Datum, Forward, ForwardOutput, OutputTensor, output_tensor

_GRADS: Final = "embedding_grads"
_POOLINGS: Final = ("mean", "last")
_KEYS: Final = {
    "embedding": {"output", "pooling"},
    "cos_similarity_matrix": {"output", "pooling"},
    "contrastive_loss": {"output", "pooling", "num_queries", "num_extra_negatives", "temperature"},
}


class _Settings(NamedTuple):
    output: str
    pooling: str
    num_queries: int
    temperature: float


def wanted(request: Forward) -> bool:
    """Whether the request is one of these."""
    return "output" in request.loss_fn_config


def run(lm: CausalLM, request: Forward, max_length: int) -> PassResult:
    """Compute `request` with the model as it is; with `request.backward` gradients end up in the parameters' `grad`.

    Every datum with a gradient counts as one sequence and one loss token. Raises InvalidArgument before any
    computation when the request is wrong, FailedPrecondition when the loss or its derivative is not finite.
    """
    settings = _settings(request)
    examples = [_example(lm, request, i, max_length) for i in range(len(request.data))]
    batches = list(pack(examples, token_budget(lm.vocab_size), lm.device))
    at_once = request.backward and len(batches) == 1
    with torch.set_grad_enabled(at_once):
        parts = [_pooled(lm, batch, settings.pooling) for batch in batches]
    order = list(itertools.chain.from_iterable(batch.indices for batch in batches))
    leaf = torch.cat(parts).detach()[_inverse(order)].requires_grad_()
    if not request.backward:
        rows = _compared(leaf.detach()) if settings.output == "cos_similarity_matrix" else leaf.detach()
        outputs = [{"embedding": output_tensor(row.numpy())} for row in rows.cpu()]
        return _result(outputs, {}, 0)
    loss = _loss(settings, request, leaf)
    (slope_BD,) = torch.autograd.grad(loss, leaf)
    if not (torch.isfinite(loss) and torch.isfinite(slope_BD).all()):
        raise FailedPrecondition("data: the loss or its derivative is not finite", reason="LOSS_NOT_FINITE")
    for batch, part in zip(batches, parts, strict=True):
        (part if at_once else _pooled(lm, batch, settings.pooling)).backward(slope_BD[batch.indices])
    count = int((slope_BD != 0).any(-1).sum())
    metrics = {"loss:sum": loss.item()}
    if settings.output == "contrastive_loss":
        metrics["loss"] = loss.item()
    return _result([{} for _ in request.data], metrics, count)


def contrastive_loss(embeddings_BD: Tensor, num_queries: int, temperature: float) -> Tensor:
    """Bidirectional InfoNCE, a scalar: rows are queries, as many positives, then negatives that belong to no query.

    A query has to find its positive among all positives and negatives, a positive its query among all queries.
    """
    queries, documents = F.normalize(embeddings_BD, dim=-1).split([num_queries, len(embeddings_BD) - num_queries])
    scores = queries @ documents.T / temperature
    own = torch.arange(num_queries, device=scores.device)
    return (F.cross_entropy(scores, own) + F.cross_entropy(scores[:, :num_queries].T, own)) / 2


def _loss(settings: _Settings, request: Forward, embeddings_BD: Tensor) -> Tensor:
    """What is differentiated: the contrastive loss, or the client's derivative times what it was taken by."""
    if settings.output == "contrastive_loss":
        return contrastive_loss(embeddings_BD, settings.num_queries, settings.temperature)
    compared = _compared(embeddings_BD) if settings.output == "cos_similarity_matrix" else embeddings_BD
    grads = [_grads(f"data[{i}].loss_fn_inputs", datum, compared.shape[1]) for i, datum in enumerate(request.data)]
    return (compared * torch.from_numpy(np.stack(grads)).to(compared.device)).sum()


def _grads(where: str, datum: Datum, width: int) -> NDArray[np.float32]:
    if set(datum.loss_fn_inputs) != {_GRADS}:
        raise InvalidArgument(f"{where}: {sorted(datum.loss_fn_inputs)} must be {_GRADS!r} alone")
    return check_floats(f"{where}.{_GRADS}", datum.loss_fn_inputs[_GRADS], (width,))


def _compared(embeddings_BD: Tensor) -> Tensor:
    unit = F.normalize(embeddings_BD, dim=-1)
    return unit @ unit.T


def _pooled(lm: CausalLM, batch: MicroBatch, pooling: str) -> Tensor:
    """float32 [B, D], in the micro-batch's order."""
    rows = hidden_states(lm, batch).float().split(batch.lengths)
    return torch.stack([row.mean(0) if pooling == "mean" else row[-1] for row in rows])


def _result(outputs: list[dict[str, OutputTensor]], metrics: dict[str, float], count: int) -> PassResult:
    output = ForwardOutput(loss_fn_output_type="embedding_output", loss_fn_outputs=outputs, metrics=metrics)
    return PassResult(output, count, count)


def _inverse(order: Sequence[int]) -> Tensor:
    return torch.tensor(order).argsort()


def _example(lm: CausalLM, request: Forward, index: int, max_length: int) -> Example:
    tokens = check_tokens(f"data[{index}]", request.data[index], lm.vocab_size, max_length)
    return Example(tokens, np.empty((len(tokens), 0), dtype=np.int64), {})


def _settings(request: Forward) -> _Settings:
    given = request.loss_fn_config
    output, pooling = given["output"], given.get("pooling", "last")
    if request.loss_fn != "cross_entropy":
        raise InvalidArgument(f"loss_fn_config.output: goes with loss_fn 'cross_entropy' only, not {request.loss_fn!r}")
    if not request.data:
        raise InvalidArgument("data: the list is empty; send at least one datum")
    if output not in _KEYS:
        raise InvalidArgument(f"loss_fn_config.output: {output!r} is not supported; use one of {', '.join(_KEYS)}")
    if pooling not in _POOLINGS:
        raise InvalidArgument(f"loss_fn_config.pooling: {pooling!r} must be one of {', '.join(_POOLINGS)}")
    for key in given:
        if key not in _KEYS[output]:
            known = ", ".join(sorted(_KEYS[output]))
            raise InvalidArgument(f"loss_fn_config: {output} has no key {key!r}; its keys: {known}")
    if output != "contrastive_loss":
        return _Settings(str(output), str(pooling), 0, 1.0)
    if not request.backward:
        raise InvalidArgument("loss_fn_config.output: contrastive_loss is for forward_backward only")
    return _Settings(str(output), str(pooling), *_contrast(given, len(request.data)))


def _contrast(given: dict[str, float | str], num_datums: int) -> tuple[int, float]:
    num_queries, negatives = (_whole(given, key) for key in ("num_queries", "num_extra_negatives"))
    temperature = given.get("temperature")
    if not isinstance(temperature, int | float) or not temperature > 0:
        raise InvalidArgument(f"loss_fn_config.temperature: {temperature!r} must be a number above 0")
    if num_queries < 1 or 2 * num_queries + negatives != num_datums:
        raise InvalidArgument(
            f"data: {num_datums} datums are not num_queries {num_queries} (1 or more), as many positives and "
            f"num_extra_negatives {negatives}"
        )
    return num_queries, float(temperature)


def _whole(given: dict[str, float | str], key: str) -> int:
    value = given.get(key, 0)
    if not isinstance(value, int | float) or value != int(value) or value < 0:
        raise InvalidArgument(f"loss_fn_config.{key}: {value!r} must be a whole number, 0 or above")
    return int(value)
