"""Resource names and identifier rules.

Owns every pattern that turns a user's string into an identifier. Nothing here touches a disk: an identifier
that passed these checks is one path segment of lower-case letters, digits, hyphens and, where the rule says so,
dots and underscores; never a path.
"""

from __future__ import annotations

import re
from typing import Final

from firebox.wire.errors import InvalidArgument

_RESOURCE_ID: Final = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_MODEL_ID: Final = re.compile(r"[a-z0-9](?:[a-z0-9.-]{0,61}[a-z0-9])?")
_SNAPSHOT_ID: Final = re.compile(r"[a-z0-9](?:[a-z0-9._-]{0,126}[a-z0-9])?")
_CROSS_JOB: Final = "cross_job://"
_RUN_CHECKPOINT: Final = re.compile(r"([^/]+)/(run-[0-9a-f]{32})/([^/]+)")

DEFAULT_ACCOUNT: Final = "local"
"""The account that a fresh server creates."""

SHARED_ACCOUNT: Final = "fireworks"
"""The account segment that public scripts use for shared models and shapes; it resolves to every account's own."""


def check_id(field: str, value: str) -> str:
    """Return `value` if it is a valid resource id (1-63 of a-z, 0-9, hyphen; no hyphen at an end).

    Raises InvalidArgument naming `field`, the value and the rule.
    """
    if not _RESOURCE_ID.fullmatch(value):
        raise InvalidArgument(
            f"{field}: {value!r} is not a valid id; use 1 to 63 lower-case letters, digits or inner hyphens",
            reason="INVALID_ID",
        )
    return value


def check_model_id(field: str, value: str) -> str:
    """Like `check_id`, with inner dots allowed (`qwen2.5-0.5b`)."""
    if not _MODEL_ID.fullmatch(value) or ".." in value:
        raise InvalidArgument(
            f"{field}: {value!r} is not a valid model id; use 1 to 63 lower-case letters, digits or inner "
            "hyphens and dots",
            reason="INVALID_ID",
        )
    return value


def check_snapshot_id(field: str, value: str) -> str:
    """Return `value` if it can name a checkpoint or snapshot (1-128 of a-z, 0-9, inner hyphens, underscores, dots)."""
    if not _SNAPSHOT_ID.fullmatch(value) or ".." in value:
        raise InvalidArgument(
            f"{field}: {value!r} is not a valid checkpoint name; use 1 to 128 lower-case letters, digits or "
            "inner hyphens, underscores and dots, for example 'step-10'",
            reason="INVALID_ID",
        )
    return value


def resource(account: str, collection: str, ident: str) -> str:
    """Join `accounts/<account>/<collection>/<id>`."""
    return f"accounts/{account}/{collection}/{ident}"


def split_resource(name: str, collection: str, *, field: str = "name") -> tuple[str, str]:
    """Split `accounts/<account>/<collection>/<id>` into (account, id); raises InvalidArgument otherwise."""
    parts = name.split("/")
    if len(parts) != 4 or parts[0] != "accounts" or parts[2] != collection:
        raise InvalidArgument(
            f"{field}: {name!r} is not a resource name; expected accounts/<account>/{collection}/<id>",
            reason="INVALID_RESOURCE_NAME",
        )
    check = check_model_id if collection == "models" else check_id
    return check_id(field, parts[1]), check(field, parts[3])


def parse_state_ref(ref: str, account: str) -> tuple[str | None, str]:
    """Split a `load_weights` path of a client of `account` into (source job id or None, checkpoint name).

    Accepts a bare name, `cross_job://<job>/<name>`, and `<account>/<job>/<name>` where the job is called `run-` and 32
    hexadecimal digits. Raises InvalidArgument for anything else, paths included.
    """
    if ref.startswith(_CROSS_JOB):
        job, _, name = ref.removeprefix(_CROSS_JOB).partition("/")
        return check_id("path", job), check_snapshot_id("path", name)
    if match := _RUN_CHECKPOINT.fullmatch(ref):
        if match[1] != account:
            raise InvalidArgument(f"path: {ref!r} is of another account; yours is {account!r}")
        return match[2], check_snapshot_id("path", match[3])
    return None, check_snapshot_id("path", ref)
