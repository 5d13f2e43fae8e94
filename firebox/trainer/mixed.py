"""Forward and backward of several adapters' requests in shared passes: the throughput mode.

Small requests of many LoRA models leave a machine idle when each is its own pass. Here every request is packed as it
would be alone, and micro-batches of different models then share the base model's arithmetic, each on its own rows.

Owns which micro-batches ride together. Does not know models' states, nor whether gradients will be kept.

Invariant: a row meets its own adapter only. The results equal those of each request alone up to the rounding of
matrix products of another height.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch

from firebox.modeling.attention import PackedCausal
from firebox.modeling.causal_lm import CausalLM, logprobs_of, packed_positions
from firebox.trainer import embeddings
from firebox.trainer.batch import MicroBatch, pack, token_budget
from firebox.trainer.lora import Adapter, active_by_rows
from firebox.trainer.passes import Pass, PassResult
from firebox.wire.training import Forward

_SMALL: Final = 128
"""Tokens. Larger requests keep a CPU's matrix products busy on their own, and only pay for being split by rows."""


class Share(NamedTuple):
    """One model's request for forward and backward, and its adapter."""

    request: Forward
    adapter: Adapter


class _Part(NamedTuple):
    """A micro-batch, and the place of its request among those that run together."""

    owner: int
    batch: MicroBatch


def pays(request: Forward) -> bool:
    """Whether a request gains from sharing a pass: forward and backward of few tokens, for a loss on log-probs."""
    num_tokens = sum(len(chunk.tokens) for datum in request.data for chunk in datum.model_input.chunks)
    return request.backward and num_tokens <= _SMALL and not embeddings.wanted(request)


def run(lm: CausalLM, shares: Sequence[Share], max_length: int) -> list[PassResult]:
    """Compute the requests of different models together; gradients end up in each adapter's parameters' `grad`.

    Raises InvalidArgument or FailedPrecondition as `passes.run` would for one of them; what the others have got by
    then must be dropped.
    """
    going = [Pass(lm, share.request, max_length) for share in shares]
    budget = token_budget(lm.vocab_size)
    parts = [_Part(owner, batch) for owner, one in enumerate(going) for batch in pack(one.examples, budget, lm.device)]
    for together in _wagons(parts, budget):
        sizes = [len(part.batch.tokens) for part in together]
        lengths = list(itertools.chain.from_iterable(part.batch.lengths for part in together))
        rows = [(shares[part.owner].adapter, size) for part, size in zip(together, sizes, strict=True)]
        with torch.enable_grad(), active_by_rows(rows):
            tokens = torch.cat([part.batch.tokens for part in together])
            hidden = lm.hidden(tokens, packed_positions(lengths, lm.device), PackedCausal(lengths))
            logits = lm.logits(hidden).split(sizes)
        logprobs = [logprobs_of(own, part.batch.targets) for own, part in zip(logits, together, strict=True)]
        slopes = [going[part.owner].add(part.batch, own, {}) for own, part in zip(logprobs, together, strict=True)]
        torch.autograd.backward(logprobs, slopes)
    return [one.result({"models_together:max": float(len(going))}) for one in going]


def _wagons(parts: Sequence[_Part], budget: int) -> Iterator[list[_Part]]:
    """Neighbours, as long as they hold `budget` tokens at most; one larger part goes alone."""
    together: list[_Part] = []
    size = 0
    for part in parts:
        if together and size + len(part.batch.tokens) > budget:
            yield together
            together, size = [], 0
        together.append(part)
        size += len(part.batch.tokens)
    if together:
        yield together
