"""Answers of the inference plane, built from what the engine has produced so far.

Owns text, token rows and timings of a choice, and their two spellings: completion and chat. Does not know HTTP.
A stream and a whole answer come from the same reader: a whole answer is a stream that was read once, at the end.
"""

from __future__ import annotations

import itertools
import time
import uuid
from dataclasses import dataclass

from msgspec import UNSET

from firebox.sampler.scheduler import Generation, Params, Sequence, Token
from firebox.sampler.text import Text
from firebox.wire.sample_request import SampleRequest
from firebox.wire.sample_result import SampledSequence, SampleResult
from firebox.wire.sampling import (
    AssistantMessage,
    ChatChoice,
    ChatRequest,
    Completion,
    CompletionRequest,
    FinishReason,
    IdentitySpan,
    Logprobs,
    RawOutput,
    TextChoice,
    TokenLogprob,
    TopLogprob,
    Usage,
)


@dataclass(frozen=True)
class Delta:
    """What one read added to a choice; `first` and `finish` mark the ends."""

    text: str
    tokens: list[Token]
    first: bool
    finish: FinishReason | None


class ChoiceReader:
    """Follows one sequence. The deltas' texts and tokens add up to the whole, whatever the rhythm of reading."""

    def __init__(self, sequence: Sequence, text: Text, echo_limit: int | None) -> None:
        self.sequence = sequence
        self._text = text
        self._params: Params = sequence.generation.params
        self._echo_limit = echo_limit
        self._read = 0
        self._decoder = text.stream()
        self._pending = ""
        self._sent = ""

    def read(self) -> Delta:
        """Everything since the last read."""
        finish = self.sequence.finish  # before the tokens: none is added once it is set
        new = self.sequence.tokens[self._read :]
        first = self._read == 0
        self._read += len(new)
        echoed = self._echo() if first else []
        text = self._text.decode([token.id for token in echoed]) + self._advance(new, finish)
        return Delta(text, echoed + new, first, finish)

    def raw_output(self) -> RawOutput:
        """All token ids of the choice, echoed ones in front, the stop token included."""
        return RawOutput(completion_token_ids=[token.id for token in self._echo() + self.sequence.tokens])

    def _echo(self) -> list[Token]:
        generation = self.sequence.generation
        count = len(generation.prompt) if self._echo_limit is None else min(self._echo_limit, len(generation.prompt))
        tokens = generation.prompt_tokens or [Token(token, 0.0, None, [], None) for token in generation.prompt]
        return tokens[len(tokens) - count :]

    def _advance(self, new: list[Token], finish: FinishReason | None) -> str:
        if finish is None:
            self._pending += self._decoder.push([token.id for token in new])
            # What could be the beginning of a stop string waits until it is known not to be one.
            held = max((len(stop) - 1 for stop in self._params.stop_strings), default=0)
            ready = self._pending[: max(len(self._pending) - held, 0)]
            self._pending = self._pending[len(ready) :]
            self._sent += ready
            return ready
        return self._final_text(finish)[len(self._sent) :]

    def _final_text(self, finish: FinishReason) -> str:
        ids = [token.id for token in self.sequence.tokens]
        if finish == "stop" and ids[-1] in self._params.stop_ids:
            ids.pop()
        text = self._text.decode(ids)
        if finish == "stop":
            found = [text.find(stop) for stop in self._params.stop_strings]
            return text[: min((at for at in found if at >= 0), default=len(text))]
        return text


class Answers:
    """Builds the answers of one generation, whole or as stream chunks."""

    def __init__(self, request: CompletionRequest | ChatRequest, generation: Generation, text: Text) -> None:
        self._request = request
        self._generation = generation
        self._text = text
        self._chat = isinstance(request, ChatRequest)
        self._id = f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._created = int(time.time())
        echo_limit = 0 if isinstance(request, ChatRequest) else request.echo_limit
        self._readers = [ChoiceReader(sequence, text, echo_limit) for sequence in generation.sequences]

    def whole(self) -> Completion:
        """The answer of a finished generation."""
        choices = [self._choice(reader, reader.read(), stream=False) for reader in self._readers]
        return self._envelope(choices, "chat.completion" if self._chat else "text_completion", last=True)

    def chunks(self) -> list[Completion]:
        """One chunk per choice that has news; the one that ends the last choice carries usage and timings."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        chunks = []
        for reader in list(self._readers):
            delta = reader.read()
            if delta.finish:
                self._readers.remove(reader)
            elif not delta.tokens:
                continue
            choice = self._choice(reader, delta, stream=True)
            chunks.append(self._envelope([choice], kind, last=not self._readers))
        return chunks

    def _envelope(self, choices: list[TextChoice | ChatChoice], kind: str, *, last: bool) -> Completion:
        answer = Completion(id=self._id, object=kind, created=self._created, model=self._request.model, choices=choices)
        if last:
            prompt = len(self._generation.prompt)
            completion = sum(len(sequence.tokens) for sequence in self._generation.sequences)
            answer.usage = Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)
            if self._request.perf_metrics_in_response:
                answer.perf_metrics = perf_metrics(self._generation)
        return answer

    def _choice(self, reader: ChoiceReader, delta: Delta, *, stream: bool) -> TextChoice | ChatChoice:
        sequence, request = reader.sequence, self._request
        logprobs = Logprobs(content=self._rows(delta.tokens)) if request.wants_logprobs else None
        spans = identity_spans(sequence.tokens) if delta.finish else UNSET
        ids = [token.id for token in delta.tokens] if request.return_token_ids else UNSET
        prompt_ids = list(self._generation.prompt) if request.return_token_ids and delta.first else UNSET
        if isinstance(request, ChatRequest):
            message = AssistantMessage(content=delta.text, role="assistant" if delta.first else UNSET)
            return ChatChoice(
                index=sequence.index,
                finish_reason=delta.finish,
                message=UNSET if stream else message,
                delta=message if stream else UNSET,
                logprobs=logprobs,
                token_ids=ids,
                prompt_token_ids=prompt_ids,
                snapshot_identities=spans,
            )
        return TextChoice(
            index=sequence.index,
            text=delta.text,
            finish_reason=delta.finish,
            logprobs=logprobs,
            raw_output=reader.raw_output() if request.raw_output and delta.finish else UNSET,
            token_ids=ids,
            prompt_token_ids=prompt_ids,
            snapshot_identities=spans,
        )

    def _rows(self, tokens: list[Token]) -> list[TokenLogprob]:
        piece, wants_top = self._text.piece, self._request.top_logprobs_count > 0
        return [
            TokenLogprob(
                token=piece(token.id),
                token_id=token.id,
                logprob=token.logprob,
                sampling_logprob=token.sampling_logprob,
                top_logprobs=[TopLogprob(token=piece(i), token_id=i, logprob=p) for i, p in token.top]
                if wants_top
                else UNSET,
            )
            for token in tokens
        ]


def sample_result(generation: Generation, request: SampleRequest) -> SampleResult:
    """A finished generation as the result of a Tinker sample request."""
    sequences = [
        SampledSequence(
            stop_reason=sequence.finish or "length",
            tokens=[token.id for token in sequence.tokens],
            logprobs=[token.logprob for token in sequence.tokens],
            topk_logprobs=[token.top[: request.topk_sample_logprobs] for token in sequence.tokens]
            if request.topk_sample_logprobs
            else None,
        )
        for sequence in generation.sequences
    ]
    prompt = generation.prompt_tokens
    unscored = 1 if request.prompt_logprobs_last_n is None else len(prompt) - request.prompt_logprobs_last_n
    return SampleResult(
        sequences=sequences,
        prompt_logprobs=[None] * unscored + [token.logprob for token in prompt[unscored:]]
        if request.prompt_logprobs
        else None,
        topk_prompt_logprobs=[None] * unscored
        + [token.top[: request.topk_prompt_logprobs] for token in prompt[unscored:]]
        if request.topk_prompt_logprobs
        else None,
    )


def identity_spans(tokens: list[Token]) -> list[IdentitySpan]:
    """Run-length list of the weights that produced `tokens`."""
    runs = itertools.groupby(tokens, key=lambda token: token.identity)
    return [IdentitySpan(snapshot_identity=identity, count=len(list(run))) for identity, run in runs]


def perf_metrics(generation: Generation) -> dict[str, str]:
    """Timings in seconds, and counts, of a finished generation, spelled as response headers spell them."""
    first = generation.first_token or generation.finished
    values = {
        "prefill-queue-duration": generation.admitted - generation.submitted,
        "prefill-duration": first - generation.admitted,
        "generation-queue-duration": 0.0,
        "generation-duration": generation.finished - first,
        "server-time-to-first-token": first - generation.submitted,
        "server-processing-time": generation.finished - generation.submitted,
    }
    metrics = {name: f"{value:.6f}" for name, value in values.items()}
    metrics["num-concurrent-requests"] = str(generation.concurrent)
    metrics["prompt-tokens"] = str(len(generation.prompt))
    metrics["cached-prompt-tokens"] = "0"
    return metrics
