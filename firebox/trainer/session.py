"""Order and futures: the only holder of sequencing rules.

Every model has one sequence. Place 0 is its creation, the client's operations follow from 1 without gaps. Operations
may arrive in any order and more than once; they leave for the engine in order and once. A waiter is woken by an event.

Knows neither HTTP nor tensors. Runs on one event loop; only `_resolve` is reached from the engine's thread, through
that loop. Invariant: an accepted request id always gets exactly one result, and a place is consumed whether its
operation turns out well or not.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections import deque
from collections.abc import Callable
from typing import Final

from firebox.trainer.journal import Entry, Journal
from firebox.wire.errors import FailedPrecondition, FireboxError, InvalidArgument, NotFound, ResourceExhausted
from firebox.wire.training import (
    Command,
    CreateModel,
    CreateModelAddress,
    Failed,
    ModelCreated,
    ModelUnloaded,
    Operation,
    OperationAddress,
    Result,
    SaveState,
    UnloadModel,
    failed,
)

MAX_WAITING_BYTES: Final = 512 * 2**20
"""Of accepted requests without a result; what they take in memory is a small multiple."""
_KEEP_RESULT_S: Final = 600.0
_KEEP_READ_RESULT_S: Final = 120.0
"""For a client whose connection broke while it read; results may be large."""
_SOON_S: Final = 1.0
_MAX_EARLY: Final = 2048
"""How far ahead of its turn a request may come: what waits is kept, and the journal must still know all of it."""

Submit = Callable[[Command, Callable[[Result], None]], None]


class Future:
    """The answer to one accepted request, readable many times once `done` is set."""

    def __init__(self, request_id: str, num_bytes: int = 0) -> None:
        self.request_id = request_id
        self.num_bytes = num_bytes
        self.done = asyncio.Event()
        self.result: Result | None = None
        self.was_read = False


class _Sequence:
    """One model's order: the next place to leave for the engine, who left last, and who came early."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.next = 0
        self.latest: Future | None = None
        self.early: dict[int, tuple[Operation | Failed, Future]] = {}
        self.journal = Journal()

    @property
    def is_busy(self) -> bool:
        """Whether the engine owes this model a result."""
        return self.latest is not None and not self.latest.done.is_set()


class Session:
    """All sessions and models of one trainer; `submit` takes commands to the engine, which calls back with results."""

    def __init__(self, submit: Submit, *, pooled: bool = False, max_waiting_bytes: int = MAX_WAITING_BYTES) -> None:
        self._submit = submit
        self._pooled = pooled
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._loop = asyncio.get_running_loop()
        self._heard_at: dict[str, float] = {}
        self._sequences: dict[str, _Sequence] = {}
        self._created: dict[str, ModelCreated] = {}
        self._futures: dict[str, Future] = {}
        self._finished: deque[tuple[float, str]] = deque()
        self._num_pending = 0

    @property
    def model_ids(self) -> list[str]:
        return list(self._sequences)

    @property
    def num_pending(self) -> int:
        return self._num_pending

    def open_session(self) -> str:
        session_id = f"session-{uuid.uuid4().hex}"
        self._heard_at[session_id] = time.monotonic()
        return session_id

    def heard(self, session_id: str) -> None:
        """Note that a client is there; raises NotFound as `check_session` does."""
        self.check_session(session_id)
        if not self._pooled:
            self._heard_at[session_id] = time.monotonic()

    def silent(self, for_s: float) -> list[str]:
        """Sessions that were not heard of for so many seconds, and for which the engine has nothing left to do."""
        busy = {sequence.session_id for sequence in self._sequences.values() if sequence.is_busy}
        heard_before = time.monotonic() - for_s
        return [ident for ident, at in self._heard_at.items() if at <= heard_before and ident not in busy]

    def created(self, model_id: str) -> ModelCreated:
        """What a model was created as; raises NotFound."""
        if model_id not in self._created:
            raise _unknown_model(model_id)
        return self._created[model_id]

    def check_session(self, session_id: str) -> None:
        """Raises NotFound when this trainer did not open that session; a pooled one leaves sessions to the server."""
        if not self._pooled and session_id not in self._heard_at:
            raise NotFound(
                f"session_id: {session_id!r} is not known to this trainer, which was restarted or had not heard of the "
                "session for too long; reconnect",
                reason="SESSION_NOT_FOUND",
            )

    def create_model(self, address: CreateModelAddress, digest: bytes, operation: Operation | Failed) -> Future:
        """Accept the creation of a model; the same request again gets the first one's future."""
        try:
            self.heard(address.session_id)
            if address.model_seq_id < 0:
                raise InvalidArgument(f"model_seq_id: {address.model_seq_id} must be 0 or above")
        except FireboxError as error:
            return self._failed(error)
        sequence = self._sequences.setdefault(address.model_id, _Sequence(address.session_id))
        return self._accept(address.model_id, sequence, 0, digest, operation)

    def restore_model(self, address: CreateModelAddress, operation: CreateModel, next_seq_id: int) -> Future:
        """Make a model whose sequence goes on at `next_seq_id`; one that is here already fails."""
        if address.model_id in self._sequences:
            return self._failed(FailedPrecondition(f"model_id: {address.model_id!r} is here already"))
        future = self.create_model(address, b"", operation)
        self._sequences[address.model_id].next = next_seq_id
        return future

    def save_model(self, model_id: str, name: str) -> tuple[Future, int]:
        """Save a model behind everything that left for the engine; also its next place. Raises NotFound."""
        sequence = self._sequences.get(model_id)
        if sequence is None:
            raise _unknown_model(model_id)
        future = self._new_future()
        self._send(model_id, SaveState(name=name), future)
        return future, sequence.next

    async def put_away(self, session_id: str) -> None:
        """Forget a session; each of its LoRA models is saved as a checkpoint `silent-...` before it is unloaded.

        Raises FailedPrecondition when one cannot be saved; that one stays, and so does the session.
        """
        for model_id in [ident for ident, sequence in self._sequences.items() if sequence.session_id == session_id]:
            created = self._created.get(model_id)
            if created is not None and created.is_lora:
                await self._save_silent(model_id)
            await self.unload_model(model_id).done.wait()
        del self._heard_at[session_id]

    async def save_all(self, *, shared_weights: bool) -> list[str]:
        """Save every LoRA model and, once, weights that all models share; returns the names of these checkpoints.

        Raises FailedPrecondition when one cannot be saved.
        """
        models = [ident for ident, created in self._created.items() if created.is_lora]
        if shared_weights:
            models += list(self._created)[-1:]
        return [await self._save_silent(model_id) for model_id in models]

    async def _save_silent(self, model_id: str) -> str:
        name = _silent_name(model_id)
        future, _ = self.save_model(model_id, name)
        await future.done.wait()
        if isinstance(future.result, Failed):
            raise FailedPrecondition(f"{model_id} could not be saved and stays: {future.result.error}")
        return name

    def accept(
        self, address: OperationAddress, digest: bytes, operation: Operation | Failed, num_bytes: int = 0
    ) -> Future:
        """Accept an operation of that size at its place; a `Failed` one consumes the place too.

        Raises ResourceExhausted, with nothing accepted, when too much waits already.
        """
        sequence = self._sequences.get(address.model_id)
        if sequence is None:
            return self._failed(_unknown_model(address.model_id))
        if address.seq_id is None or address.seq_id < 1:
            return self._failed(InvalidArgument(f"seq_id: {address.seq_id} must be a number from 1 on"))
        if sequence.session_id in self._heard_at:
            self.heard(sequence.session_id)
        return self._accept(address.model_id, sequence, address.seq_id, digest, operation, num_bytes)

    def unload_model(self, model_id: str) -> Future:
        """Forget a model after what was accepted before; who still waits for a gap to fill fails. Repeatable."""
        future = self._new_future()
        if model_id in self._sequences:
            self._forget_model(model_id, "was unloaded while this request waited for earlier ones")
            self._send(model_id, UnloadModel(), future)
        else:
            self._finish(future, ModelUnloaded(model_id=model_id))
        return future

    async def wait(self, request_id: str, hold_s: float) -> Result | None:
        """The result of a request, or None when it is not there within `hold_s` seconds; raises NotFound."""
        future = self._futures.get(request_id)
        if future is None:
            raise NotFound(f"request_id: {request_id!r} is not known, or its result expired", reason="FUTURE_NOT_FOUND")
        try:
            await asyncio.wait_for(future.done.wait(), hold_s)
        except TimeoutError:
            return None
        if not future.was_read:
            future.was_read = True
            self._loop.call_later(_KEEP_READ_RESULT_S, self._futures.pop, request_id, None)
        return future.result

    def _accept(
        self,
        model_id: str,
        sequence: _Sequence,
        seq_id: int,
        digest: bytes,
        operation: Operation | Failed,
        num_bytes: int = 0,
    ) -> Future:
        if seq_id in sequence.journal:
            try:
                first = self._futures.get(sequence.journal.repeated(seq_id, digest))
            except InvalidArgument as error:
                return self._failed(error)
            return first or self._failed(NotFound(f"seq_id: the result of {seq_id} expired"))
        if seq_id < sequence.next:
            return self._failed(InvalidArgument(f"seq_id: {seq_id} is past; the next is {sequence.next}"))
        if seq_id > sequence.next + _MAX_EARLY:
            told = f"seq_id: {seq_id} is more than {_MAX_EARLY} ahead; the next is {sequence.next}"
            return self._failed(InvalidArgument(f"{told}; send operations in their order, without gaps"))
        self._check_room(sequence, seq_id, num_bytes)
        future = self._new_future(num_bytes)
        sequence.journal.record(seq_id, Entry(future.request_id, digest))
        sequence.early[seq_id] = (operation, future)
        self._release(model_id, sequence)
        return future

    def _check_room(self, sequence: _Sequence, seq_id: int, num_bytes: int) -> None:
        """Each model may have one request in work whatever waits: who waits for a gap never bars who fills it."""
        if self._waiting_bytes + num_bytes <= self._max_waiting_bytes:
            return
        if seq_id != sequence.next or sequence.is_busy:
            raise ResourceExhausted(
                f"{self._waiting_bytes} bytes of requests wait for this trainer, and it takes "
                f"{self._max_waiting_bytes}; send this one again in some seconds",
                reason="TOO_MUCH_WAITING",
                retry_after_s=_SOON_S,
            )

    def _release(self, model_id: str, sequence: _Sequence) -> None:
        while sequence.next in sequence.early:
            operation, future = sequence.early.pop(sequence.next)
            sequence.next += 1
            if isinstance(operation, Failed):
                self._resolve(model_id, CreateModel if sequence.next == 1 else None, future, operation)
            else:
                self._send(model_id, operation, future)

    def _send(self, model_id: str, operation: Operation, future: Future) -> None:
        def answer(result: Result) -> None:
            self._loop.call_soon_threadsafe(self._resolve, model_id, type(operation), future, result)

        if model_id in self._sequences:
            self._sequences[model_id].latest = future
        self._submit(Command(model_id=model_id, operation=operation), answer)

    def _resolve(self, model_id: str, kind: type | None, future: Future, result: Result) -> None:
        if kind is CreateModel and isinstance(result, Failed):
            # There is no such model, so its creation may be tried again.
            self._forget_model(model_id, "could not be created")
        if isinstance(result, ModelCreated):
            self._created[model_id] = result
        self._finish(future, result)

    def _forget_model(self, model_id: str, why: str) -> None:
        self._created.pop(model_id, None)
        sequence = self._sequences.pop(model_id, None)
        for _, waiting in sequence.early.values() if sequence else ():
            self._finish(waiting, Failed(error=f"model_id: {model_id} {why}", category="user"))

    def _finish(self, future: Future, result: Result) -> None:
        self._waiting_bytes -= future.num_bytes
        self._num_pending -= 1
        future.result = result
        future.done.set()
        self._finished.append((time.monotonic(), future.request_id))

    def _new_future(self, num_bytes: int = 0) -> Future:
        self._forget_expired()
        self._waiting_bytes += num_bytes
        self._num_pending += 1
        future = Future(uuid.uuid4().hex, num_bytes)
        self._futures[future.request_id] = future
        return future

    def _failed(self, error: FireboxError) -> Future:
        future = self._new_future()
        self._finish(future, failed(error))
        return future

    def _forget_expired(self) -> None:
        deadline = time.monotonic() - _KEEP_RESULT_S
        while self._finished and self._finished[0][0] < deadline:
            self._futures.pop(self._finished.popleft()[1], None)


def _silent_name(model_id: str) -> str:
    """A checkpoint name that tells the model and is used once."""
    return f"silent-{model_id.replace(':', '-')}-{uuid.uuid4().hex[:6]}"


def _unknown_model(model_id: str) -> NotFound:
    return NotFound(
        f"model_id: {model_id!r} is not known to this trainer; it was unloaded, its session was silent for too "
        "long, or the trainer was restarted; create the model again and load its checkpoint",
        reason="MODEL_NOT_FOUND",
    )
