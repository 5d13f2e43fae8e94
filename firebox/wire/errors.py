"""The error tree of the platform, and its shape on the wire.

    FireboxError
    ├── InvalidArgument      400   the caller's value is wrong: field, value, fix
    ├── FailedPrecondition   400   the call is right, the resource's state is not
    ├── Unauthenticated      401
    ├── PermissionDenied     403
    ├── NotFound             404
    ├── AlreadyExists        409   control plane only, never on the data plane
    ├── Gone                 410   it was there, and was ended for good
    ├── TooLarge             413   a body above the limit it names
    ├── ResourceExhausted    429
    ├── Internal             500   a bug of ours
    └── Unavailable          503   a worker is gone or not there yet

To add one: subclass FireboxError with its gRPC `code` and HTTP `status`; give every raise a stable `reason`.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final

_MAX_MESSAGE: Final = 2000


class FireboxError(Exception):
    """Base of every error that crosses a process boundary. `code` is the gRPC number, `status` the HTTP one.

    A message may quote what a caller sent, and is kept with its future: it is cut off at 2000 characters.
    """

    code: ClassVar[int] = 13
    status: ClassVar[int] = 500
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, reason: str | None = None) -> None:
        self.message = message if len(message) <= _MAX_MESSAGE else message[:_MAX_MESSAGE] + " [cut off]"
        super().__init__(self.message)
        self.reason = reason or self.default_reason

    @property
    def category(self) -> str:
        """`user` or `server`: whose side the mistake is on, as in a failed future."""
        return "user" if self.status < 500 else "server"


class InvalidArgument(FireboxError):
    code, status, default_reason = 3, 400, "INVALID_ARGUMENT"


class FailedPrecondition(FireboxError):
    code, status, default_reason = 9, 400, "FAILED_PRECONDITION"


class Unauthenticated(FireboxError):
    code, status, default_reason = 16, 401, "UNAUTHENTICATED"


class PermissionDenied(FireboxError):
    code, status, default_reason = 7, 403, "PERMISSION_DENIED"


class NotFound(FireboxError):
    code, status, default_reason = 5, 404, "NOT_FOUND"


class AlreadyExists(FireboxError):
    code, status, default_reason = 6, 409, "ALREADY_EXISTS"


class Gone(FireboxError):
    code, status, default_reason = 5, 410, "GONE"


class TooLarge(FireboxError):
    code, status, default_reason = 11, 413, "TOO_LARGE"


class ResourceExhausted(FireboxError):
    """`retry_after_s`: in how many seconds it may be worth trying again, where that is known."""

    code, status, default_reason = 8, 429, "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, *, reason: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, reason=reason)
        self.retry_after_s = retry_after_s


class Internal(FireboxError):
    code, status, default_reason = 13, 500, "INTERNAL"


class Unavailable(FireboxError):
    code, status, default_reason = 14, 503, "UNAVAILABLE"


def headers(error: FireboxError) -> dict[str, str]:
    """The headers of an error answer: when to try again, where that is known."""
    wait_s = error.retry_after_s if isinstance(error, ResourceExhausted) else None
    return {} if wait_s is None else {"retry-after": str(math.ceil(wait_s))}


def envelope(error: FireboxError) -> dict[str, Any]:
    """The JSON body of an error answer, never empty: `{"error": {"code", "message", "details"}}`."""
    info = {
        "@type": "type.googleapis.com/google.rpc.ErrorInfo",
        "reason": error.reason,
        "domain": "training.fireworks.ai",
        "metadata": {"version": "1", "source": "firebox"},
    }
    return {"error": {"code": error.code, "message": error.message, "details": [info]}}
