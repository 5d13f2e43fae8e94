"""Files through which another program follows a run, each written where an environment variable says.

    COOKBOOK_STATUS_FILE     {"state", "step", "total_steps", "message", "time"}; the state is starting, running,
                             completed, stopped or failed
    COOKBOOK_METADATA_FILE   what the run is: its settings, log_path, process, jobs
    COOKBOOK_METRICS_FILE    the rows of metrics.jsonl, one per line, as they are made
    COOKBOOK_OUTPUT_FILE     what the recipe returned

Knows no metric. Invariant: a reader never sees half a file; only the metrics grow line by line.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training.utils.errors import ConfigError


class Reports:
    """The files that are asked for at this moment. Raises ConfigError for one that cannot be written."""

    def __init__(self) -> None:
        self._paths = {
            kind: Path(path)
            for kind in ("STATUS", "METADATA", "METRICS", "OUTPUT")
            if (path := os.environ.get(f"COOKBOOK_{kind}_FILE"))
        }
        for kind, file in self._paths.items():
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                file.unlink(missing_ok=True)
            except OSError as exc:
                fix = f"name a file that can be written ({exc})"
                raise ConfigError(f"COOKBOOK_{kind}_FILE", str(file), fix) from exc

    def status(self, state: str, step: int = 0, total_steps: int | None = None, message: str = "") -> None:
        about = {"state": state, "step": step, "total_steps": total_steps, "message": message, "time": time.time()}
        self._replace("STATUS", about)

    def metadata(self, about: Mapping[str, Any]) -> None:
        self._replace("METADATA", about)

    def metrics(self, row: Mapping[str, Any]) -> None:
        if path := self._paths.get("METRICS"):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def output(self, result: Mapping[str, Any]) -> None:
        self._replace("OUTPUT", result)

    def _replace(self, kind: str, content: Mapping[str, Any]) -> None:
        if path := self._paths.get(kind):
            whole = path.with_name(f"{path.name}.{os.getpid()}")
            whole.write_text(json.dumps(content, indent=1), encoding="utf-8")
            whole.replace(path)
