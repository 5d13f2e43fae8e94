"""Accounts and API keys: the first one is made here, every request is checked here.

A key is a random string whose hash is stored. Invariant: the comparison takes as long for a wrong key as for a
right one.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping

from sqlalchemy import select
from sqlalchemy.orm import Session

from firebox.control.services.context import Control
from firebox.control.tables.accounts import AccountRow, ApiKeyRow
from firebox.wire.control import Account
from firebox.wire.names import DEFAULT_ACCOUNT

_TINKER_PREFIX = "tml-"


async def first_start(control: Control) -> str | None:
    """Make the account and its key when there is none yet; returns the new key, once."""
    key = f"fb_{secrets.token_urlsafe(32)}"

    def work(session: Session) -> bool:
        if session.scalar(select(ApiKeyRow)) is not None:
            return False
        session.merge(AccountRow(id=DEFAULT_ACCOUNT))
        session.flush()
        session.add(ApiKeyRow(sha256=_digest(key), account=DEFAULT_ACCOUNT))
        # Written inside the transaction: a key that could not be kept is not stored either.
        handle = os.open(control.layout.api_key, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(key + "\n")
        return True

    return key if await control.db.run(work) else None


async def load_keys(control: Control) -> Mapping[str, str]:
    """Account by key hash, for `account_of`."""

    def work(session: Session) -> dict[str, str]:
        return {row.sha256: row.account for row in session.scalars(select(ApiKeyRow))}

    return await control.db.run(work)


def account_of(keys: Mapping[str, str], given: str) -> str | None:
    """The account of the key `given`, or None. `tml-<key>` is the same key for clients that insist on the prefix."""
    digest = _digest(given.removeprefix(_TINKER_PREFIX))
    found = None
    for known, account in keys.items():
        if hmac.compare_digest(known, digest):
            found = account
    return found


def show(account: str) -> Account:
    return Account(name=f"accounts/{account}")


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()
