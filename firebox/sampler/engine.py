"""The engine: one thread that turns waiting generations into tokens.

Owns the model's compute and the slot cache; every touch of the live weights happens on its thread. Does not know
HTTP, text or files.

The loop is receive, schedule, compute, answer. Invariant: whatever fails in one turn fails the generations of that
turn, with a reason, and never the thread.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from firebox.modeling.causal_lm import CausalLM, logprobs_of, packed_positions
from firebox.sampler.cache import Decode, Prefill, SlotCache
from firebox.sampler.sample import Settings, draw, top_logprobs
from firebox.sampler.scheduler import Generation, Scheduler, Sequence, Token
from firebox.wire.errors import FireboxError, Internal, Unavailable

_PREFILL_BUDGET = 8192
"""Prompt tokens per turn: bounds how long live sequences wait for newcomers, and the memory of a turn."""

_SCORE_ROWS = 1024
"""Prompt log-probs are computed this many positions at a time: full logits of a long prompt may not fit."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Swap:
    """Run `apply` between two turns; tokens carry `identity` from then on. With `drain`, live sequences end first."""

    apply: Callable[[], None]
    identity: str | None
    drain: bool
    done: Future[None] = field(default_factory=Future)


class Engine:
    """Continuous batching over one model. All public methods are for the event loop that called `start`."""

    def __init__(self, lm: CausalLM, *, max_batch: int, decode: Callable[[list[int]], str]) -> None:
        self._lm = lm
        self._decode_text = decode
        self._scheduler = Scheduler(max_batch=max_batch, prefill_budget=_PREFILL_BUDGET)
        self._cache = SlotCache()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._touched: dict[Generation, None] = {}
        self._swap: Swap | None = None
        self._identity: str | None = None
        self._cache_is_stale = False
        self._stopping = False
        self._in_flight = 0
        self._thread = threading.Thread(target=self._run, name="sampler-engine", daemon=True)

    @property
    def in_flight(self) -> int:
        """Generations submitted and not yet done."""
        return self._in_flight

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Fail what is unfinished and end the thread, after the turn in progress."""
        self._inbox.put(self._on_stop)
        await asyncio.to_thread(self._thread.join)

    def submit(self, generation: Generation) -> None:
        """Queue a generation; its `updated` event tells of progress."""
        self._in_flight += 1
        self._inbox.put(lambda: self._on_submit(generation))

    def cancel(self, generation: Generation) -> None:
        """Stop working for a generation that nobody waits for; no effect on one that is done."""
        self._inbox.put(lambda: self._on_cancel(generation))

    def swap(self, swap: Swap) -> None:
        """Queue a change of weights; `swap.done` resolves with it. Cancelling that future withdraws the change."""
        self._inbox.put(lambda: self._on_swap(swap))

    # Everything below runs on the engine's thread.

    def _run(self) -> None:
        with torch.inference_mode():
            while not self._stopping:
                self._turn()

    def _turn(self) -> None:
        self._receive()
        newcomers = self._schedule()
        try:
            self._compute(newcomers)
        except Exception as error:  # noqa: BLE001 - one bad turn must not end the thread that serves everybody
            self._abandon_turn(error)
        self._answer()

    def _abandon_turn(self, error: Exception) -> None:
        logger.error("a turn of the engine failed", exc_info=error)
        self._fail(self._scheduler.clear_live(), Internal(f"the sampler failed on this batch: {error}"))

    def _receive(self) -> None:
        """Handle what has arrived; wait for it only when there is nothing else to do."""
        wait = self._scheduler.idle and self._swap is None
        while wait or not self._inbox.empty():
            self._inbox.get()()
            wait = False

    def _schedule(self) -> list[Sequence]:
        """Swap weights when it is time, then admit newcomers; nobody is admitted while a swap waits for the others."""
        if self._swap is not None and (self._swap.done.cancelled() or not (self._swap.drain and self._scheduler.live)):
            self._apply(self._swap)
            self._swap = None
        return self._scheduler.admit() if self._swap is None else []

    def _compute(self, newcomers: list[Sequence]) -> None:
        if self._cache_is_stale:
            self._refill(self._scheduler.live[: len(self._scheduler.live) - len(newcomers)])
            self._cache_is_stale = False
        if newcomers:
            self._prefill(newcomers)
            self._retire()
        if self._scheduler.live:
            self._decode(self._scheduler.live)
            self._retire()

    def _answer(self) -> None:
        """Tell the event loop which generations are done, or have news for a stream: one call per turn."""
        if self._scheduler.idle:
            self._cache.clear()
        now = time.monotonic()
        for generation in self._touched:
            if not generation.done and all(sequence.finish for sequence in generation.sequences):
                generation.finished = now
        news = [(generation, generation.done) for generation in self._touched if generation.done or generation.stream]
        self._touched = {}
        if news:
            self._loop.call_soon_threadsafe(self._wake, news)

    def _wake(self, news: list[tuple[Generation, bool]]) -> None:
        for generation, done in news:
            self._in_flight -= done
            generation.updated.set()

    def _on_submit(self, generation: Generation) -> None:
        self._scheduler.submit(generation)

    def _on_cancel(self, generation: Generation) -> None:
        if not generation.done:
            self._scheduler.drop(generation)
            self._retire()
            self._fail([generation], Unavailable("the request was cancelled", reason="CANCELLED"))

    def _on_swap(self, swap: Swap) -> None:
        self._swap = swap

    def _on_stop(self) -> None:
        self._stopping = True
        self._fail(self._scheduler.clear(), Unavailable("the sampler is stopping; send the request again later"))
        if self._swap is not None:
            self._swap.done.cancel()

    def _fail(self, generations: Iterable[Generation], error: FireboxError) -> None:
        for generation in generations:
            generation.error = error
            generation.finished = time.monotonic()
            self._touched[generation] = None

    def _apply(self, swap: Swap) -> None:
        if not swap.done.set_running_or_notify_cancel():
            return
        try:
            swap.apply()
        except Exception as error:  # noqa: BLE001 - handed to whoever asked for the swap
            swap.done.set_exception(error)
        else:
            self._identity = swap.identity
            self._cache_is_stale = True
            swap.done.set_result(None)

    def _retire(self) -> None:
        for source, target in self._scheduler.retire():
            self._cache.copy(source, target, self._scheduler.live[target].stored)

    def _prefill(self, newcomers: list[Sequence]) -> None:
        """Run the prompts packed, fill the newcomers' slots, and draw each one's first token.

        Clients fan one prompt out into many requests: every distinct prompt is computed once, then copied.
        """
        first_slot = len(self._scheduler.live) - len(newcomers)
        slots_of: dict[tuple[int, ...], list[int]] = {}
        for slot, sequence in enumerate(newcomers, first_slot):
            slots_of.setdefault(sequence.generation.prompt, []).append(slot)
        prompts = sorted(slots_of, key=len)  # equal lengths side by side share one attention call
        lengths = [len(prompt) for prompt in prompts]
        self._cache.reserve(len(self._scheduler.live), lengths[-1])
        context = Prefill(self._cache, lengths, [slots_of[prompt][0] for prompt in prompts])
        tokens = self._tensor(list(itertools.chain.from_iterable(prompts)))
        hidden = self._lm.hidden(tokens, packed_positions(lengths, self._lm.device), context)
        for prompt, (slot, *others) in slots_of.items():
            for other in others:
                self._cache.copy(slot, other, len(prompt))
        self._score_prompts(newcomers, dict(zip(prompts, hidden.split(lengths), strict=True)))

        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        last = self._tensor(lengths).cumsum(0) - 1
        wanting = [sequence for sequence in newcomers if not sequence.finish_if_full()]
        self._touched.update((sequence.generation, None) for sequence in newcomers if sequence.finish)
        if wanting:
            rows = self._tensor([row_of[sequence.generation.prompt] for sequence in wanting])
            self._draw(wanting, self._lm.logits(hidden[last[rows]]))

    def _refill(self, running: list[Sequence]) -> None:
        """Compute keys and values of the first, running slots again: a token must depend on its own weights alone."""
        for slot, sequence in enumerate(running):
            tokens = [*sequence.generation.prompt, *(token.id for token in sequence.tokens[:-1])]
            context = Prefill(self._cache, [len(tokens)], [slot])
            self._lm.hidden(self._tensor(tokens), packed_positions([len(tokens)], self._lm.device), context)

    def _decode(self, live: list[Sequence]) -> None:
        """One more token for every live sequence, in one batched step."""
        stored = [sequence.stored for sequence in live]
        self._cache.reserve(len(live), max(stored) + 1)
        positions = self._tensor(stored)
        tokens = self._tensor([sequence.tokens[-1].id for sequence in live])
        hidden = self._lm.hidden(tokens, positions, Decode(self._cache, positions, max(stored)))
        self._draw(live, self._lm.logits(hidden))

    def _draw(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Append one token to each of `sequences` from its row of `logits` [B, V]."""
        params = [sequence.generation.params for sequence in sequences]
        settings = Settings(
            self._tensor([p.temperature for p in params], torch.float32),
            self._tensor([p.top_k for p in params]),
            self._tensor([p.top_p for p in params], torch.float64),
        )
        uniforms = self._tensor([sequence.uniform() for sequence in sequences], torch.float64)
        drawn = draw(logits, settings, uniforms)
        rows = zip(
            sequences,
            *(column.tolist() for column in drawn),
            self._alternatives(logits, [p.top_logprobs for p in params]),
            strict=True,
        )
        now = time.monotonic()
        for sequence, token, logprob, sampling_logprob, top in rows:
            generation = sequence.generation
            if not math.isfinite(logprob):
                generation.cancelled = True
                self._fail([generation], Internal("the loaded weights give logits that are not finite; load others"))
                continue
            generation.first_token = generation.first_token or now
            sequence.append(Token(token, logprob, sampling_logprob, top, self._identity), self._decode_text)
            self._touched[generation] = None

    def _score_prompts(self, newcomers: list[Sequence], hidden_of: dict[tuple[int, ...], Tensor]) -> None:
        """Fill `prompt_tokens` where it is wanted. The first token has no prediction: 0.0, as clients expect."""
        for generation in {sequence.generation: None for sequence in newcomers}:
            if not generation.params.prompt_logprobs:
                continue
            prompt, count = generation.prompt, generation.params.top_logprobs
            scored = [Token(prompt[0], 0.0, None, [(prompt[0], 0.0)][:count], self._identity)]
            targets = self._tensor(prompt[1:]).split(_SCORE_ROWS)
            for hidden, target in zip(hidden_of[prompt][:-1].split(_SCORE_ROWS), targets, strict=True):
                logits = self._lm.logits(hidden)
                tops = self._alternatives(logits, [count] * len(logits))
                values = zip(target.tolist(), logprobs_of(logits, target).tolist(), tops, strict=True)
                scored += [Token(token, logprob, None, top, self._identity) for token, logprob, top in values]
            generation.prompt_tokens = scored

    def _alternatives(self, logits: Tensor, counts: list[int]) -> list[list[tuple[int, float]]]:
        """Per row of `logits` [B, V], its `counts[row]` likeliest tokens with their log-probabilities."""
        if not any(counts):
            return [[]] * len(counts)
        tokens, logprobs = top_logprobs(logits, max(counts))
        rows = zip(tokens.tolist(), logprobs.tolist(), counts, strict=True)
        return [list(zip(ids, values, strict=True))[:count] for ids, values, count in rows]

    def _tensor(self, values: Iterable[float], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._lm.device)
