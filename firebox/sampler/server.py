"""The sampler's HTTP surface: completions, chat, hot-load and status.

Owns the way from a body to a generation and back. Does not compute, and does not authenticate: the host in front
of this app does. Invariant: every request ends, by an answer, an error envelope, its deadline or the client leaving.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final

import msgspec
import torch
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from firebox.modeling.causal_lm import load_causal_lm
from firebox.sampler.answers import Answers, perf_metrics, sample_result
from firebox.sampler.engine import Engine
from firebox.sampler.hotload import Hotloader
from firebox.sampler.scheduler import Generation, Params
from firebox.sampler.text import Text
from firebox.sampler.turns import Turns
from firebox.wire.errors import FireboxError, Internal, InvalidArgument, Unavailable
from firebox.wire.sample_request import decode_order
from firebox.wire.sampling import ChatRequest, CompletionRequest, decode_request, inference_envelope
from firebox.wire.worker import HotloadCommand, SamplerSpec

REQUEST_ID_HEADER: Final = "x-request-id"
DEFAULT_MAX_TOKENS: Final = 1024
"""Length of an answer when the request gives none, or less where the context ends first."""

logger = logging.getLogger(__name__)

Endpoint = Callable[[Request], Awaitable[Response]]


def build_app(spec: SamplerSpec, *, deadline_s: float = 3600.0) -> Starlette:
    """Load the model of `spec` and make the app; a request may take `deadline_s` seconds from arrival to its end.

    Raises FailedPrecondition when the model or its adapter cannot be served.
    """
    torch.set_num_threads(spec.runtime.threads)
    model_dir = Path(spec.model_dir)
    lm = load_causal_lm(model_dir, dtype=getattr(torch, spec.dtype), bitwise=spec.runtime.mode == "bitwise")
    text = Text(model_dir)
    engine = Engine(lm, max_batch=spec.max_batch, decode=text.decode_raw)
    hotloader = Hotloader(spec, lm, engine)
    room = min(spec.max_context_length, lm.model.config.get_text_config().max_position_embeddings)
    server = _Server(spec, engine, hotloader, text, vocab_size=lm.vocab_size, context=room, deadline_s=deadline_s)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        engine.start()
        yield
        await engine.stop()

    routes = [
        Route("/v1/completions", _answering(server.completions), methods=["POST"]),
        Route("/v1/chat/completions", _answering(server.chat_completions), methods=["POST"]),
        Route("/worker/sample", _answering(server.sample), methods=["POST"]),
        Route("/worker/hotload", _answering(server.hotload), methods=["POST"]),
        Route("/worker/status", _answering(server.status), methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


class _Server:
    """The endpoints, and the limits that requests are checked against."""

    def __init__(
        self,
        spec: SamplerSpec,
        engine: Engine,
        hotloader: Hotloader,
        text: Text,
        *,
        vocab_size: int,
        context: int,
        deadline_s: float,
    ) -> None:
        self._spec, self._engine, self._hotloader, self._text = spec, engine, hotloader, text
        self._turns = Turns(hotloader.serve, hotloader.is_live)
        self._vocab_size, self._context, self._deadline_s = vocab_size, context, deadline_s

    async def completions(self, request: Request) -> Response:
        body = decode_request(await request.body(), CompletionRequest)
        prompt = self._text.encode(body.prompt) if isinstance(body.prompt, str) else body.prompt
        return await self._generate(request, body, prompt, field="prompt")

    async def chat_completions(self, request: Request) -> Response:
        body = decode_request(await request.body(), ChatRequest)
        messages = [{"role": message.role, "content": message.text} for message in body.messages]
        return await self._generate(request, body, self._text.encode_chat(messages), field="messages")

    async def sample(self, request: Request) -> Response:
        """Samples of the weights that the request itself names, whatever was asked before."""
        order = decode_order(await request.body())
        generation = self._generation(order.request.completion(), order.request.tokens, "prompt")
        async with self._turns.using(order.snapshot, self._deadline_s):
            self._engine.submit(generation)
            async with self._watched(generation):
                await _until_done(request, generation)
        return _json(sample_result(generation, order.request))

    async def hotload(self, request: Request) -> Response:
        try:
            command = msgspec.json.decode(await request.body(), type=HotloadCommand)
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"hotload: {error}") from error
        await self._hotloader.load(command)
        return await self.status(request)

    async def status(self, _: Request) -> Response:
        return _json(self._hotloader.status())

    async def _generate(
        self, request: Request, body: CompletionRequest | ChatRequest, prompt: list[int], *, field: str
    ) -> Response:
        self._hotloader.check_serving()
        generation = self._generation(body, prompt, field)
        answers = Answers(body, generation, self._text)
        self._engine.submit(generation)
        if body.stream:
            return StreamingResponse(self._stream(generation, answers), media_type="text/event-stream")
        async with self._watched(generation):
            await _until_done(request, generation)
        headers = {f"fireworks-{name}": value for name, value in perf_metrics(generation).items()}
        return _json(answers.whole(), headers=headers)

    async def _stream(self, generation: Generation, answers: Answers) -> AsyncIterator[bytes]:
        try:
            async with self._watched(generation):
                done = False
                while not done:
                    await generation.updated.wait()
                    generation.updated.clear()
                    done = generation.done  # read before the tokens, so that the last round sees them all
                    _raise_failure(generation)
                    for chunk in answers.chunks():
                        yield b"data: " + msgspec.json.encode(chunk) + b"\n\n"
        except FireboxError as error:
            # The status line is gone; an event with the envelope is how this plane reports a failure in a stream.
            yield b"event: error\ndata: " + json.dumps(inference_envelope(error)).encode() + b"\n\n"
        else:
            yield b"data: [DONE]\n\n"

    @contextlib.asynccontextmanager
    async def _watched(self, generation: Generation) -> AsyncIterator[None]:
        """Bound the wait by the deadline, and free the generation's slots however it ends."""
        try:
            async with asyncio.timeout(self._deadline_s):
                yield
        except TimeoutError as error:
            raise Unavailable(
                f"not finished within {self._deadline_s:g} s; ask for fewer tokens, or retry when the load is lower",
                reason="DEADLINE_EXCEEDED",
            ) from error
        finally:
            self._engine.cancel(generation)

    def _generation(self, body: CompletionRequest | ChatRequest, prompt: list[int], field: str) -> Generation:
        self._check_prompt(prompt, field)
        self._check_ids("stop", body.stop_ids)
        if body.n > self._spec.max_batch:
            raise InvalidArgument(f"n: {body.n}: at most {self._spec.max_batch} here; send several requests")
        echo = body.echo_limit != 0 if isinstance(body, CompletionRequest) else False
        params = Params(
            max_tokens=self._max_tokens(body, len(prompt), echo=echo),
            temperature=body.temperature,
            top_k=max(body.top_k, 0),
            top_p=body.top_p,
            seed=body.seed,
            stop_ids=frozenset(body.stop_ids) | (frozenset() if body.ignore_eos else self._text.eos_ids),
            stop_strings=tuple(body.stop_strings),
            top_logprobs=min(body.top_logprobs_count, self._vocab_size) if body.wants_logprobs else 0,
            prompt_logprobs=echo and body.wants_logprobs,
        )
        return Generation(prompt=tuple(prompt), params=params, n=body.n, stream=body.stream)

    def _check_prompt(self, prompt: list[int], field: str) -> None:
        if not prompt:
            raise InvalidArgument(f"{field}: [] is empty; give at least one token")
        self._check_ids(field, prompt)
        if len(prompt) > self._context:
            raise InvalidArgument(
                f"{field}: {len(prompt)} tokens do not fit into the context of {self._context}; shorten the prompt",
                reason="CONTEXT_EXCEEDED",
            )

    def _check_ids(self, field: str, ids: list[int]) -> None:
        bad = next((token for token in ids if not 0 <= token < self._vocab_size), None)
        if bad is not None:
            raise InvalidArgument(f"{field}: {bad} is not a token id; use 0 to {self._vocab_size - 1}")

    def _max_tokens(self, body: CompletionRequest | ChatRequest, prompt: int, *, echo: bool) -> int:
        room = self._context - prompt
        if body.max_tokens is None and room > 0:
            return min(DEFAULT_MAX_TOKENS, room)
        wanted = 1 if body.max_tokens is None else body.max_tokens
        if wanted > room:
            raise InvalidArgument(
                f"max_tokens: {wanted} after a prompt of {prompt} tokens exceeds the context of {self._context}; "
                f"use at most {room}",
                reason="CONTEXT_EXCEEDED",
            )
        if wanted == 0 and not echo:
            raise InvalidArgument("max_tokens: 0 gives an empty answer; use at least 1, or echo to score the prompt")
        return wanted


async def _until_done(request: Request, generation: Generation) -> None:
    """Wait for the generation, or for the client to leave (the answer then goes nowhere)."""
    waits = [asyncio.ensure_future(generation.updated.wait()), asyncio.ensure_future(_disconnected(request))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    if not generation.done:
        raise Unavailable("the client has left", reason="CLIENT_DISCONNECTED")
    _raise_failure(generation)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _raise_failure(generation: Generation) -> None:
    if generation.error is not None:
        raise generation.error


def _answering(endpoint: Endpoint) -> Endpoint:
    """Turn the error tree into envelopes, and send the caller's request id back."""

    async def answer(request: Request) -> Response:
        try:
            response = await endpoint(request)
        except FireboxError as error:
            response = _json(inference_envelope(error), status=error.status)
        except Exception as error:  # noqa: BLE001 - the edge of the process: a bug becomes an envelope, never a bare 500
            response = _report_bug(request, error)
        response.headers[REQUEST_ID_HEADER] = request.headers.get(REQUEST_ID_HEADER) or uuid.uuid4().hex
        return response

    return answer


def _report_bug(request: Request, error: Exception) -> Response:
    logger.error("%s failed", request.url.path, exc_info=error)
    bug = Internal(f"the sampler failed: {type(error).__name__}: {error}")
    return _json(inference_envelope(bug), status=bug.status)


def _json(body: object, *, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(body), status_code=status, headers=headers, media_type="application/json")
