"""GET /metrics: what Prometheus scrapes. It tells of every account's resources, so it takes an operator's key."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST, Gauge, generate_latest

from firebox.control.routes.deps import Ctx, is_operator
from firebox.control.services import census
from firebox.wire.errors import PermissionDenied

router = APIRouter(tags=["operations"])

_RESOURCES = Gauge("firebox_resources", "Resources by collection and state, of all accounts.", ["collection", "state"])


@router.get("/metrics", response_class=Response)
async def metrics(request: Request, control: Ctx) -> Response:
    if not is_operator(request):
        raise PermissionDenied("metrics are of all accounts; use an operator's key", reason="NOT_OPERATOR")
    _RESOURCES.clear()
    for (collection, state), number in (await census.by_state(control)).items():
        _RESOURCES.labels(collection, state).set(number)
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)
