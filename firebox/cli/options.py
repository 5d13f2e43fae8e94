"""Options that several commands share, and the client they ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from firebox.cli.client import Client

DataDir = Annotated[Path, typer.Option("--data-dir", help="The server's data directory.", envvar="FIREBOX_DATA_DIR")]
DEFAULT_DATA_DIR = Path("~/.firebox")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def connect(data_dir: Path) -> Client:
    """A client of the running server; imported here, because help must not wait for it."""
    from firebox.cli.client import Client

    return Client(data_dir)
