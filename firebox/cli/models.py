"""The commands on registered models. Weights do not travel over the wire: a command that needs files must run on the
server's machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from firebox.cli.options import DEFAULT_DATA_DIR, AsJson, DataDir, connect
from firebox.cli.tables import show

if TYPE_CHECKING:
    from firebox.cli.client import Client

models_app = typer.Typer(help="Add, pull, make, promote, export and list models.", no_args_is_help=True)

NewModel = Annotated[str, typer.Argument(help="Id of the new model.")]


@models_app.command("list")
def list_models(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Registered models. Example: firebox models list"""
    columns = {"model": "name", "kind": "kind", "context": "contextLength", "aliases": "aliases", "made": "createTime"}
    columns |= {"differs by": "maxAbsDiff"}
    show(connect(data_dir).every("models", "models"), columns, as_json)


@models_app.command("add")
def add_model(
    name: NewModel,
    source: Annotated[Path, typer.Option("--from", help="A Hugging Face directory with safetensors weights.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Copy a model directory into the server. Example: firebox models add qwen3-0.6b --from ./Qwen3-0.6B"""
    from firebox.control.services.model_dir import stage

    client = connect(data_dir)
    _register(client, name, stage(source, client.files().staging))


@models_app.command("pull")
def pull_model(
    repository: Annotated[str, typer.Argument(help="Name on the Hugging Face hub, such as Qwen/Qwen3-0.6B.")],
    name: Annotated[str, typer.Option(help="Id of the new model; without it, the repository's name.")] = "",
    revision: Annotated[str, typer.Option(help="Branch, tag or commit.")] = "main",
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Download a model from the hub; it answers to its hub name, too. Example: firebox models pull Qwen/Qwen3-0.6B"""
    from firebox.cli.hub import download
    from firebox.control.services.model_dir import stage

    client = connect(data_dir)
    staging = client.files().staging
    directory, commit = download(repository, revision)
    model = _register(client, name or repository.rpartition("/")[2].lower(), stage(directory, staging))
    client.ask("PATCH", f"/v1/{model}", json={"aliases": [repository]})
    print(f"It is {repository} at commit {commit}")


@models_app.command("make-tiny")
def make_tiny_model(
    name: NewModel,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Make a small random model with its tokenizer, to try things with. Example: firebox models make-tiny tiny"""
    import uuid

    client = connect(data_dir)
    staging = client.files().staging
    from firebox.modeling.tiny import make_tiny

    staged = uuid.uuid4().hex
    make_tiny(staging / staged, seed=seed)
    _register(client, name, staged)


@models_app.command("promote")
def promote_model(
    job: Annotated[str, typer.Argument(help="Id of a trainer job, a deleted one included.")],
    checkpoint: Annotated[str, typer.Argument(help="One that firebox checkpoints calls promotable.")],
    name: NewModel,
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Make a checkpoint a model, loaded again and compared. Example: firebox models promote job final-1f mine"""
    client = connect(data_dir)
    trainer_job = client.own("GET", f"rlorTrainerJobs/{job}")
    request = {
        "output_model": f"accounts/{client.account}/models/{name}",
        "trainer_job_id": trainer_job["name"],
        "base_model": trainer_job["trainingConfig"]["baseModel"],
    }
    done = client.own("POST", f"checkpoints/{checkpoint}:promote", json=request, timeout=_PROMOTE_WITHIN_S)
    if "model" in done:
        model = done["model"]
        print(f"{model['name']} is ready; its log-probs differ from the trainer's by {model['maxAbsDiff']:.2g} nats")
    else:
        print(f"Still at it: {done['operation']['name']}; firebox models list shows it when it is ready")


@models_app.command("export")
def export_model(
    name: Annotated[str, typer.Argument(help="Id of the model.")],
    target: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Copy a model to a directory that from_pretrained loads. Example: firebox models export mine ./mine"""
    from firebox.cli.export import export

    client = connect(data_dir)
    base = export(client, client.files(), name, target)
    print(f"{target} is there" + (f"; its base model is {base}" if base else ""))


@models_app.command("alias")
def alias_model(
    name: Annotated[str, typer.Argument(help="Id of the model.")],
    hub_names: Annotated[list[str], typer.Argument(help="Every other name it is to answer to, such as Qwen/Qwen3-8B.")],
    data_dir: DataDir = DEFAULT_DATA_DIR,
) -> None:
    """Let a model answer to hub names. Example: firebox models alias qwen3-8b-base Qwen/Qwen3-8B-Base"""
    model = connect(data_dir).own("PATCH", f"models/{name}", json={"aliases": hub_names})
    print(f"{model['name']} answers to {', '.join(model['aliases'])}")


@models_app.command("delete")
def delete_model(
    name: Annotated[str, typer.Argument(help="Id of the model.")], data_dir: DataDir = DEFAULT_DATA_DIR
) -> None:
    """Remove a model and its files, unless something uses it. Example: firebox models delete mine"""
    connect(data_dir).own("DELETE", f"models/{name}")
    print(f"{name} is removed")


_PROMOTE_WITHIN_S = 300.0


def _register(client: Client, name: str, staged: str) -> str:
    """The resource name of the new model."""
    model = client.own("POST", "models", json={"modelId": name, "stagedDir": staged})
    print(f"{model['name']} is ready; its shapes: firebox shapes")
    return str(model["name"])
