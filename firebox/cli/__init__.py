"""The `firebox` command: parse, build objects, start one process. Every heavy room is imported by the command that
needs it, so that help is instant."""

from __future__ import annotations

import sys

import typer

from firebox.cli import chat, doctor, keys, models, resources, server, workers
from firebox.wire.errors import FireboxError

app = typer.Typer(
    help="A training-API server for your own machines.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
app.command("up")(server.up)
app.command("status")(resources.status)
app.add_typer(models.models_app, name="models")
app.command("shapes")(resources.shapes)
app.command("jobs")(resources.jobs)
app.command("deployments")(resources.deployments)
app.command("checkpoints")(resources.checkpoints)
app.add_typer(keys.keys_app, name="keys")
app.command("logs")(resources.logs)
app.command("doctor")(doctor.doctor)
app.command("chat")(chat.chat)
app.command("trainer")(workers.trainer)
app.command("sampler")(workers.sampler)
app.command("export", hidden=True)(workers.export)


def main() -> None:
    """Run the command line; a mistake of the user ends in one line, not in a traceback."""
    try:
        app()
    except FireboxError as error:
        print(f"firebox: {error.message}", file=sys.stderr)
        sys.exit(1)
