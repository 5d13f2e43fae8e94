"""API keys: made and shown once, found on every request, revoked.

A key is a random string of which only the hash is kept. Invariant: a key that was revoked lets nobody in any more, also
after a restart.
"""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Sequence
from typing import Final

from sqlalchemy import select
from sqlalchemy.orm import Session

from firebox.control.services.context import Control
from firebox.control.tables.accounts import AccountRow
from firebox.control.tables.api_keys import ApiKeyRow
from firebox.control.tables.base import now
from firebox.wire.control import ApiKey, CreateApiKey
from firebox.wire.errors import FailedPrecondition, InvalidArgument, NotFound
from firebox.wire.names import DEFAULT_ACCOUNT, SHARED_ACCOUNT, check_id

ACTIVE: Final = "ACTIVE"
REVOKED: Final = "REVOKED"

_TINKER_PREFIX: Final = "tml-"


async def start(control: Control) -> str | None:
    """Read the keys into memory. When no operator's key is left, one is made: it is written beside the data and
    returned, once."""
    secret, row = _make(CreateApiKey(account=DEFAULT_ACCOUNT, display_name="first", operator=True))

    def work(session: Session) -> bool:
        if session.scalar(select(ApiKeyRow).where(ApiKeyRow.state == ACTIVE, ApiKeyRow.operator)) is not None:
            return False
        _add(session, row)
        # Written inside the transaction: a key that could not be kept is not stored either.
        handle = os.open(control.layout.api_key, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(secret + "\n")
        return True

    made = await control.db.run(work)
    control.keyring.hold(row for row in await listing(control, None) if row.state == ACTIVE)
    return secret if made else None


async def create(control: Control, request: CreateApiKey) -> tuple[str, ApiKeyRow]:
    """The secret of a new key, told this once, and its row. The account is made with its first key."""
    check_id("account", request.account)
    if request.account == SHARED_ACCOUNT:
        raise InvalidArgument(f"account: {SHARED_ACCOUNT!r} stands for every account's own resources; choose another")
    secret, row = _make(request)
    await control.db.run(lambda session: _add(session, row))
    control.keyring.hold([row])
    return secret, row


async def listing(control: Control, account: str | None) -> Sequence[ApiKeyRow]:
    """The keys of one account, or of all, oldest first; revoked ones included."""
    query = select(ApiKeyRow).order_by(ApiKeyRow.create_time, ApiKeyRow.id)
    if account is not None:
        query = query.where(ApiKeyRow.account == account)
    return await control.db.run(lambda session: session.scalars(query).all())


async def revoke(control: Control, account: str, ident: str) -> ApiKeyRow:
    """No request is let in with this key from now on; revoking twice is no error. One operator's key must stay."""

    def work(session: Session) -> ApiKeyRow:
        row = session.get(ApiKeyRow, (account, ident))
        if row is None:
            raise NotFound(f"API key {ident!r} does not exist in account {account!r}; see firebox keys list")
        managing = select(ApiKeyRow).where(ApiKeyRow.state == ACTIVE, ApiKeyRow.operator)
        if session.scalars(managing).all() == [row]:
            raise FailedPrecondition(
                f"API key {ident!r} is the last that can manage keys; make another one first, with --operator",
                reason="LAST_OPERATOR_KEY",
            )
        row.state = REVOKED
        return row

    row = await control.db.run(work)
    control.keyring.drop(row)
    return row


def use(control: Control, given: str) -> ApiKeyRow | None:
    """The active key `given`, or None. `tml-<key>` is the same key for clients that insist on the prefix."""
    row = control.keyring.find(_digest(given.removeprefix(_TINKER_PREFIX)))
    if row is not None:
        control.keyring.note(row, lambda: _record_use(control, row))
    return row


def show(row: ApiKeyRow, secret: str | None = None) -> ApiKey:
    return ApiKey(
        name=row.name,
        state=row.state,
        display_name=row.display_name,
        operator=row.operator,
        create_time=row.create_time,
        last_used_time=row.last_used_time,
        requests_per_minute=row.requests_per_minute,
        max_concurrent=row.max_concurrent,
        secret=secret,
    )


async def _record_use(control: Control, row: ApiKeyRow) -> None:
    def work(session: Session) -> None:
        session.get_one(ApiKeyRow, (row.account, row.id)).last_used_time = now()

    await control.db.run(work)


def _make(request: CreateApiKey) -> tuple[str, ApiKeyRow]:
    secret = f"fb_{secrets.token_urlsafe(32)}"
    return secret, ApiKeyRow(
        account=request.account,
        id=secrets.token_hex(4),
        state=ACTIVE,
        sha256=_digest(secret),
        display_name=request.display_name,
        operator=request.operator,
        requests_per_minute=request.requests_per_minute,
        max_concurrent=request.max_concurrent,
    )


def _add(session: Session, row: ApiKeyRow) -> None:
    session.merge(AccountRow(id=row.account))
    session.flush()
    session.add(row)


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
