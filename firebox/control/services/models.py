"""Registered models: list, show, register from a staged folder, remove.

Invariant: a row exists only for a directory that passed inspection and lies in its final place.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from firebox.control.services import model_dir
from firebox.control.services.context import Control
from firebox.control.tables.deployments import DeploymentRow
from firebox.control.tables.models import ModelRow
from firebox.control.tables.trainer_jobs import UNFINISHED, TrainerJobRow
from firebox.wire.control import BaseModelDetails, CreateModel, Model, PeftDetails
from firebox.wire.errors import AlreadyExists, FailedPrecondition, InvalidArgument, NotFound
from firebox.wire.names import SHARED_ACCOUNT, check_model_id, resource

_STAGED = re.compile(r"[0-9a-f]{32}")
_ALIAS = re.compile(rf"([\w.-]{{1,96}}|accounts/{SHARED_ACCOUNT}/models)/[\w.-]{{1,96}}", re.ASCII)


async def listing(control: Control, account: str) -> Sequence[ModelRow]:
    """Every model of the account, oldest first."""
    query = select(ModelRow).where(ModelRow.account == account).order_by(ModelRow.create_time, ModelRow.id)
    return await control.db.run(lambda session: session.scalars(query).all())


async def get(control: Control, account: str, ident: str) -> ModelRow:
    """One model, by its id or the id that one of its aliases makes; raises NotFound naming those that exist."""
    row = await control.db.run(lambda session: session.get(ModelRow, (account, ident)))
    if row is not None:
        return row
    rows = await listing(control, account)
    for other in rows:
        if ident in alias_ids(other):
            return other
    known = ", ".join(model.id for model in rows) or "none yet"
    raise NotFound(
        f"model {ident!r} is not registered; known models: {known}. Add one: firebox models add; or let one answer to "
        "this name: firebox models alias"
    )


def alias_ids(row: ModelRow) -> list[str]:
    """The model ids that the aliases stand for: `Qwen/Qwen3-8B` and `accounts/fireworks/models/qwen3-8b` are one."""
    return [str(alias).rpartition("/")[2].lower() for alias in row.facts.get("aliases", ())]


async def resolve(control: Control, account: str, name: str, *, field: str) -> ModelRow:
    """The model that a client calls `name`: by its id, its resource name or an alias; raises NotFound."""
    rows = await listing(control, account)
    for row in rows:
        if name in (row.id, row.name, resource(SHARED_ACCOUNT, "models", row.id), *row.facts.get("aliases", ())):
            return row
    known = ", ".join(other for row in rows for other in (row.id, *row.facts.get("aliases", ()))) or "none yet"
    raise NotFound(
        f"{field}: no registered model is called {name!r}; known names: {known}. "
        "firebox models alias lets a model answer to another name"
    )


async def set_aliases(control: Control, account: str, ident: str, aliases: Sequence[str]) -> ModelRow:
    """The other names that the model answers to from now on; raises AlreadyExists when one is taken."""
    for alias in aliases:
        if not _ALIAS.fullmatch(alias):
            raise InvalidArgument(
                f"aliases: {alias!r} is not a name of a public model; expected <organization>/<model> or "
                f"accounts/{SHARED_ACCOUNT}/models/<model>"
            )
    row = await get(control, account, ident)
    for other in await listing(control, account):
        taken = set(aliases) & set(other.facts.get("aliases", ()))
        if other.id != row.id and taken:
            raise AlreadyExists(f"aliases: {min(taken)!r} is an alias of {other.id!r}; take it away there first")

    def work(session: Session) -> ModelRow:
        stored = session.get_one(ModelRow, (account, row.id))
        stored.facts = row.facts | {"aliases": list(aliases)}
        return stored

    return await control.db.run(work)


async def create(control: Control, account: str, request: CreateModel) -> ModelRow:
    """Inspect the staged folder and move it into place; the folder is used up, also when it is refused."""
    if not _STAGED.fullmatch(request.staged_dir):
        raise InvalidArgument("stagedDir: not the name of a staged folder; use firebox models add")
    staged = control.layout.staging / request.staged_dir
    try:
        ident = check_model_id("modelId", request.model_id)
        facts = await asyncio.to_thread(model_dir.inspect, staged)
        return await place(control, ModelRow(account=account, id=ident, state="READY", facts=facts), staged)
    finally:
        await asyncio.to_thread(shutil.rmtree, staged, True)


async def place(control: Control, row: ModelRow, source: Path) -> ModelRow:
    """Rename `source` to the model's place and add the row; raises AlreadyExists when the id is taken."""
    target = control.layout.model(row.account, row.id)
    taken = await control.db.run(lambda session: session.get(ModelRow, (row.account, row.id)))
    if taken is not None:
        raise AlreadyExists(f"model {row.id!r} is registered already; choose another id, or delete it first")
    await asyncio.to_thread(_move, source, target)
    await control.db.run(lambda session: session.add(row))
    return row


async def delete(control: Control, account: str, ident: str) -> None:
    """Remove the model; raises FailedPrecondition while a job or a deployment uses it."""
    row = await get(control, account, ident)

    def work(session: Session) -> None:
        jobs = session.scalars(select(TrainerJobRow).where(TrainerJobRow.state.in_(UNFINISHED))).all()
        deployments = session.scalars(select(DeploymentRow).where(DeploymentRow.state != "FAILED")).all()
        users = [job.name for job in jobs if job.request["trainingConfig"]["baseModel"] == row.name]
        users += [deployment.name for deployment in deployments if deployment.request["baseModel"] == row.name]
        if users:
            raise FailedPrecondition(f"model {ident!r} is in use by {', '.join(users)}; delete those first")
        session.delete(session.get_one(ModelRow, (account, row.id)))

    await control.db.run(work)
    await asyncio.to_thread(shutil.rmtree, control.layout.model(account, row.id), True)


def show(row: ModelRow) -> Model:
    facts = row.facts
    peft = None
    if facts["kind"] == "HF_PEFT_ADDON":
        peft = PeftDetails(base_model=facts["base_model"], r=facts["lora_rank"], target_modules=facts["target_modules"])
    return Model(
        name=row.name,
        state=row.state,
        kind=facts["kind"],
        context_length=facts["context_length"],
        create_time=row.create_time,
        base_model_details=BaseModelDetails(
            model_type=facts["model_type"], parameter_count=str(facts["parameter_count"]), moe=facts["moe"]
        ),
        peft_details=peft,
        aliases=facts.get("aliases") or None,
        promoted_from=facts.get("promoted_from"),
        max_abs_diff=facts.get("max_abs_diff"),
    )


def _move(source: Path, target: Path) -> None:
    # A directory without a row is what a kill between rename and commit left behind.
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)
