"""From datums to packed micro-batches.

Owns the checks of a request's data and the packing under a token budget. Pure: knows the size of the vocabulary and
of the context, but no model.

Invariant: what leaves `check_datums` can be computed. The micro-batches of a request depend on that request alone,
never on what else is in flight, so results do not depend on company.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from firebox.trainer.losses import FLOAT_INPUTS
from firebox.wire.errors import InvalidArgument
from firebox.wire.training import Array, Datum, TensorData

_MAX_BATCH_TOKENS: Final = 8192
_MAX_CELLS: Final = 2**26
"""Numbers in one dense tensor of a datum; a sparse one of a few bytes could ask for any size."""
_MAX_LOGITS: Final = 2**27
"""Cells of one micro-batch's logits [T, V]: 512 MiB in float32, a few times that with its gradient."""


class Example(NamedTuple):
    """A checked datum: tokens [T] int64, targets [T] or [T, K] int64, inputs of the targets' shape, float32."""

    tokens: NDArray[np.int64]
    targets: NDArray[np.int64]
    inputs: dict[str, NDArray[np.float32]]


class MicroBatch(NamedTuple):
    """Examples laid end to end: `indices` says which datums of the request, in the order they are packed."""

    indices: list[int]
    lengths: list[int]
    tokens: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]


def token_budget(vocab_size: int) -> int:
    """How many tokens one micro-batch may hold before its logits grow too large; one longer datum goes alone."""
    return max(1, min(_MAX_BATCH_TOKENS, _MAX_LOGITS // vocab_size))


def check_datums(data: Sequence[Datum], required: Sequence[str], *, vocab_size: int, max_length: int) -> list[Example]:
    """Turn wire datums into examples.

    Raises InvalidArgument naming the datum, the field, the value and the rule: empty or too long sequences, token ids
    outside the vocabulary, missing, unknown, misshapen or non-finite inputs.
    """
    if not data:
        raise InvalidArgument("data: the list is empty; send at least one datum")
    return [_example(f"data[{i}]", datum, required, vocab_size, max_length) for i, datum in enumerate(data)]


def check_tokens(where: str, datum: Datum, vocab_size: int, max_length: int) -> NDArray[np.int64]:
    """A datum's tokens [T] int64; raises InvalidArgument as `check_datums` does."""
    for i, chunk in enumerate(datum.model_input.chunks):
        if chunk.type != "encoded_text":
            raise InvalidArgument(f"{where}.model_input.chunks[{i}]: type {chunk.type!r} is not supported; send text")
    pieces = [np.asarray(chunk.tokens, dtype=np.int64) for chunk in datum.model_input.chunks]
    ids = np.concatenate(pieces) if pieces else np.zeros(0, np.int64)
    if not len(ids):
        raise InvalidArgument(f"{where}.model_input: there are no tokens")
    if len(ids) > max_length:
        raise InvalidArgument(
            f"{where}.model_input: {len(ids)} tokens are more than the context of {max_length}; shorten the sequence"
        )
    return _check_ids(f"{where}.model_input", ids, vocab_size)


def check_floats(field: str, tensor: TensorData, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The finite numbers of a tensor of that shape, as float32; raises InvalidArgument naming `field`."""
    array = to_array(field, tensor).astype(np.float32, copy=False)
    if array.shape != shape:
        raise InvalidArgument(f"{field}: shape {list(array.shape)} must be {list(shape)}")
    if not np.isfinite(array).all():
        raise InvalidArgument(f"{field}: there is a NaN or an infinity; every value must be finite")
    return array


def pack(examples: Sequence[Example], budget: int, device: torch.device) -> Iterator[MicroBatch]:
    """Yield micro-batches of at most `budget` tokens.

    Examples are taken by length, because equal lengths side by side share one attention call. A batch holds one
    width K of targets and one set of inputs.
    """

    def layout(index: int) -> tuple[object, ...]:
        example = examples[index]
        return (example.targets.shape[1:], sorted(example.inputs))

    order = sorted(range(len(examples)), key=lambda i: (*layout(i), len(examples[i].tokens)))
    for _, group in itertools.groupby(order, key=layout):
        batch: list[int] = []
        size = 0
        for index in group:
            length = len(examples[index].tokens)
            if batch and size + length > budget:
                yield join(examples, batch, device)
                batch, size = [], 0
            batch.append(index)
            size += length
        yield join(examples, batch, device)


def join(examples: Sequence[Example], indices: list[int], device: torch.device) -> MicroBatch:
    """Lay the examples of `indices`, which must have the same inputs, end to end."""
    chosen = [examples[i] for i in indices]

    def cat(arrays: Sequence[Array]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)).to(device)

    return MicroBatch(
        indices=indices,
        lengths=[len(e.tokens) for e in chosen],
        tokens=cat([e.tokens for e in chosen]),
        targets=cat([e.targets for e in chosen]),
        inputs={name: cat([e.inputs[name] for e in chosen]) for name in chosen[0].inputs},
    )


def to_array(field: str, tensor: TensorData) -> Array:
    """The dense array of a wire tensor; raises InvalidArgument naming `field` when its parts do not fit together."""
    shape = tensor.shape
    if shape is not None and (min(shape, default=0) < 0 or math.prod(shape) > _MAX_CELLS):
        raise InvalidArgument(f"{field}: shape {shape} must be of 0 or more and at most {_MAX_CELLS} numbers")
    if tensor.sparse_crow_indices is not None:
        return _from_csr(field, tensor)
    values = np.asarray(tensor.data, dtype=tensor.dtype)
    if shape is None:
        return values
    if math.prod(shape) != values.size:
        raise InvalidArgument(f"{field}: {values.size} values do not fill shape {shape}")
    return values.reshape(shape)


def _from_csr(field: str, tensor: TensorData) -> Array:
    values = np.asarray(tensor.data, dtype=tensor.dtype)
    crow = np.asarray(tensor.sparse_crow_indices, dtype=np.int64)
    col = np.asarray([] if tensor.sparse_col_indices is None else tensor.sparse_col_indices, dtype=np.int64)
    shape = tensor.shape or []
    counts = np.diff(crow)
    fits = (
        len(shape) == 2
        and len(crow) == shape[0] + 1
        and crow[0] == 0
        and crow[-1] == len(col) == values.size
        and (counts >= 0).all()
        and ((col >= 0) & (col < shape[1])).all()
    )
    if not fits:
        raise InvalidArgument(f"{field}: the CSR indices do not fit shape {tensor.shape} and {values.size} values")
    dense = np.zeros(shape, dtype=values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), col] = values
    return dense


def _example(where: str, datum: Datum, required: Sequence[str], vocab_size: int, max_length: int) -> Example:
    tokens = check_tokens(where, datum, vocab_size, max_length)
    given = datum.loss_fn_inputs
    for name in ("target_tokens", *required):
        if name not in given:
            raise InvalidArgument(f"{where}.loss_fn_inputs: {name!r} is missing; this loss needs it")
    for name in given:
        if name != "target_tokens" and name not in FLOAT_INPUTS:
            known = ", ".join(("target_tokens", *FLOAT_INPUTS))
            raise InvalidArgument(f"{where}.loss_fn_inputs: {name!r} is not known; known inputs: {known}")
    targets = _targets(f"{where}.loss_fn_inputs.target_tokens", given["target_tokens"], len(tokens), vocab_size)
    inputs = {
        name: check_floats(f"{where}.loss_fn_inputs.{name}", tensor, targets.shape)
        for name, tensor in given.items()
        if name != "target_tokens"
    }
    return Example(tokens, targets, inputs)


def _targets(field: str, tensor: TensorData, length: int, vocab_size: int) -> NDArray[np.int64]:
    if tensor.dtype != "int64":
        raise InvalidArgument(f"{field}: dtype {tensor.dtype!r} must be 'int64'")
    array = to_array(field, tensor)
    if array.ndim not in (1, 2) or array.shape[0] != length or array.size == 0:
        raise InvalidArgument(
            f"{field}: shape {list(array.shape)} does not fit {length} input tokens; send [{length}] or [{length}, K]"
        )
    return _check_ids(field, array, vocab_size)


def _check_ids(field: str, ids: Array, vocab_size: int) -> NDArray[np.int64]:
    array = np.asarray(ids, dtype=np.int64)
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise InvalidArgument(f"{field}: token id {bad} is outside the vocabulary of {vocab_size}")
    return array
