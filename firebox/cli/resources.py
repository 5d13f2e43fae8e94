"""The commands that show and change resources of a running server, as tables or, with --json, as the wire has them."""

from __future__ import annotations

from typing import Annotated

import typer

from firebox.cli.options import DEFAULT_DATA_DIR, AsJson, DataDir, connect
from firebox.cli.tables import show


def status(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """What the server runs. Example: firebox status --json"""
    client = connect(data_dir)
    running = [
        row
        for collection in ("rlorTrainerJobs", "deployments")
        for pooled in ("false", "true")
        for row in client.every(collection, collection, pooled=pooled)
    ]
    if not as_json:
        place = f", data in {client.layout.root}" if client.is_local else ""
        print(f"{client.url}, account {client.account}{place}")
    show(running, {"what": "name", "state": "state", "message": "statusMessage"}, as_json)


def shapes(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Training shapes: what a trainer job can be created on, and why not here. Example: firebox shapes"""
    client = connect(data_dir)
    found = client.every("trainingShapes/-/versions", "trainingShapeVersions")
    rows = found if as_json else [{**version, **version["snapshot"]} for version in found]
    columns = {"shape": "name", "trains": "trainerMode", "on": "acceleratorType", "tokens": "maxSupportedContextLength"}
    show(rows, columns | {"not here": "misfit"}, as_json)
    if not as_json:
        print(f"In a recipe: --infra.training-shape-id accounts/{client.account}/trainingShapes/<shape>")


def jobs(
    deleted: Annotated[bool, typer.Option("--deleted", help="Show those that were deleted, too.")] = False,
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """Trainer jobs, newest first. Example: firebox jobs --deleted"""
    found = connect(data_dir).every("rlorTrainerJobs", "rlorTrainerJobs", showDeleted=str(deleted).lower())
    show(found, {"job": "name", "state": "state", "shape": "trainingShape", "message": "statusMessage"}, as_json)


def deployments(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Deployments, newest first. Example: firebox deployments"""
    found = connect(data_dir).every("deployments", "deployments")
    columns = {"deployment": "name", "state": "state", "model": "baseModel", "job": "hotLoadTrainerJob"}
    show(found, columns | {"message": "statusMessage"}, as_json)


def checkpoints(
    job: Annotated[str, typer.Argument(help="Id of a trainer job, a deleted one included.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """What a job has saved, oldest first. Example: firebox checkpoints my-job"""
    found = connect(data_dir).every(f"rlorTrainerJobs/{job}/checkpoints", "checkpoints")
    columns = {"checkpoint": "name", "type": "checkpointType", "promotable": "promotable", "made": "createTime"}
    show(found, columns, as_json)


def logs(
    name: Annotated[str, typer.Argument(help="Id of a trainer job or of a deployment.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Print what the worker of a job, or of a deployment, has logged. Example: firebox logs my-job"""
    from firebox.wire.errors import NotFound

    client = connect(data_dir)
    layout = client.files()
    paths = [layout.job_log(client.account, name), layout.deployment_log(client.account, name)]
    found = [path for path in paths if path.exists()]
    if not found:
        raise NotFound(f"no trainer job and no deployment {name!r} has logged anything; see firebox status")
    for path in found:
        print(path.read_text(errors="replace"), end="")
