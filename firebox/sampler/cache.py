"""Keys and values of the live sequences, one slot each, and the two attention contexts that use them.

Owns the memory. Does not know requests, sampling or weights versions. Nothing outlives a sequence here, so a weight
swap can never serve keys of older weights to a new request.

Invariant: live sequences lie in slots 0..B-1, so a decode step attends to plain views, without a gather.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from firebox.modeling.attention import PackedCausal

_MIN_LENGTH = 128


class SlotCache:
    """Per layer, keys and values of shape [slots, Hk, S, D]; slots and S grow by doubling."""

    def __init__(self) -> None:
        self._slots = 0
        self._length = 0
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, slots: int, length: int) -> None:
        """Make room for `slots` sequences of up to `length` tokens each; what is stored stays."""
        if slots > self._slots or length > self._length:
            self._slots = max(self._slots, _power_of_two(slots))
            self._length = max(self._length, _MIN_LENGTH, _power_of_two(length))
            self._layers = {i: (self._grown(k), self._grown(v)) for i, (k, v) in self._layers.items()}

    def clear(self) -> None:
        """Give all memory back. One long sequence makes every slot long, so an idle cache keeps nothing."""
        self._slots = self._length = 0
        self._layers = {}

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of slot `source` to slot `target`."""
        for key, value in self._layers.values():
            key[target, :, :length] = key[source, :, :length]
            value[target, :, :length] = value[source, :, :length]

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of layer `index`, made at first use for keys `like` [T, Hk, D]."""
        if index not in self._layers:
            shape = (self._slots, like.shape[1], self._length, like.shape[2])
            # Zeros, not garbage: a masked NaN would still poison the sum over values.
            self._layers[index] = (like.new_zeros(shape), like.new_zeros(shape))
        return self._layers[index]

    def _grown(self, old: Tensor) -> Tensor:
        new = old.new_zeros((self._slots, old.shape[1], self._length, old.shape[3]))
        new[: old.shape[0], :, : old.shape[2]] = old
        return new


class Prefill:
    """Causal attention inside each of several packed prompts; prompt i (of `lengths[i]`) is stored in `slots[i]`."""

    def __init__(self, cache: SlotCache, lengths: Sequence[int], slots: Sequence[int]) -> None:
        self._cache, self._lengths, self._slots = cache, list(lengths), slots
        self._causal = PackedCausal(lengths)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.layer(layer, key)
        parts = zip(self._slots, key.split(self._lengths), value.split(self._lengths), strict=True)
        for slot, k, v in parts:
            keys[slot, :, : len(k)] = k.transpose(0, 1)
            values[slot, :, : len(v)] = v.transpose(0, 1)
        return self._causal.attend(layer, query, key, value, scale)


class Decode:
    """One new token for each of the first B slots; slot i holds `lengths[i]` tokens (int64 [B]) before it."""

    def __init__(self, cache: SlotCache, lengths: Tensor, longest: int) -> None:
        self._cache, self._lengths, self._end = cache, lengths, longest + 1
        self._rows = torch.arange(len(lengths), device=lengths.device)
        seen = torch.arange(self._end, device=lengths.device) <= lengths.unsqueeze(-1)
        self._mask = seen[:, None, None, :]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        keys, values = self._cache.layer(layer, key)
        keys[self._rows, :, self._lengths] = key
        values[self._rows, :, self._lengths] = value
        batch = len(self._rows)
        # The query heads that share a key head become the query axis: keys are never repeated.
        grouped = query.unflatten(1, (key.shape[1], -1))
        out = F.scaled_dot_product_attention(
            grouped, keys[:batch, :, : self._end], values[:batch, :, : self._end], attn_mask=self._mask, scale=scale
        )
        return out.flatten(1, 2)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
