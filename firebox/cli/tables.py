"""How a command shows rows: as a table with colours on a terminal, or as the JSON of the wire."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

Rows = list[dict[str, Any]]

_GOOD = ("READY", "RUNNING", "ACTIVE", "ok")
_BAD = ("FAILED", "CANCELLED", "REVOKED")


def show(rows: Rows, columns: Mapping[str, str], as_json: bool) -> None:
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


def _cell(value: Any) -> Any:
    from rich.text import Text

    if isinstance(value, bool):
        text = "yes" if value else ""
    else:
        text = ", ".join(value) if isinstance(value, list) else _short(str(value))
    state = text.rpartition("JOB_STATE_")[2]
    return Text(text, "green" if state in _GOOD else "red" if state in _BAD else "")


def _short(value: str) -> str:
    """A resource name without what every name of its table has in common, a time to the second."""
    if re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", value):
        return value[:19].replace("T", " ")
    return re.sub(r"^accounts/[^/]+/\w+/([^/]+)(/versions/1)?", r"\1", value)
