"""The commands that show and change resources of a running server, as tables or, with --json, as the wire has them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from firebox.cli.options import DEFAULT_DATA_DIR, DataDir

if TYPE_CHECKING:
    from firebox.cli.client import Client

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Rows = list[dict[str, Any]]

models_app = typer.Typer(help="Add, make and list models.", no_args_is_help=True)


def status(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """What the server runs. Example: firebox status --json"""
    client = _client(data_dir)
    running = [
        row
        for collection in ("rlorTrainerJobs", "deployments")
        for pooled in ("false", "true")
        for row in client.every(collection, collection, pooled=pooled)
    ]
    if not as_json:
        place = f", data in {client.layout.root}" if client.is_local else ""
        print(f"{client.url}, account {client.account}{place}")
    _show(running, {"what": "name", "state": "state", "message": "statusMessage"}, as_json)


@models_app.command("add")
def add_model(
    name: Annotated[str, typer.Argument(help="Id of the new model.")],
    source: Annotated[Path, typer.Option("--from", help="A Hugging Face directory with safetensors weights.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Copy a model directory into the server. Example: firebox models add qwen3-0.6b --from ./Qwen3-0.6B"""
    from firebox.control.services.model_dir import stage

    client = _client(data_dir)
    _register(client, name, stage(source, client.staging()))


@models_app.command("make-tiny")
def make_tiny_model(
    name: Annotated[str, typer.Argument(help="Id of the new model.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Make a small random model with its tokenizer, to try things with. Example: firebox models make-tiny tiny"""
    import uuid

    client = _client(data_dir)
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
    model = _client(data_dir).own("PATCH", f"models/{name}", json={"aliases": hub_names})
    print(f"{model['name']} answers to {', '.join(model['aliases'])}")


@models_app.command("list")
def list_models(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Registered models. Example: firebox models list"""
    columns = {"model": "name", "kind": "kind", "context": "contextLength", "aliases": "aliases", "made": "createTime"}
    _show(_client(data_dir).every("models", "models"), columns, as_json)


def shapes(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Training shapes: what a trainer job can be created on. Example: firebox shapes"""
    client = _client(data_dir)
    found = client.every("trainingShapes/-/versions", "trainingShapeVersions")
    rows = found if as_json else [{"name": version["name"], **version["snapshot"]} for version in found]
    columns = {"shape": "name", "trains": "trainerMode", "on": "acceleratorType", "tokens": "maxSupportedContextLength"}
    _show(rows, columns, as_json)
    if not as_json:
        print(f"In a recipe: --infra.training-shape-id accounts/{client.account}/trainingShapes/<shape>")


def jobs(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Trainer jobs, newest first. Example: firebox jobs --json"""
    found = _client(data_dir).every("rlorTrainerJobs", "rlorTrainerJobs")
    _show(found, {"job": "name", "state": "state", "shape": "trainingShape", "message": "statusMessage"}, as_json)


def deployments(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Deployments, newest first. Example: firebox deployments"""
    found = _client(data_dir).every("deployments", "deployments")
    columns = {"deployment": "name", "state": "state", "model": "baseModel", "job": "hotLoadTrainerJob"}
    _show(found, columns | {"message": "statusMessage"}, as_json)


def checkpoints(
    job: Annotated[str, typer.Argument(help="Id of a trainer job, a deleted one included.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
    as_json: AsJson = False,
) -> None:
    """What a job has saved, oldest first. Example: firebox checkpoints my-job"""
    found = _client(data_dir).every(f"rlorTrainerJobs/{job}/checkpoints", "checkpoints")
    columns = {"checkpoint": "name", "type": "checkpointType", "promotable": "promotable", "made": "createTime"}
    _show(found, columns, as_json)


def logs(
    job: Annotated[str, typer.Argument(help="Id of a trainer job.")], data_dir: DataDir = DEFAULT_DATA_DIR
) -> None:
    """Print the log of a job's trainer. Example: firebox logs my-job"""
    from firebox.wire.errors import NotFound

    client = _client(data_dir)
    client.own("GET", f"rlorTrainerJobs/{job}")
    path = client.layout.job_log(client.account, job)
    if not path.exists():
        raise NotFound(f"{path} does not exist; run this on the server's machine, with its --data-dir")
    print(path.read_text(errors="replace"), end="")


def _client(data_dir: Path) -> Client:
    from firebox.cli.client import Client

    return Client(data_dir)


def _register(client: Client, name: str, staged: str) -> None:
    model = client.own("POST", "models", json={"modelId": name, "stagedDir": staged})
    print(f"{model['name']} is ready; its shapes: firebox shapes")


def _show(rows: Rows, columns: Mapping[str, str], as_json: bool) -> None:
    """Print `rows`: as JSON whole, as a table the fields that `columns` maps headings to."""
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    if not rows:
        print("None yet.")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for number, heading in enumerate(columns):
        table.add_column(heading, overflow="fold", no_wrap=number == 0)
    for row in rows:
        table.add_row(*(_cell(row.get(field, "")) for field in columns.values()))
    Console().print(table)


def _cell(value: Any) -> str:
    return ", ".join(value) if isinstance(value, list) else _short(str(value))


def _short(value: str) -> str:
    """A resource name without what every name of its table has in common."""
    return re.sub(r"^accounts/[^/]+/\w+/([^/]+)(/versions/1)?", r"\1", value)
