"""/v1/accounts/{account}/trainingShapes and deploymentShapes, with their versions. `-` lists every shape."""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import APIRouter

from firebox.control.routes.deps import Account, Ctx, Json, Listing, ListQuery
from firebox.control.services import training_shapes
from firebox.control.services.context import Control, page
from firebox.control.services.filters import search
from firebox.control.services.training_shapes import Shape
from firebox.wire.names import resource

router = APIRouter(prefix="/v1/accounts/{account}", tags=["shapes"])


@router.get("/trainingShapes/{shape}/versions")
async def list_training_versions(control: Ctx, account: Account, shape: str, query: Listing) -> Json:
    shapes = await training_shapes.training(control, account)
    return await _list(control, account, shapes, resource(account, "trainingShapes", shape), query)


@router.get("/trainingShapes/{shape}/versions/{version}")
async def get_training_version(control: Ctx, account: Account, shape: str, version: str) -> Json:
    shapes = await training_shapes.training(control, account)
    return _get(control, account, shapes, f"{resource(account, 'trainingShapes', shape)}/versions/{version}")


@router.get("/deploymentShapes/{shape}/versions")
async def list_deployment_versions(control: Ctx, account: Account, shape: str, query: Listing) -> Json:
    shapes = await training_shapes.deployment(control, account)
    return await _list(control, account, shapes, resource(account, "deploymentShapes", shape), query)


@router.get("/deploymentShapes/{shape}/versions/{version}")
async def get_deployment_version(control: Ctx, account: Account, shape: str, version: str) -> Json:
    shapes = await training_shapes.deployment(control, account)
    return _get(control, account, shapes, f"{resource(account, 'deploymentShapes', shape)}/versions/{version}")


async def _list(control: Control, account: str, shapes: Sequence[Shape], name: str, query: ListQuery) -> Json:
    collection, ident = name.split("/")[2:]
    if ident != "-":
        training_shapes.find(shapes, account, name, field="name")
        shapes = training_shapes.called(shapes, account, name)
    versions = [training_shapes.show(control, shape) for shape in shapes]
    canonical = await training_shapes.canonical_names(control, account)
    found = search(versions, query.filter, query.order_by, canonical)
    rows, following = page(found, query.page_size, query.page_token)
    key = "trainingShapeVersions" if collection == "trainingShapes" else "deploymentShapeVersions"
    return {key: [row.wire() for row in rows], "nextPageToken": following, "totalSize": len(found)}


def _get(control: Control, account: str, shapes: Sequence[Shape], name: str) -> Json:
    return training_shapes.show(control, training_shapes.find(shapes, account, name, field="name")).wire()
