"""What every route is given: the control context, the caller's account, and how long to hold an answer."""

from __future__ import annotations

from typing import Annotated, Any, cast

from fastapi import Depends, Header, Request

from firebox.control.services.context import Control
from firebox.wire.errors import PermissionDenied
from firebox.wire.names import SHARED_ACCOUNT

CREATE_HOLD_S = 50.0
GET_HOLD_S = 20.0

Json = dict[str, Any]


def _control(request: Request) -> Control:
    return cast(Control, request.app.state.control)


def _caller(request: Request) -> str:
    """The account of the key, which the gateway has checked."""
    return cast(str, request.scope["account"])


def is_operator(request: Request) -> bool:
    """Whether the caller's key may manage the server itself."""
    return cast(bool, request.scope["operator"])


def own_account(request: Request, account: str) -> str:
    """The account in the path: the caller's own, or the shared one that stands for it."""
    caller = _caller(request)
    if account not in (caller, SHARED_ACCOUNT, "-"):
        raise PermissionDenied(f"account: {account!r} is not yours; this key belongs to {caller!r}")
    return caller


def _hold(prefer: Annotated[str, Header()] = "") -> float:
    """Seconds to hold a GET of a resource in transition; `Prefer: wait=0` asks for the answer at once."""
    return 0.0 if prefer.replace(" ", "") == "wait=0" else GET_HOLD_S


class ListQuery:
    """The list parameters of public clients."""

    def __init__(self, filter: str = "", orderBy: str = "", pageSize: int = 0, pageToken: str = "") -> None:
        self.filter, self.order_by = filter, orderBy
        self.page_size, self.page_token = pageSize, pageToken


Ctx = Annotated[Control, Depends(_control)]
Caller = Annotated[str, Depends(_caller)]
Account = Annotated[str, Depends(own_account)]
Hold = Annotated[float, Depends(_hold)]
Listing = Annotated[ListQuery, Depends()]
