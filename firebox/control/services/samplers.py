"""Samplers: handles to a base model or to one immutable snapshot of a training run.

Invariant: what a sampler stands for never changes, so two samplers of two steps answer differently for ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import select

from firebox.control.services import models, pools, run_checkpoints, sessions, training_runs
from firebox.control.services.context import Control
from firebox.control.services.presence import Sampled
from firebox.control.tables.samplers import SamplerRow
from firebox.wire import tinker
from firebox.wire.errors import InvalidArgument, NotFound
from firebox.wire.names import resource
from firebox.wire.tinker import CreateSampler
from firebox.wire.worker import SnapshotRef, WorkerAddress

_ACTIVE = "ACTIVE"


class Target(NamedTuple):
    """Which replica to ask, and for which snapshot; without one, for the base model."""

    address: WorkerAddress
    snapshot: SnapshotRef | None


async def create(control: Control, account: str, request: CreateSampler) -> SamplerRow:
    """Make the sampler of a place in its session, or return the one that is there."""
    await sessions.touch(control, account, request.session_id)
    ident = tinker.sampler_id(request.session_id, request.sampling_session_seq_id)
    if request.model_path is not None:
        path = tinker.parse_path(request.model_path, field="model_path")
        if path.type != "sampler":
            raise InvalidArgument(f"model_path: {path.path!r} is not for sampling; use save_weights_for_sampler first")
        await run_checkpoints.locate(control, account, path)
        return await of_run(control, account, ident, path)
    if request.base_model is None:
        raise InvalidArgument("base_model: name a base model, or a model_path to sample trained weights")
    model = await models.resolve(control, account, request.base_model, field="base_model")
    return await _add(
        control,
        SamplerRow(
            account=account,
            id=ident,
            state=_ACTIVE,
            session=request.session_id,
            base_model=request.base_model,
            model=model.id,
        ),
    )


async def of_run(control: Control, account: str, ident: str, path: tinker.CheckpointPath) -> SamplerRow:
    """The sampler `ident` of weights at `path`, which may still be on their way there."""
    run = await training_runs.get(control, account, path.run)
    row = SamplerRow(
        account=account,
        id=ident,
        state=_ACTIVE,
        session=ident.partition(":")[0],
        base_model=run.base_model,
        model=run.model,
        model_path=path.path,
    )
    return await _add(control, row)


async def get(control: Control, account: str, ident: str) -> SamplerRow:
    row = await control.db.run(lambda session: session.get(SamplerRow, (account, ident)))
    if row is None:
        raise NotFound(f"sampling_session_id: {ident!r} is not known to this server; create a sampling client")
    return row


async def listing(control: Control, account: str, session: str) -> Sequence[SamplerRow]:
    """The samplers of one session, oldest first."""
    query = select(SamplerRow).where(SamplerRow.account == account, SamplerRow.session == session)
    return await control.db.run(lambda database: database.scalars(query.order_by(SamplerRow.create_time)).all())


async def target(control: Control, account: str, ident: str) -> Target:
    """Who answers for a sampler, started if need be."""
    await sessions.touch(control, account, ident.partition(":")[0])
    name = resource(account, SamplerRow.collection, ident)
    sampled = control.presence.sampled.get(name)
    if sampled is None:
        sampled = control.presence.sampled[name] = await _read(control, await get(control, account, ident))
    return Target(await pools.sampler(control, account, sampled.model), sampled.snapshot)


async def _read(control: Control, row: SamplerRow) -> Sampled:
    model = await models.get(control, row.account, row.model)
    if row.model_path is None:
        return Sampled(model, None)
    path = tinker.parse_path(row.model_path, field="model_path")
    directory = await run_checkpoints.locate(control, row.account, path)
    return Sampled(model, SnapshotRef(dir=str(directory), identity=path.artifact))


async def _add(control: Control, row: SamplerRow) -> SamplerRow:
    there = await control.db.run(lambda session: session.get(SamplerRow, (row.account, row.id)))
    if there is None:
        await control.db.run(lambda session: session.add(row))
        return row
    if (there.model, there.model_path) != (row.model, row.model_path):
        raise InvalidArgument(f"sampling_session_seq_id: {row.id!r} stands for other weights; take the next number")
    return there
