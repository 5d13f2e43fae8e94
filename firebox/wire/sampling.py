"""The inference plane: completion and chat requests, and the shapes of their answers.

Owns field names, value ranges and the wording of what is wrong with a request. Does not know a vocabulary, a
context length or a tokenizer. Invariant: a field that would change the result is obeyed or refused, never dropped.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from firebox.wire.errors import FireboxError, InvalidArgument, envelope

MIN_TEMPERATURE: Final = 1e-5
MAX_TOP_LOGPROBS: Final = 128

FinishReason = Literal["stop", "length"]

# Fields we do not offer, each with the values that ask for nothing. Clients recognise this refusal by its wording
# and fall back.
_NOT_OFFERED: Final[dict[str, tuple[Any, ...]]] = {
    "routing_matrix_format": (),
    "top_sampling_logprobs": (),
    "top_sampling_format": (),
    "sampling_mask": (),
    "images": ([],),
    "tools": ([],),
    "functions": ([],),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "best_of": (1,),
    "suffix": ("",),
    "min_p": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
}

Count = Annotated[int, Meta(ge=0)]
TopLogprobs = Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)]


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What a completion and a chat request have in common.

    `temperature` 0 is greedy. `top_k` 0 or -1 is off. `stop` holds strings or token ids; the tokens that complete a
    stop stay in the answer's token ids, the stop itself is not in its text. `ignore_eos` leaves only `stop`.
    """

    model: str = ""
    max_tokens: Count | None = None
    temperature: Annotated[float, Meta(ge=0.0, le=100.0)] = 1.0
    top_p: Annotated[float, Meta(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = 0
    n: Annotated[int, Meta(ge=1)] = 1
    seed: int | None = None
    stop: str | list[str | int] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    stream: bool = False
    logprobs: bool | TopLogprobs = False
    top_logprobs: TopLogprobs = 0
    return_token_ids: bool = False
    perf_metrics_in_response: bool = False

    @property
    def stop_strings(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if isinstance(stop, str)]

    @property
    def stop_ids(self) -> list[int]:
        stops = self.stop if isinstance(self.stop, list) else []
        return [stop for stop in stops if isinstance(stop, int)] + self.stop_token_ids

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not False

    @property
    def top_logprobs_count(self) -> int:
        """Alternatives per token; the older convention puts the number into `logprobs` itself."""
        return max(self.top_logprobs, 0 if isinstance(self.logprobs, bool) else self.logprobs)


class CompletionRequest(GenerationRequest, kw_only=True):
    """`POST /v1/completions`. `echo` puts the whole prompt in front of the answer, `echo_last` its last k tokens."""

    prompt: str | list[int]
    echo: bool = False
    echo_last: Count | None = None
    raw_output: bool = False

    @property
    def echo_limit(self) -> int | None:
        """How many prompt tokens to echo; None for all of them."""
        if self.echo_last is not None:
            return self.echo_last
        return None if self.echo else 0


class TextPart(msgspec.Struct, kw_only=True):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str
    content: str | list[TextPart] = ""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(GenerationRequest, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1)]
    max_completion_tokens: Count | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is None:
            self.max_tokens = self.max_completion_tokens


class TopLogprob(msgspec.Struct, kw_only=True):
    token: str
    token_id: int
    logprob: float


class TokenLogprob(msgspec.Struct, kw_only=True):
    """One token, in nats. `logprob` is the plain model's; `sampling_logprob` the distribution's that was drawn from
    (None for an echoed prompt token)."""

    token: str
    token_id: int
    logprob: float
    sampling_logprob: float | None
    top_logprobs: list[TopLogprob] | UnsetType = UNSET


class Logprobs(msgspec.Struct, kw_only=True):
    content: list[TokenLogprob]


class RawOutput(msgspec.Struct, kw_only=True):
    completion_token_ids: list[int]
    prompt_token_ids: list[int] | UnsetType = UNSET


class IdentitySpan(msgspec.Struct, kw_only=True):
    """`count` consecutive completion tokens from the weights of `snapshot_identity` (None: as started)."""

    snapshot_identity: str | None
    count: int


class TextChoice(msgspec.Struct, kw_only=True):
    """One choice of a completion, or the part of it that a stream chunk adds."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: Logprobs | None = None
    raw_output: RawOutput | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    snapshot_identities: list[IdentitySpan] | UnsetType = UNSET


class AssistantMessage(msgspec.Struct, kw_only=True):
    role: Literal["assistant"] | UnsetType = UNSET
    content: str


class ChatChoice(msgspec.Struct, kw_only=True):
    """One choice of a chat answer: `message` when whole, `delta` in a stream."""

    index: int
    finish_reason: FinishReason | None
    message: AssistantMessage | UnsetType = UNSET
    delta: AssistantMessage | UnsetType = UNSET
    logprobs: Logprobs | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    snapshot_identities: list[IdentitySpan] | UnsetType = UNSET


class Usage(msgspec.Struct, kw_only=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(msgspec.Struct, kw_only=True):
    """The whole answer, or one chunk of a stream. `perf_metrics` holds seconds and counts as strings, as headers do."""

    id: str
    object: str
    created: int
    model: str
    choices: list[TextChoice | ChatChoice]
    usage: Usage | UnsetType = UNSET
    perf_metrics: dict[str, str] | UnsetType = UNSET


_R = TypeVar("_R", CompletionRequest, ChatRequest)


def decode_request(body: bytes, kind: type[_R]) -> _R:
    """Parse and range-check a request; raises InvalidArgument naming the field, the value and what is allowed."""
    try:
        fields = msgspec.json.decode(body)
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"the body is not valid JSON: {error}", reason="MALFORMED_JSON") from error
    if not isinstance(fields, dict):
        raise InvalidArgument("the body must be a JSON object", reason="MALFORMED_JSON")
    fields = {name: value for name, value in fields.items() if value is not None}  # null means: not given
    for name, neutral in _NOT_OFFERED.items():
        if name in fields and fields[name] not in neutral:
            raise InvalidArgument(f"Extra inputs are not permitted, field: '{name}'", reason="FIELD_NOT_OFFERED")
    try:
        request = msgspec.convert(fields, kind)
    except msgspec.ValidationError as error:
        raise InvalidArgument(_explain(error, fields)) from error
    check_generation(request)
    return request


def check_generation(request: GenerationRequest) -> None:
    """Raise InvalidArgument for what the types of the fields cannot say."""
    if request.temperature and request.temperature < MIN_TEMPERATURE:
        raise InvalidArgument(f"temperature: {request.temperature}: use 0 for greedy, or at least {MIN_TEMPERATURE}")
    if "" in request.stop_strings:
        raise InvalidArgument("stop: '' would stop everything at once; leave it out or give a longer string")


def _explain(error: msgspec.ValidationError, fields: Mapping[str, Any]) -> str:
    reason, _, path = str(error).partition(" - at `$")
    name = re.split(r"[.\[`]", path.removeprefix("."))[0]
    value = repr(fields.get(name))
    shown = value if len(value) <= 80 else value[:77] + "..."
    return f"{name}: {shown}: {reason}" if name else reason


def inference_envelope(error: FireboxError) -> dict[str, Any]:
    """The error body of this plane: the common envelope, with the status name in `code` where clients expect text."""
    body = envelope(error)
    body["error"]["code"] = error.default_reason
    return body
