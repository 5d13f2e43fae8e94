"""/v1/accounts/{account}/trainingShapes and deploymentShapes, with their versions. `-` lists every shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Depends

from firebox.control.routes.deps import Account, Ctx, Json
from firebox.control.services import training_shapes
from firebox.control.services.context import page
from firebox.control.services.training_shapes import Shape
from firebox.wire.names import resource

router = APIRouter(prefix="/v1/accounts/{account}", tags=["shapes"])


class ListQuery:
    """The list parameters of public clients."""

    def __init__(self, filter: str = "", orderBy: str = "", pageSize: int = 0, pageToken: str = "") -> None:
        self.filter, self.order_by = filter, orderBy
        self.page_size, self.page_token = pageSize, pageToken


Listing = Annotated[ListQuery, Depends()]


@router.get("/trainingShapes/{shape}/versions")
async def list_training_versions(control: Ctx, account: Account, shape: str, query: Listing) -> Json:
    shapes = await training_shapes.training(control, account)
    return _list(shapes, account, "trainingShapes", shape, query)


@router.get("/trainingShapes/{shape}/versions/{version}")
async def get_training_version(control: Ctx, account: Account, shape: str, version: str) -> Json:
    shapes = await training_shapes.training(control, account)
    return _get(shapes, account, f"{resource(account, 'trainingShapes', shape)}/versions/{version}")


@router.get("/deploymentShapes/{shape}/versions")
async def list_deployment_versions(control: Ctx, account: Account, shape: str, query: Listing) -> Json:
    shapes = await training_shapes.deployment(control, account)
    return _list(shapes, account, "deploymentShapes", shape, query)


@router.get("/deploymentShapes/{shape}/versions/{version}")
async def get_deployment_version(control: Ctx, account: Account, shape: str, version: str) -> Json:
    shapes = await training_shapes.deployment(control, account)
    return _get(shapes, account, f"{resource(account, 'deploymentShapes', shape)}/versions/{version}")


def _list(shapes: Sequence[Shape], account: str, collection: str, ident: str, query: ListQuery) -> Json:
    if ident != "-":
        shapes = [training_shapes.find(shapes, account, resource(account, collection, ident), field="name")]
    versions = [training_shapes.show(shape) for shape in shapes]
    found = training_shapes.search(versions, account, query.filter, query.order_by)
    rows, following = page(found, query.page_size, query.page_token)
    key = "trainingShapeVersions" if collection == "trainingShapes" else "deploymentShapeVersions"
    return {key: [row.wire() for row in rows], "nextPageToken": following, "totalSize": len(found)}


def _get(shapes: Sequence[Shape], account: str, name: str) -> Json:
    return training_shapes.show(training_shapes.find(shapes, account, name, field="name")).wire()
