"""Order, repetition and gaps, with an engine that only notes what it is given."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import pytest

from firebox.trainer import session
from firebox.trainer.session import Session
from firebox.wire.errors import NotFound, ResourceExhausted
from firebox.wire.training import (
    AdamParams,
    Command,
    CreateModel,
    CreateModelAddress,
    Failed,
    ModelCreated,
    ModelUnloaded,
    OperationAddress,
    OptimStep,
    OptimStepOutput,
    Result,
)

STEP = OptimStep(adam_params=AdamParams())


class Notes:
    """Answers every command at once and remembers the order."""

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.session = Session(self.submit, max_waiting_bytes=100)
        self.refuse_models = False

    def submit(self, command: Command, answer: Callable[[Result], None]) -> None:
        operation = command.operation
        if isinstance(operation, CreateModel):
            refusal = Failed(error="no", category="user")
            answer(refusal if self.refuse_models else ModelCreated(model_id=command.model_id))
        elif isinstance(operation, OptimStep):
            self.steps.append(operation.adam_params.learning_rate)
            answer(OptimStepOutput(metrics={}))
        else:
            answer(ModelUnloaded(model_id=command.model_id))

    async def model(self) -> str:
        address = CreateModelAddress(session_id=self.session.open_session(), model_seq_id=0)
        future = self.session.create_model(address, b"create", CreateModel(base_model="m"))
        await self.session.wait(future.request_id, 1)
        return address.model_id

    def step(self, model_id: str, seq_id: int, body: bytes | None = None, num_bytes: int = 0) -> str:
        operation = OptimStep(adam_params=AdamParams(learning_rate=seq_id))
        address = OperationAddress(model_id=model_id, seq_id=seq_id)
        return self.session.accept(address, body or str(seq_id).encode(), operation, num_bytes).request_id


def run(test: Callable[[Notes], object]) -> None:
    async def main() -> None:
        await test(Notes())

    asyncio.run(main())


def test_any_order_of_arrival_leaves_in_order():
    async def test(notes: Notes) -> None:
        model_id = await notes.model()
        places = list(range(1, 200))
        random.Random(0).shuffle(places)
        requests = [notes.step(model_id, place) for place in places]
        for request_id in requests:
            assert isinstance(await notes.session.wait(request_id, 1), OptimStepOutput)
        assert notes.steps == list(range(1, 200))

    run(test)


def test_a_repeated_request_runs_once_and_another_body_fails_alone():
    async def test(notes: Notes) -> None:
        model_id = await notes.model()
        first = notes.step(model_id, 1)
        assert notes.step(model_id, 1) == first
        other = notes.step(model_id, 1, b"other body")
        failed = await notes.session.wait(other, 1)
        assert isinstance(failed, Failed)
        assert failed.category == "user"
        assert "seq_id: 1 was used before" in failed.error
        assert isinstance(await notes.session.wait(first, 1), OptimStepOutput)
        assert notes.steps == [1]

    run(test)


def test_a_gap_waits_and_a_bad_operation_fills_it():
    async def test(notes: Notes) -> None:
        model_id = await notes.model()
        early = notes.step(model_id, 2)
        assert await notes.session.wait(early, 0.05) is None
        bad = Failed(error="unreadable", category="user")
        filler = notes.session.accept(OperationAddress(model_id=model_id, seq_id=1), b"bad", bad)
        assert await notes.session.wait(filler.request_id, 1) == bad
        assert isinstance(await notes.session.wait(early, 1), OptimStepOutput)
        assert notes.session.num_pending == 0

    run(test)


def test_a_place_out_of_all_reach_is_refused_and_not_kept():
    async def test(notes: Notes) -> None:
        model_id = await notes.model()
        for far in (10**5, 2**70):
            failed = await notes.session.wait(notes.step(model_id, far), 1)
            assert isinstance(failed, Failed)
            assert "the next is 1" in failed.error
        assert notes.session.num_pending == 0
        assert isinstance(await notes.session.wait(notes.step(model_id, 1), 1), OptimStepOutput)

    run(test)


def test_a_waiter_is_woken_long_before_its_hold_ends():
    async def test(notes: Notes) -> None:
        model_id = await notes.model()
        waiter = asyncio.create_task(notes.session.wait(notes.step(model_id, 2), 30))
        await asyncio.sleep(0.01)
        notes.step(model_id, 1)
        assert isinstance(await asyncio.wait_for(waiter, 1), OptimStepOutput)

    run(test)


def test_creation_is_idempotent_and_a_failed_one_can_be_tried_again():
    async def test(notes: Notes) -> None:
        session = notes.session
        address = CreateModelAddress(session_id=session.open_session(), model_seq_id=3)
        notes.refuse_models = True
        refused = session.create_model(address, b"body", CreateModel(base_model="m"))
        waiting = notes.step(address.model_id, 2)
        assert isinstance(await session.wait(refused.request_id, 1), Failed)
        assert isinstance(await session.wait(waiting, 1), Failed)
        notes.refuse_models = False
        created = session.create_model(address, b"body", CreateModel(base_model="m"))
        assert session.create_model(address, b"body", CreateModel(base_model="m")) is created
        assert await session.wait(created.request_id, 1) == ModelCreated(model_id=address.model_id)
        assert address.model_id.endswith(":train:3")
        assert not address.model_id.startswith("ts-")

    run(test)


def test_unloading_fails_who_waits_and_clears_the_sequence():
    async def test(notes: Notes) -> None:
        model_id = await notes.model()
        waiting = notes.step(model_id, 5)
        unloaded = notes.session.unload_model(model_id)
        assert isinstance(await notes.session.wait(waiting, 1), Failed)
        assert isinstance(await notes.session.wait(unloaded.request_id, 1), ModelUnloaded)
        gone = await notes.session.wait(notes.step(model_id, 1), 1)
        assert isinstance(gone, Failed)
        assert "not known" in gone.error

    run(test)


def test_unknown_addresses_are_told_apart():
    async def test(notes: Notes) -> None:
        address = CreateModelAddress(session_id="session-of-another-life", model_seq_id=0)
        future = notes.session.create_model(address, b"", CreateModel(base_model="m"))
        failed = await notes.session.wait(future.request_id, 1)
        assert isinstance(failed, Failed)
        assert "session_id" in failed.error
        with pytest.raises(NotFound, match="request_id"):
            await notes.session.wait("no-such-request", 1)

    run(test)


def test_too_much_waiting_is_refused_and_takes_no_place_but_never_who_is_next():
    async def test(notes: Notes) -> None:
        model_id, other = await notes.model(), await notes.model()
        early = [notes.step(model_id, seq_id, num_bytes=50) for seq_id in (2, 3)]
        with pytest.raises(ResourceExhausted, match="100 bytes of requests wait") as refused:
            notes.step(model_id, 4, num_bytes=50)
        assert refused.value.status == 429
        assert notes.step(model_id, 3, num_bytes=50) == early[1]  # who was accepted may ask again
        assert isinstance(await notes.session.wait(notes.step(other, 1, num_bytes=50), 1), OptimStepOutput)
        first = notes.step(model_id, 1, num_bytes=500)
        with pytest.raises(ResourceExhausted):
            notes.step(model_id, 4, num_bytes=50)
        for request_id in (first, *early):
            assert isinstance(await notes.session.wait(request_id, 1), OptimStepOutput)
        assert isinstance(await notes.session.wait(notes.step(model_id, 4, num_bytes=50), 1), OptimStepOutput)
        assert notes.steps == [1, 1, 2, 3, 4]

    run(test)


def test_who_is_silent_and_has_no_work_is_found():
    async def test(notes: Notes) -> None:
        model_id = await notes.model()
        session_id = model_id.partition(":")[0]
        assert notes.session.silent(60) == []
        notes.step(model_id, 1)
        assert notes.session.silent(0) == []  # its result has not come back yet
        await asyncio.sleep(0.01)
        assert notes.session.silent(0) == [session_id]
        notes.session.heard(session_id)
        assert notes.session.silent(0.005) == []
        await notes.session.put_away(session_id)
        with pytest.raises(NotFound, match="reconnect"):
            notes.session.heard(session_id)
        gone = await notes.session.wait(notes.step(model_id, 2), 1)
        assert isinstance(gone, Failed)
        assert "silent for too long" in gone.error

    run(test)


def test_a_result_that_was_read_is_kept_for_a_while_only(monkeypatch):
    monkeypatch.setattr(session, "_KEEP_READ_RESULT_S", 0.05)

    async def test(notes: Notes) -> None:
        model_id = await notes.model()
        read, unread = (notes.step(model_id, seq_id) for seq_id in (1, 2))
        for _ in range(2):
            assert isinstance(await notes.session.wait(read, 1), OptimStepOutput)
        await asyncio.sleep(0.1)
        with pytest.raises(NotFound, match="expired"):
            await notes.session.wait(read, 1)
        assert isinstance(await notes.session.wait(unread, 1), OptimStepOutput)

    run(test)
