"""The result of a Tinker sample request, in its two encodings.

Owns the JSON shape, which samplers answer, and the way from there to the SampleResponse message of newer clients.
Invariant: a log-prob that was not computed is null in one and NaN in the other.
"""

from __future__ import annotations

from typing import Final, Literal

import msgspec
import numpy as np

from firebox.wire.proto import training_pb2 as pb

_NO_LOGPROB: Final = -99999.0
_STOP_REASONS: Final = {"stop": 0, "length": 1}

Alternatives = list[tuple[int, float]]


class SampledSequence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`tokens` [T] with the one it stopped at, `logprobs` [T] of the plain model, `topk_logprobs` T x k pairs."""

    stop_reason: Literal["stop", "length"]
    tokens: list[int]
    logprobs: list[float] | None = None
    topk_logprobs: list[Alternatives | None] | None = None


class SampleResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Prompt fields have one entry per prompt token, the first of them null."""

    sequences: list[SampledSequence]
    prompt_logprobs: list[float | None] | None = None
    topk_prompt_logprobs: list[Alternatives | None] | None = None
    prompt_cache_hit_tokens: int = 0


def to_proto(content: bytes) -> bytes | None:
    """The SampleResponse message for a result in JSON; None for JSON that is a failure."""
    try:
        result = msgspec.json.decode(content, type=SampleResult)
    except msgspec.ValidationError:
        return None
    message = pb.SampleResponse(prompt_cache_hit_tokens=result.prompt_cache_hit_tokens)
    for sequence in result.sequences:
        added = message.sequences.add(stop_reason=_STOP_REASONS[sequence.stop_reason])
        added.tokens = np.asarray(sequence.tokens, dtype="<i4").tobytes()
        if sequence.logprobs is not None:
            added.logprobs = _floats(sequence.logprobs)
        if sequence.topk_logprobs is not None:
            added.topk_sampled_logprobs.CopyFrom(_topk(sequence.topk_logprobs))
    if result.prompt_logprobs is not None:
        message.prompt_logprobs = _floats(result.prompt_logprobs)
    if result.topk_prompt_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk(result.topk_prompt_logprobs))
    encoded: bytes = message.SerializeToString()
    return encoded


def _floats(values: list[float] | list[float | None]) -> bytes:
    return np.asarray([np.nan if value is None else value for value in values], dtype="<f4").tobytes()


def _topk(rows: list[Alternatives | None]) -> pb.TopkLogprobs:
    k = max((len(row) for row in rows if row is not None), default=0)
    ids = np.zeros((len(rows), k), dtype="<i4")
    logprobs = np.full((len(rows), k), _NO_LOGPROB, dtype="<f4")
    for i, row in enumerate(rows):
        for j, (token, logprob) in enumerate(row or ()):
            ids[i, j], logprobs[i, j] = token, logprob
    return pb.TopkLogprobs(token_ids=ids.tobytes(), logprobs=logprobs.tobytes(), k=k, length=len(rows))
