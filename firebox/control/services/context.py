"""What every service works with, built once by the composition root."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from firebox.control.catalogue import Template
from firebox.control.changes import Changes
from firebox.control.database import Database
from firebox.control.layout import Layout
from firebox.control.services.capacity import Capacity
from firebox.control.services.downloads import Downloads
from firebox.control.services.fleet import Fleet
from firebox.control.services.keyring import Keyring
from firebox.control.services.presence import Presence
from firebox.control.services.removed import Removed
from firebox.wire.errors import InvalidArgument, PermissionDenied
from firebox.wire.names import SHARED_ACCOUNT, resource, split_resource
from firebox.wire.worker import ReplicaStatus, WorkerAddress

T = TypeVar("T")

MAX_PAGE = 200


@dataclass(frozen=True)
class Control:
    """`ask` posts a body to a path of a worker and returns the answer, and raises httpx.HTTPError when there is none.
    `allow_dirs` are the folders of this machine, besides the data directory, that trainers may read adapters from."""

    db: Database
    layout: Layout
    templates: Sequence[Template]
    probe: Callable[[WorkerAddress], Awaitable[ReplicaStatus]]
    ask: Callable[[WorkerAddress, str, bytes], Awaitable[bytes]]
    changes: Changes
    capacity: Capacity
    presence: Presence
    fleet: Fleet = field(default_factory=Fleet)
    keyring: Keyring = field(default_factory=Keyring)
    downloads: Downloads = field(default_factory=Downloads)
    removed: Removed = field(default_factory=Removed)
    allow_dirs: Sequence[Path] = ()


def own(account: str, name: str, collection: str, *, field: str) -> str:
    """The id in a resource name of `account`, or of the shared account that stands for every account's own.

    Raises InvalidArgument for another form and PermissionDenied for another account.
    """
    owner, ident = split_resource(name, collection, field=field)
    if owner not in (account, SHARED_ACCOUNT):
        raise PermissionDenied(f"{field}: {name!r} belongs to another account; yours is {account!r}")
    return ident


def canonical(account: str, name: str, collection: str, *, field: str) -> str:
    """`name` with the shared account replaced by `account`."""
    return resource(account, collection, own(account, name, collection, field=field))


def page(items: Sequence[T], size: int, token: str) -> tuple[Sequence[T], str]:
    """One page of `items` and the token of the next one, empty at the end. A size of 0 means the largest."""
    start = _decode(token) if token else 0
    end = start + (min(size, MAX_PAGE) if size > 0 else MAX_PAGE)
    following = base64.urlsafe_b64encode(str(end).encode()).decode() if end < len(items) else ""
    return items[start:end], following


def window(items: Sequence[T], offset: int, limit: int) -> Sequence[T]:
    """The `limit` items from `offset` on; numbers below 0 count as 0."""
    return items[max(0, offset) :][: max(0, limit)]


def _decode(token: str) -> int:
    try:
        return max(0, int(base64.urlsafe_b64decode(token)))
    except ValueError:
        raise InvalidArgument(f"pageToken: {token!r} was not given by this server; start without one") from None
