"""What was accepted at which place of a model's sequence.

Owns ids and digests only: enough to recognize a repeated request and to tell it from another one that claims the same
place. Does not know operations or results.

Invariant: a place is written once.
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

from firebox.wire.errors import InvalidArgument

_KEEP: Final = 4096


class Entry(NamedTuple):
    request_id: str
    digest: bytes


class Journal:
    """The latest 4096 accepted operations of one model, by sequence number."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}

    def __contains__(self, seq_id: int) -> bool:
        return seq_id in self._entries

    def record(self, seq_id: int, entry: Entry) -> None:
        assert seq_id not in self._entries
        self._entries[seq_id] = entry
        if len(self._entries) > _KEEP:
            del self._entries[next(iter(self._entries))]

    def repeated(self, seq_id: int, digest: bytes) -> str:
        """The request id first given to this place; raises InvalidArgument when the body was another one."""
        entry = self._entries[seq_id]
        if entry.digest != digest:
            raise InvalidArgument(
                f"seq_id: {seq_id} was used before with another body; the first request stays valid, "
                "send this one with the next free number",
                reason="SEQUENCE_CONFLICT",
            )
        return entry.request_id


def digest_of(route: str, body: bytes) -> bytes:
    """Fingerprint of one request."""
    return hashlib.blake2b(body, digest_size=16, person=route.encode()[:16]).digest()
