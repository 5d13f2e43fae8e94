"""Who is decoded, who waits, and when a sequence ends.

Owns the nouns of the sampler (Generation, Sequence, Token) and their order. Does not know tensors, HTTP or weights.

Invariant: `live[i]` is the sequence in cache slot i, and every generation leaves exactly once: finished, failed or
cancelled.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from firebox.wire.errors import FireboxError
from firebox.wire.sampling import FinishReason


class Token(NamedTuple):
    """One token and its log-probabilities in nats. `top` lists (token id, log-probability), best first."""

    id: int
    logprob: float
    sampling_logprob: float | None
    top: list[tuple[int, float]]
    identity: str | None


@dataclass(frozen=True, kw_only=True)
class Params:
    """How to continue a prompt. `top_logprobs` alternatives per token; `seed` None draws a fresh one."""

    max_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop_ids: frozenset[int] = frozenset()
    stop_strings: tuple[str, ...] = ()
    top_logprobs: int = 0
    prompt_logprobs: bool = False

    @property
    def stop_window(self) -> int:
        """Trailing tokens that surely hold a stop string whose end has just arrived: one token is one byte at least."""
        return max(len(stop.encode()) for stop in self.stop_strings) + 4


class Sequence:
    """One continuation. `tokens` only grows, by the engine's thread; `finish` is set after the last one."""

    def __init__(self, generation: Generation, index: int) -> None:
        self.generation = generation
        self.index = index
        self.tokens: list[Token] = []
        self.finish: FinishReason | None = None
        seed = generation.params.seed
        self._random = random.Random(None if seed is None else f"{seed}/{index}")

    def uniform(self) -> float:
        """The next number in [0, 1) of this sequence's own stream."""
        return self._random.random()

    @property
    def stored(self) -> int:
        """How many of its tokens the cache holds between two steps: all but the newest."""
        return len(self.generation.prompt) + len(self.tokens) - 1

    def append(self, token: Token, decode: Callable[[list[int]], str]) -> None:
        """Add a token, and finish when it completes a stop or reaches `max_tokens`."""
        self.tokens.append(token)
        params = self.generation.params
        if token.id in params.stop_ids or (params.stop_strings and self._ends_in_stop(decode)):
            self.finish = "stop"
        else:
            self.finish_if_full()

    def finish_if_full(self) -> bool:
        """Finish at `max_tokens`; a request may ask for none at all, to have its prompt scored."""
        if len(self.tokens) >= self.generation.params.max_tokens:
            self.finish = "length"
        return self.finish is not None

    def _ends_in_stop(self, decode: Callable[[list[int]], str]) -> bool:
        params = self.generation.params
        tail = decode([token.id for token in self.tokens[-params.stop_window :]])
        return any(stop in tail for stop in params.stop_strings)


@dataclass(eq=False, kw_only=True)
class Generation:
    """One request: `n` sequences from one prompt. Made and awaited on the event loop, filled by the engine's thread.

    `updated` is set, on the event loop, when it is done and, if `stream`, when there are new tokens. Times are
    seconds of the monotonic clock, 0 for not yet; `concurrent` counts the live sequences at its admission.
    """

    prompt: tuple[int, ...]
    params: Params
    n: int = 1
    stream: bool = False
    sequences: list[Sequence] = field(init=False)
    prompt_tokens: list[Token] = field(default_factory=list)
    updated: asyncio.Event = field(default_factory=asyncio.Event)
    error: FireboxError | None = None
    cancelled: bool = False
    submitted: float = field(default_factory=time.monotonic)
    admitted: float = 0.0
    first_token: float = 0.0
    finished: float = 0.0
    concurrent: int = 0

    def __post_init__(self) -> None:
        self.sequences = [Sequence(self, index) for index in range(self.n)]

    @property
    def done(self) -> bool:
        return self.finished > 0.0


class Scheduler:
    """First come, first served: a waiting generation is admitted when all its sequences fit beside the live ones."""

    def __init__(self, *, max_batch: int, prefill_budget: int) -> None:
        self._max_batch = max_batch
        self._prefill_budget = prefill_budget
        self._waiting: deque[Generation] = deque()
        self.live: list[Sequence] = []

    @property
    def idle(self) -> bool:
        return not self._waiting and not self.live

    def submit(self, generation: Generation) -> None:
        self._waiting.append(generation)

    def admit(self) -> list[Sequence]:
        """Move waiting generations to the live ones: as many as fit, within the budget of prompt tokens per step."""
        first, tokens = len(self.live), 0
        while self._waiting and len(self.live) + self._waiting[0].n <= self._max_batch:
            tokens += len(self._waiting[0].prompt)
            if tokens > self._prefill_budget and len(self.live) > first:
                break
            generation = self._waiting.popleft()
            generation.admitted = time.monotonic()
            self.live.extend(generation.sequences)
            generation.concurrent = len(self.live)
        return self.live[first:]

    def retire(self) -> list[tuple[int, int]]:
        """Drop sequences that finished or were cancelled; returns the (from, to) slot moves that close the gaps."""
        ended = [s.finish is not None or s.generation.cancelled for s in self.live]
        count = len(ended) - sum(ended)
        holes = [slot for slot in range(count) if ended[slot]]
        movers = [slot for slot in range(count, len(ended)) if not ended[slot]]
        moves = list(zip(movers, holes, strict=True))
        for source, target in moves:
            self.live[target] = self.live[source]
        del self.live[count:]
        return moves

    def drop(self, generation: Generation) -> None:
        """Forget a generation that nobody waits for any more; live sequences leave at the next `retire`."""
        generation.cancelled = True
        if generation in self._waiting:
            self._waiting.remove(generation)

    def clear_live(self) -> Iterable[Generation]:
        """Take out every live sequence; returns their generations."""
        generations = {sequence.generation: None for sequence in self.live}
        self.live = []
        return generations

    def clear(self) -> Iterable[Generation]:
        """Take out everything, live and waiting."""
        waiting, self._waiting = self._waiting, deque()
        return [*self.clear_live(), *waiting]
