"""`firebox trainer`, `firebox sampler`, `firebox export`: the processes that load a model.

With `--spec` they are a server's children; with `--model` they serve alone on this machine.
"""

from __future__ import annotations

import json
import secrets
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import msgspec
import typer

from firebox.wire.errors import InvalidArgument
from firebox.wire.names import DEFAULT_ACCOUNT, resource
from firebox.wire.worker import SamplerSpec, TrainerSpec, WorkerRuntime

if TYPE_CHECKING:
    from firebox.launch.host import App

_Spec = TypeVar("_Spec", TrainerSpec, SamplerSpec)

SpecFile = Annotated[Path | None, typer.Option(help="The spec that a server wrote.", hidden=True)]
ModelDir = Annotated[Path | None, typer.Option(help="A Hugging Face model directory to serve alone.")]
Port = Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.", min=0, max=65535)]


def trainer(
    spec: SpecFile = None,
    model: ModelDir = None,
    port: Port = 8001,
    lora_rank: Annotated[int, typer.Option(help="Largest adapter rank; 0 trains all weights.", min=0)] = 0,
) -> None:
    """Serve training of one model, without a server. Example: firebox trainer --model ./tiny --port 0"""

    def alone(directory: Path, runtime: WorkerRuntime) -> TrainerSpec:
        job_dir = Path(tempfile.mkdtemp(prefix="firebox-trainer-"))
        print(f"Checkpoints and snapshots go to {job_dir}")
        return TrainerSpec(
            job=resource(DEFAULT_ACCOUNT, "rlorTrainerJobs", "alone"),
            base_model=resource(DEFAULT_ACCOUNT, "models", directory.name),
            model_dir=str(directory),
            job_dir=str(job_dir / "alone"),
            jobs_dir=str(job_dir),
            max_context_length=_context_length(directory),
            lora_rank=lora_rank,
            runtime=runtime,
        )

    def build(wanted: TrainerSpec) -> App:
        from firebox.trainer.server import build_app

        return build_app(wanted)

    _run(TrainerSpec, alone, build, spec, model, port)


def sampler(spec: SpecFile = None, model: ModelDir = None, port: Port = 8002) -> None:
    """Serve completions of one model, without a server. Example: firebox sampler --model ./tiny --port 0"""

    def alone(directory: Path, runtime: WorkerRuntime) -> SamplerSpec:
        return SamplerSpec(
            deployment=resource(DEFAULT_ACCOUNT, "deployments", "alone"),
            base_model=resource(DEFAULT_ACCOUNT, "models", directory.name),
            model_dir=str(directory),
            max_context_length=_context_length(directory),
            runtime=runtime,
        )

    def build(wanted: SamplerSpec) -> App:
        from firebox.sampler.server import build_app

        return build_app(wanted)

    _run(SamplerSpec, alone, build, spec, model, port)


def export() -> None:
    """Make one snapshot a Hugging Face directory: an ExportRequest on stdin, an ExportReport on stdout."""
    from firebox.launch.child import end_with_parent

    end_with_parent()  # before torch is imported, which takes seconds
    from firebox.export.child import main

    sys.exit(main())


def _run(
    kind: type[_Spec],
    alone: Callable[[Path, WorkerRuntime], _Spec],
    build: Callable[[_Spec], App],
    spec_file: Path | None,
    model: Path | None,
    port: int,
) -> None:
    from firebox.launch.host import serve, serve_alone

    if (spec_file is None) == (model is None):
        raise InvalidArgument("--model: give the model directory to serve")
    if spec_file is not None:
        spec = msgspec.json.decode(spec_file.read_bytes(), type=kind)
        serve(lambda: build(spec), spec.runtime)
    elif model is not None:
        token = secrets.token_urlsafe(24)
        wanted = alone(model.resolve(), WorkerRuntime(socket="", token=token))
        serve_alone(lambda: build(wanted), token, port, lambda url: print(f"Serving at {url}, API key {token}"))


def _context_length(directory: Path) -> int:
    try:
        config = json.loads((directory / "config.json").read_bytes())
        return int((config.get("text_config") or config)["max_position_embeddings"])
    except (OSError, ValueError, KeyError) as error:
        raise InvalidArgument(f"--model: {directory} is not a Hugging Face model directory ({error!r})") from error
