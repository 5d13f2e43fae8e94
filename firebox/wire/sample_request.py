"""The request for samples of Tinker clients, as a sampler gets it: whose weights, and what to draw.

Owns the fields, their ranges and what of them is not offered. Invariant: a field that would change the answer is obeyed
or refused, never dropped.
"""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from firebox.wire.errors import InvalidArgument
from firebox.wire.sampling import MAX_TOP_LOGPROBS, CompletionRequest, check_generation
from firebox.wire.worker import SnapshotRef

_Count = Annotated[int, Meta(ge=0)]
_TopK = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    tokens: list[int]
    type: str = "encoded_text"


class Prompt(msgspec.Struct, frozen=True, kw_only=True):
    chunks: list[Chunk]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """`stop` unset ends at the model's own end token; given, only what it lists ends an answer. `top_k` -1 is off."""

    max_tokens: _Count | None = None
    seed: int | None = None
    stop: str | list[str | int] | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = -1
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0


class SampleRequest(msgspec.Struct, frozen=True, kw_only=True):
    """`num_samples` answers to `prompt`; log-probs and alternatives of prompt and answer tokens where asked for."""

    prompt: Prompt
    sampling_params: SamplingParams
    num_samples: Annotated[int, Meta(ge=1)] = 1
    prompt_logprobs: bool | None = None
    prompt_logprobs_last_n: Annotated[int, Meta(ge=1)] | None = None
    topk_prompt_logprobs: _TopK = 0
    topk_sample_logprobs: _TopK = 0
    target_prompt_logprobs: Any = None
    prompt_alt_tokens_k: _Count = 0
    record_stability_info: bool | None = None

    @property
    def tokens(self) -> list[int]:
        return [token for chunk in self.prompt.chunks for token in chunk.tokens]

    @property
    def scores_prompt(self) -> bool:
        return bool(self.prompt_logprobs) or self.topk_prompt_logprobs > 0

    def completion(self) -> CompletionRequest:
        """The same as a completion request; raises InvalidArgument for what is not offered or makes no sense."""
        for name, asked in (
            ("target_prompt_logprobs", self.target_prompt_logprobs is not None),
            ("prompt_alt_tokens_k", self.prompt_alt_tokens_k > 0),
            ("record_stability_info", bool(self.record_stability_info)),
        ):
            if asked:
                raise InvalidArgument(f"{name} is not offered by this server; leave it out")
        if any(chunk.type != "encoded_text" for chunk in self.prompt.chunks):
            raise InvalidArgument("prompt: only chunks of tokens are accepted")
        last = self.prompt_logprobs_last_n
        if last is not None and not (self.scores_prompt and last < len(self.tokens)):
            raise InvalidArgument(
                f"prompt_logprobs_last_n: {last} needs prompt_logprobs and must be below the {len(self.tokens)} prompt "
                "tokens"
            )
        params = self.sampling_params
        request = CompletionRequest(
            prompt=self.tokens,
            n=self.num_samples,
            max_tokens=params.max_tokens,
            seed=params.seed,
            stop=params.stop,
            ignore_eos=params.stop is not None,
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            logprobs=True,
            top_logprobs=max(self.topk_prompt_logprobs, self.topk_sample_logprobs),
            echo=self.scores_prompt,
        )
        check_generation(request)
        return request


class SampleOrder(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /worker/sample`: draw from these weights, or from the base model's."""

    snapshot: SnapshotRef | None
    request: SampleRequest


def decode_order(body: bytes) -> SampleOrder:
    """Read the body; raises InvalidArgument naming the field that is wrong."""
    try:
        return msgspec.json.decode(body, type=SampleOrder)
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"sample: {str(error).replace('$.request.', '')}") from error
