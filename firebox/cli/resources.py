"""The commands that show and change resources of a running server, as tables or, with --json, as the wire has them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firebox.cli.options import DEFAULT_DATA_DIR, AsJson, DataDir, connect
from firebox.cli.tables import show

if TYPE_CHECKING:
    from firebox.cli.client import Client

models_app = typer.Typer(help="Add, make and list models.", no_args_is_help=True)


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


@models_app.command("add")
def add_model(
    name: Annotated[str, typer.Argument(help="Id of the new model.")],
    source: Annotated[Path, typer.Option("--from", help="A Hugging Face directory with safetensors weights.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Copy a model directory into the server. Example: firebox models add qwen3-0.6b --from ./Qwen3-0.6B"""
    from firebox.control.services.model_dir import stage

    client = connect(data_dir)
    _register(client, name, stage(source, client.staging()))


@models_app.command("make-tiny")
def make_tiny_model(
    name: Annotated[str, typer.Argument(help="Id of the new model.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Make a small random model with its tokenizer, to try things with. Example: firebox models make-tiny tiny"""
    import uuid

    client = connect(data_dir)
    staging = client.staging()
    from firebox.modeling.tiny import make_tiny

    staged = uuid.uuid4().hex
    make_tiny(staging / staged, seed=seed)
    _register(client, name, staged)


@models_app.command("alias")
def alias_model(
    name: Annotated[str, typer.Argument(help="Id of the model.")],
    hub_names: Annotated[list[str], typer.Argument(help="Every other name it is to answer to, such as Qwen/Qwen3-8B.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Let a model answer to hub names. Example: firebox models alias qwen3-8b-base Qwen/Qwen3-8B-Base"""
    model = connect(data_dir).own("PATCH", f"models/{name}", json={"aliases": hub_names})
    print(f"{model['name']} answers to {', '.join(model['aliases'])}")


@models_app.command("list")
def list_models(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Registered models. Example: firebox models list"""
    columns = {"model": "name", "kind": "kind", "context": "contextLength", "aliases": "aliases", "made": "createTime"}
    show(connect(data_dir).every("models", "models"), columns, as_json)


def shapes(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Training shapes: what a trainer job can be created on. Example: firebox shapes"""
    client = connect(data_dir)
    found = client.every("trainingShapes/-/versions", "trainingShapeVersions")
    rows = found if as_json else [{"name": version["name"], **version["snapshot"]} for version in found]
    columns = {"shape": "name", "trains": "trainerMode", "on": "acceleratorType", "tokens": "maxSupportedContextLength"}
    show(rows, columns, as_json)
    if not as_json:
        print(f"In a recipe: --infra.training-shape-id accounts/{client.account}/trainingShapes/<shape>")


def jobs(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Trainer jobs, newest first. Example: firebox jobs --json"""
    found = connect(data_dir).every("rlorTrainerJobs", "rlorTrainerJobs")
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
    job: Annotated[str, typer.Argument(help="Id of a trainer job.")], data_dir: DataDir = DEFAULT_DATA_DIR
) -> None:
    """Print the log of a job's trainer. Example: firebox logs my-job"""
    from firebox.wire.errors import NotFound

    client = connect(data_dir)
    client.own("GET", f"rlorTrainerJobs/{job}")
    path = client.layout.job_log(client.account, job)
    if not path.exists():
        raise NotFound(f"{path} does not exist; run this on the server's machine, with its --data-dir")
    print(path.read_text(errors="replace"), end="")


def _register(client: Client, name: str, staged: str) -> None:
    model = client.own("POST", "models", json={"modelId": name, "stagedDir": staged})
    print(f"{model['name']} is ready; its shapes: firebox shapes")
