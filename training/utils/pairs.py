"""Preference pairs from rows to datums, and from the log-probs of datums back to pairs.

Knows no loss. Invariant: datums alternate, chosen before rejected. Legend: B pairs, T tokens of a datum's conversation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from training.utils import data
from training.utils.datums import build_datum
from training.utils.errors import DataError
from training.utils.render import Rendered, render_pair

if TYPE_CHECKING:
    from fireworks.training.sdk.types import Datum
    from torch import Tensor

Forward = Callable[[Sequence[Any]], Any]
"""Datums to a trainer's answer, whose `loss_fn_outputs` hold log-probs."""


class RenderedPair(NamedTuple):
    """A better and a worse answer to the same prompt; only the answers have weight."""

    chosen: Rendered
    rejected: Rendered

    @property
    def num_tokens(self) -> int:
        return sum(len(side.tokens) for side in self)

    @property
    def can_teach(self) -> bool:
        """Whether both answers have a token, and not the same ones."""
        return self.chosen.tokens != self.rejected.tokens and all(side.num_trained for side in self)


def load_pairs(
    source: data.Source,
    tokenizer: Any,
    limit: int,
    *,
    eval_fraction: float,
    seed: int,
    note: Callable[[str], None],
) -> tuple[list[RenderedPair], list[RenderedPair]]:
    """(training pairs, held-out pairs), rendered.

    Answers that end behind `limit` tokens are cut there, pairs that then no longer differ are left out, and both are
    counted aloud. Raises DataError when a side has no pair left.
    """
    pairs = data.load_preferences(source)
    note(data.describe(pairs, source))
    sides = []
    for name, side in zip(("training", "held-out"), data.split(pairs, eval_fraction, seed), strict=True):
        rendered = [RenderedPair(*render_pair(tokenizer, pair)) for pair in side]
        num_long = sum(len(answer.tokens) > limit for pair in rendered for answer in pair)
        if num_long:
            note(f"cut {num_long} of {2 * len(rendered)} {name} answers at {limit} tokens, stop token included")
        cut = [RenderedPair(*(answer.cut(limit) for answer in pair)) for pair in rendered]
        kept = [pair for pair in cut if pair.can_teach]
        if len(kept) < len(cut):
            left_out = f"left out {len(cut) - len(kept)} of {len(cut)} {name} pairs"
            note(f"{left_out}: within {limit} tokens their answers are alike or missing")
        if cut and not kept:
            raise DataError(f"{source}: no {name} pair fits {limit} tokens; use a shape that holds more")
        sides.append(kept)
    train, held_out = sides
    note(f"training on {len(train)} pairs; {len(held_out)} pairs held out")
    return train, held_out


def pair_datums(pairs: Sequence[RenderedPair]) -> list[Datum]:
    """Two datums per pair, chosen before rejected."""
    return [build_datum(side.tokens) for pair in pairs for side in pair]


def answer_logprobs(logprobs: Sequence[Tensor], pairs: Sequence[RenderedPair]) -> tuple[Tensor, Tensor]:
    """(chosen [B], rejected [B]): the log-prob of each answer, from log-probs [T-1] per datum, summed in float64."""
    import torch

    weights = [torch.tensor(side.weights[1:], dtype=torch.float64) for pair in pairs for side in pair]
    sums = torch.stack([(own.double() * weight).sum() for own, weight in zip(logprobs, weights, strict=True)])
    return sums[0::2], sums[1::2]


def answer_lengths(pairs: Sequence[RenderedPair]) -> tuple[Tensor, Tensor]:
    """(chosen [B], rejected [B]): how many tokens each answer has."""
    import torch

    lengths = torch.tensor([[side.num_trained for side in pair] for pair in pairs], dtype=torch.float64)
    return lengths[:, 0], lengths[:, 1]


def score(forward: Forward, pairs: Sequence[RenderedPair], batch_size: int) -> list[Tensor]:
    """Log-probs [T-1] of each datum of these pairs, asked for `batch_size` pairs at a time; no gradient is touched."""
    import torch

    logprobs: list[Tensor] = []
    for start in range(0, len(pairs), batch_size):
        outputs = forward(pair_datums(pairs[start : start + batch_size])).loss_fn_outputs
        logprobs += [torch.tensor(output["logprobs"].data) for output in outputs]
    return logprobs
