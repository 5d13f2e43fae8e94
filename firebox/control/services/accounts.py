"""Accounts as the wire shows them. They are made with their first API key, see `api_keys`."""

from __future__ import annotations

from firebox.wire.control import Account


def show(account: str) -> Account:
    return Account(name=f"accounts/{account}")
