"""`firebox up`: control plane and gateway in one process, from an empty directory to a served socket and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from firebox.cli.options import DEFAULT_DATA_DIR, DataDir
from firebox.wire.worker import ComputeMode

HostNames = Annotated[
    list[str] | None,
    typer.Option(help="Answer to this host name, too, such as that of a TLS proxy in front. May be repeated."),
]
Folders = Annotated[
    list[Path] | None,
    typer.Option(
        help="Let load_adapter read PEFT directories beneath this one. May be repeated.", exists=True, file_okay=False
    ),
]
Mode = Annotated[
    ComputeMode,
    typer.Option(
        help="exact: a result depends on its own request alone. bitwise: sampler and trainer agree to the last "
        "bit; float32 on a CPU, slower. throughput: LoRA models share passes; equal to 1e-6."
    ),
]


def up(
    data_dir: DataDir = DEFAULT_DATA_DIR,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    allow_host: HostNames = None,
    model: Annotated[
        list[Path] | None,
        typer.Option(help="Register this model directory at start, under its folder's name. May be repeated."),
    ] = None,
    idle_minutes: Annotated[
        float, typer.Option(help="Put away Tinker sessions and their workers after this silence.", min=0.01)
    ] = 10.0,
    allow_dir: Folders = None,
    mode: Mode = "exact",
    log_json: Annotated[bool, typer.Option("--log-json", help="Log one JSON object per line.")] = False,
    memory_gib: Annotated[
        float | None,
        typer.Option(help="Memory for all workers together; what needs more waits. By default all there is.", min=0.1),
    ] = None,
    keep_last: Annotated[
        int | None,
        typer.Option(help="Keep so many states and so many snapshots of each job, and what is in use.", min=1),
    ] = None,
    disk_budget_gib: Annotated[
        float | None,
        typer.Option(help="What all that jobs save may take; the oldest that nobody needs goes first.", min=0.001),
    ] = None,
) -> None:
    """Start the server.

    Examples: firebox up | firebox up --port 0 --data-dir ./data --model ./Qwen3-0.6B
    """
    from firebox.cli.up import run
    from firebox.control.services.retention import Limits

    run(
        data_dir.expanduser().resolve(),
        host,
        port,
        model or [],
        idle_s=idle_minutes * 60,
        allow_dirs=[directory.expanduser().resolve() for directory in allow_dir or ()],
        mode=mode,
        log_json=log_json,
        memory=int(memory_gib * 2**30) if memory_gib else None,
        limits=Limits(keep_last, int(disk_budget_gib * 2**30) if disk_budget_gib else None),
        host_names=allow_host or (),
    )
