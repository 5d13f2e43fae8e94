"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

DataDir = Annotated[Path, typer.Option("--data-dir", help="The server's data directory.", envvar="FIREBOX_DATA_DIR")]
DEFAULT_DATA_DIR = Path("~/.firebox")
