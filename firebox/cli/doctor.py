"""`firebox doctor`: is this machine fit to run a server, and does the running one answer? One line and one fix each."""

from __future__ import annotations

import os
import platform
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

import typer

from firebox.cli.options import DEFAULT_DATA_DIR, AsJson, DataDir
from firebox.cli.tables import show

_NEEDED: Final = ("torch", "transformers", "peft", "safetensors", "fastapi", "uvicorn", "fireworks-ai", "tinker")
_FREE_GIB: Final = 5.0
_MEMORY_GIB: Final = 2.0
_FIXED_SQLITE: Final = (3, 51, 3)


class Trouble(Exception):
    """A check that failed: what is wrong, and what mends it."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__(found)
        self.found, self.fix = found, fix


def doctor(data_dir: DataDir = DEFAULT_DATA_DIR, as_json: AsJson = False) -> None:
    """Check this machine, the data directory and the running server. Example: firebox doctor"""
    rows = []
    for name, check in _checks(data_dir.expanduser().resolve()):
        try:
            rows.append({"check": name, "state": "ok", "found": check(), "fix": ""})
        except Trouble as trouble:
            rows.append({"check": name, "state": "FAILED", "found": trouble.found, "fix": trouble.fix})
    show(rows, {"check": "check", "state": "state", "found": "found", "fix": "fix"}, as_json)
    if any(row["state"] != "ok" for row in rows):
        raise typer.Exit(1)


def _checks(data: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "Python", platform.python_version
    yield "packages", _packages
    yield "SQLite", _sqlite
    yield "compute", _compute
    yield "memory", _memory
    yield "data directory", lambda: _directory(data)
    yield "disk", lambda: _disk(data)
    yield "server", lambda: _server(data)


def _packages() -> str:
    missing = [name for name in _NEEDED if not _version(name)]
    if missing:
        raise Trouble(f"{', '.join(missing)} missing", "install into this environment: pip install -e .")
    return ", ".join(f"{name} {_version(name)}" for name in _NEEDED[:3])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _sqlite() -> str:
    # Older versions can lose writes when two connections write; a server has one, so that is a note, not a fault.
    old = " (with one writer, as here, fine)" if sqlite3.sqlite_version_info < _FIXED_SQLITE else ""
    return sqlite3.sqlite_version + old


def _compute() -> str:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"{os.cpu_count()} cores, " + (", ".join(gpus) or "no GPU: the CPU shapes can be used")


def _memory() -> str:
    gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if gib < _MEMORY_GIB:
        raise Trouble(f"{gib:.1f} GiB", f"a trainer and a sampler of a tiny model take {_MEMORY_GIB:.0f} GiB")
    return f"{gib:.0f} GiB"


def _directory(data: Path) -> str:
    if not data.exists():
        return f"{data} will be made"
    if not os.access(data, os.W_OK):
        raise Trouble(f"{data} cannot be written", f"chown it to you, or choose another --data-dir: {data}")
    if data.stat().st_mode & 0o077:
        raise Trouble(f"{data} can be read by others", f"chmod 700 {data}")
    return str(data)


def _disk(data: Path) -> str:
    place = next(path for path in (data, *data.parents) if path.exists())
    free = shutil.disk_usage(place).free / 2**30
    if free < _FREE_GIB:
        raise Trouble(f"{free:.1f} GiB free in {place}", "free some, or choose a --data-dir on a larger disk")
    return f"{free:.0f} GiB free"


def _server(data: Path) -> str:
    from firebox.cli.client import Client
    from firebox.wire.errors import FireboxError

    try:
        client = Client(data)
    except FireboxError as error:
        raise Trouble("no answer", error.message) from error
    return f"{client.url} answers, account {client.account}"
