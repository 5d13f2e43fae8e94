"""Tickets: who holds one may fetch the files of one artifact for a while, without a key. In memory, and gone with it.

Invariant: a ticket opens the files that were named when it was made, and nothing else.
"""

from __future__ import annotations

import asyncio
import secrets
import tarfile
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, NamedTuple

from firebox.wire.errors import NotFound

ARCHIVE: Final = "archive.tar"
"""The name under which all files of an artifact come as one."""

_VALID_FOR: Final = timedelta(hours=1)


class Offer(NamedTuple):
    ticket: str
    account: str
    directory: Path
    files: Sequence[str]
    expires: datetime


class Downloads:
    def __init__(self) -> None:
        self._offers: dict[str, Offer] = {}

    def offer(self, account: str, directory: Path, files: Sequence[str]) -> Offer:
        """A ticket for `files`, paths relative to `directory`."""
        now = datetime.now(UTC)
        self._offers = {ticket: offer for ticket, offer in self._offers.items() if offer.expires > now}
        made = Offer(secrets.token_urlsafe(32), account, directory, files, now + _VALID_FOR)
        self._offers[made.ticket] = made
        return made

    def account_of(self, ticket: str) -> str | None:
        """The account whose artifact the ticket opens, or None."""
        offer = self._offers.get(ticket)
        return offer.account if offer is not None and offer.expires > datetime.now(UTC) else None

    def file(self, ticket: str, file: str) -> Path:
        """One of the files; raises NotFound."""
        offer = self._offers.get(ticket)
        if offer is None or file not in offer.files:
            raise NotFound(f"{file!r} is not offered here; ask for a new link")
        return offer.directory / file

    async def archive(self, ticket: str, scratch: Path) -> Path:
        """All files as one new tar file in `scratch`, which is the caller's to remove; raises NotFound."""
        offer = self._offers.get(ticket)
        if offer is None:
            raise NotFound("the archive is not offered any more; ask for a new link")
        target = scratch / f"{uuid.uuid4().hex}.tar"
        await asyncio.to_thread(_pack, offer, target)
        return target


def _pack(offer: Offer, target: Path) -> None:
    with tarfile.open(target, "w") as archive:
        for file in offer.files:
            archive.add(offer.directory / file, arcname=file)
