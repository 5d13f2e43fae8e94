"""Training runs: LoRA models in pooled trainers, which are made, parked when nobody needs them, and brought back.

    LOADED <-> PARKED      LOADED, PARKED -> UNLOADED

A run that was LOADED in a process that ended is lost; what it had saved is not. Invariant: a request is only sent to
the process that holds the run, with everything that was accepted before.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final, TypeVar

import httpx
import msgspec
from sqlalchemy import select
from sqlalchemy.orm import Session

from firebox.control.services import models, pools, run_checkpoints, sessions, trainer_jobs
from firebox.control.services.context import Control
from firebox.control.services.presence import Place
from firebox.control.tables.models import ModelRow
from firebox.control.tables.sessions import SessionRow
from firebox.control.tables.trainer_jobs import TrainerJobRow
from firebox.control.tables.training_runs import TrainingRunRow
from firebox.wire import tinker
from firebox.wire.errors import FailedPrecondition, FireboxError, Internal, InvalidArgument, NotFound, Unavailable
from firebox.wire.names import resource
from firebox.wire.tinker import CreateModelBody, LoadNewModelBody, RunCheckpoint, TrainingRun
from firebox.wire.training import LoadState, LoraConfig
from firebox.wire.worker import CreateRun, ParkedRun, ParkRun

LOADED: Final = "LOADED"
PARKED: Final = "PARKED"
UNLOADED: Final = "UNLOADED"

_A = TypeVar("_A")

log = logging.getLogger(__name__)


class _Answer(msgspec.Struct):
    error: str | None = None
    category: str = "server"


async def create(control: Control, account: str, body: CreateModelBody) -> dict[str, Any]:
    """Make a run with a fresh adapter, starting its trainer if need be; the result of `create_model`.

    Raises InvalidArgument or NotFound for what cannot be, Unavailable when the trainer does not come up.
    """
    if body.lora_config is None or body.lora_config.rank == 0:
        raise InvalidArgument(
            "lora_config.rank: models here are LoRA models, ask for a rank from 1 on; full-parameter training needs a "
            "trainer job of its own"
        )
    model = await models.resolve(control, account, body.base_model, field="base_model")
    row = _row(account, body, base_model=body.base_model, model=model, lora=body.lora_config.model_dump())
    await _make(control, row, model, body.model_seq_id, None)
    return {"model_id": row.id, "type": "create_model", "is_lora": True, "lora_rank": body.lora_config.rank}


async def create_from(control: Control, account: str, body: LoadNewModelBody) -> dict[str, Any]:
    """Make a run that starts from the checkpoint of another one, or of itself; the result of `load_weights`."""
    path = tinker.parse_path(body.path, field="path")
    ref = await state_ref(control, account, body.path)
    origin = await get(control, account, path.run)
    if body.base_model is not None:
        wanted = await models.resolve(control, account, body.base_model, field="base_model")
        if wanted.id != origin.model:
            raise InvalidArgument(f"base_model: {body.path!r} was trained from {origin.base_model!r}; leave it out")
    model = await models.get(control, account, origin.model)
    row = _row(account, body, base_model=body.base_model or origin.base_model, model=model, lora=origin.lora)
    await _make(control, row, model, body.model_seq_id, LoadState(ref=ref, optimizer=body.optimizer))
    return {"path": body.path, "model_id": row.id, "type": "load_weights"}


async def state_ref(control: Control, account: str, path: str) -> str:
    """What a pooled trainer calls the checkpoint at a `tinker://` path; raises InvalidArgument or NotFound."""
    parsed = tinker.parse_path(path, field="path")
    if parsed.type != "training":
        raise InvalidArgument(f"path: {path!r} has no training state; save_state makes a checkpoint to load")
    await run_checkpoints.locate(control, account, parsed)
    return parsed.artifact


async def place(control: Control, account: str, run: str) -> Place:
    """The process that holds the run, which is brought back first if it was parked; on every request of the run.

    Raises NotFound, Gone for a finished session, and FailedPrecondition for a run that was unloaded or lost.
    """
    name = resource(account, TrainingRunRow.collection, run)
    known = control.presence.place(name)
    await sessions.touch(control, account, tinker.session_of(run))
    if known is not None and known.address in control.fleet.all(known.job_name):
        control.presence.touch(known.job_name)
        return known
    row = await get(control, account, run)
    async with control.presence.lock(_pool(row)):
        row = await get(control, account, run)
        if row.state == UNLOADED:
            raise FailedPrecondition(f"model_id: {run!r} was unloaded; create a training client from its checkpoint")
        if row.state == PARKED:
            return await _restore(control, row)
        return await _still_there(control, row)


async def get(control: Control, account: str, run: str) -> TrainingRunRow:
    row = await control.db.run(lambda session: session.get(TrainingRunRow, (account, run)))
    if row is None:
        raise NotFound(f"model_id: training run {run!r} does not exist in account {account!r}", reason="NO_RUN")
    return row


async def listing(control: Control, account: str, session: str | None = None) -> Sequence[TrainingRunRow]:
    """The account's runs, newest first, of one session or of all."""
    query = select(TrainingRunRow).where(TrainingRunRow.account == account)
    if session is not None:
        query = query.where(TrainingRunRow.session == session)
    query = query.order_by(TrainingRunRow.create_time.desc())
    return await control.db.run(lambda database: database.scalars(query).all())


async def loaded(control: Control) -> Sequence[TrainingRunRow]:
    """Runs of every account that some process is to hold."""
    query = select(TrainingRunRow).where(TrainingRunRow.state == LOADED)
    return await control.db.run(lambda session: session.scalars(query).all())


async def park(control: Control, account: str, run: str) -> None:
    """Save the run's state and take it out of its trainer; nothing to do while its session is in use."""
    row = await get(control, account, run)
    async with control.presence.lock(_pool(row)):
        known = control.presence.place(row.name)
        in_use = control.presence.knows(resource(account, SessionRow.collection, row.session))
        if in_use or known is None or known.address not in control.fleet.all(known.job_name):
            return
        # From here on a request has to wait for the lock; one that did not wait has touched the session before.
        control.presence.unload(row.name)
        checkpoint = tinker.parked_checkpoint(run)
        order = ParkRun(model_id=run, checkpoint=checkpoint.artifact)
        try:
            answer = await _ask(control, known, "/worker/runs/park", msgspec.json.encode(order), ParkedRun)
        except FireboxError:
            control.presence.load(row.name, known)
            raise
        state = {"checkpoint": checkpoint.path, "next_seq_id": answer.next_seq_id}
        await _set(control, row, state=PARKED, worker=None, parked=state)
    if row.parked is not None:
        await run_checkpoints.remove(control, account, tinker.parse_path(row.parked["checkpoint"], field="parked"))


async def unload(control: Control, account: str, run: str) -> None:
    """The client needs the run no more: no request of it is served after this. Its checkpoints stay."""
    row = await get(control, account, run)
    known = control.presence.place(row.name)
    control.presence.unload(row.name)
    await _set(control, row, state=UNLOADED, worker=None)
    if known is not None and known.address in control.fleet.all(known.job_name):
        await _ask(control, known, "/api/v1/unload_model", msgspec.json.encode({"model_id": run}), _Answer)


async def end(control: Control, account: str, session: str) -> None:
    """A session is finished: its runs are not needed any more, nor what was only saved for its samplers."""
    for row in await listing(control, account, session):
        try:
            await unload(control, account, row.id)
        except Unavailable as error:  # a trainer that does not answer is ended by others, and the run with it
            log.warning("training run %s: %s", row.id, error.message)
        await run_checkpoints.remove_own(control, account, row.id)


def show(row: TrainingRunRow, checkpoints: Sequence[RunCheckpoint]) -> TrainingRun:
    """`checkpoints` are those of the run, oldest first."""
    last = {checkpoint.checkpoint_type: checkpoint for checkpoint in checkpoints}
    return TrainingRun.model_validate(
        {
            "training_run_id": row.id,
            "base_model": row.base_model,
            "model_owner": row.account,
            "lora_rank": row.lora["rank"],
            "last_request_time": row.update_time,
            "last_checkpoint": last.get("training"),
            "last_sampler_checkpoint": last.get("sampler"),
            "user_metadata": row.user_metadata,
        }
    )


def _pool(row: TrainingRunRow) -> str:
    return resource(row.account, TrainerJobRow.collection, row.job)


def _row(
    account: str, body: CreateModelBody | LoadNewModelBody, *, base_model: str, model: ModelRow, lora: dict[str, Any]
) -> TrainingRunRow:
    kind = body.optimizer_config.type if body.optimizer_config else "adamw"
    if kind != "adamw":
        raise InvalidArgument(f"optimizer_config.type: {kind!r} is not supported; use 'adamw', or leave it out")
    return TrainingRunRow(
        account=account,
        id=body.model_id,
        state=LOADED,
        session=body.session_id,
        base_model=base_model,
        model=model.id,
        lora=lora,
        job=pools.pool_id(model.id),
        user_metadata=body.user_metadata,
    )


async def _make(
    control: Control, row: TrainingRunRow, model: ModelRow, model_seq_id: int, state: LoadState | None
) -> None:
    await sessions.touch(control, row.account, row.session)
    if await control.db.run(lambda session: session.get(TrainingRunRow, (row.account, row.id))) is not None:
        raise FailedPrecondition(f"model_seq_id: {model_seq_id} of this session was used before; take the next one")
    async with control.presence.lock(_pool(row)):
        home = await pools.trainer(control, row.account, model)
        await _send(control, home, row, model, model_seq_id, state, next_seq_id=1)
        row.worker = home.worker
        await control.db.run(lambda session: session.add(row))
        control.presence.load(row.name, home)


async def _restore(control: Control, row: TrainingRunRow) -> Place:
    assert row.parked is not None
    model = await models.get(control, row.account, row.model)
    home = await pools.trainer(control, row.account, model)
    saved = tinker.parse_path(row.parked["checkpoint"], field="parked")
    state = LoadState(ref=saved.artifact, optimizer=True)
    model_seq_id = int(row.id.rpartition(":")[2])
    await _send(control, home, row, model, model_seq_id, state, next_seq_id=row.parked["next_seq_id"])
    await _set(control, row, state=LOADED, worker=home.worker)
    control.presence.load(row.name, home)
    return home


async def _still_there(control: Control, row: TrainingRunRow) -> Place:
    """The place of a run that this server has not used yet; raises FailedPrecondition for one that is lost."""
    job = await trainer_jobs.get(control, row.account, row.job)
    if job.worker is None or job.worker != row.worker:
        found = await run_checkpoints.listing(control, row.account, row.id)
        saved = [checkpoint.tinker_path for checkpoint in found if checkpoint.checkpoint_type == "training"]
        advice = f"create a training client from {saved[-1]}" if saved else "it had saved no state"
        raise FailedPrecondition(f"model_id: {row.id!r} was lost with its trainer; {advice}", reason="TRAINER_ENDED")
    home = pools.running(control, job)
    control.presence.load(row.name, home)
    return home


async def _send(
    control: Control,
    home: Place,
    row: TrainingRunRow,
    model: ModelRow,
    model_seq_id: int,
    state: LoadState | None,
    *,
    next_seq_id: int,
) -> None:
    order = CreateRun(
        session_id=row.session,
        model_seq_id=model_seq_id,
        base_model=model.name,
        lora_config=msgspec.convert(row.lora, LoraConfig),
        state=state,
        next_seq_id=next_seq_id,
    )
    await _ask(control, home, "/worker/runs", msgspec.json.encode(order), _Answer)


async def _ask(control: Control, home: Place, path: str, body: bytes, kind: type[_A]) -> _A:
    try:
        raw = await control.ask(home.address, path, body)
    except httpx.HTTPError as error:
        raise Unavailable(f"the trainer did not answer ({type(error).__name__}); it may have ended") from error
    told = msgspec.json.decode(raw, type=_Answer)
    if told.error is not None:
        failure: type[FireboxError] = FailedPrecondition if told.category == "user" else Internal
        raise failure(told.error)
    return msgspec.json.decode(raw, type=kind)


async def _set(control: Control, row: TrainingRunRow, **values: Any) -> None:
    def work(session: Session) -> None:
        stored = session.get_one(TrainingRunRow, (row.account, row.id))
        for field, value in values.items():
            setattr(stored, field, value)

    await control.db.run(work)
