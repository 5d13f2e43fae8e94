"""Hardware templates, one YAML file each. A shape is a template applied to one registered model and one mode."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field


class Template(BaseModel):
    """One kind of hardware. `threads` is per worker; auto is half of this machine's cores, at least one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    accelerator_type: str
    accelerator_count: int = Field(ge=0)
    max_context_length: int = Field(ge=1)
    threads: int | Literal["auto"]
    dtype: Literal["float32", "bfloat16"]

    @property
    def num_threads(self) -> int:
        return max(1, (os.cpu_count() or 1) // 2) if self.threads == "auto" else self.threads


def load_templates() -> list[Template]:
    """Every template of this folder, by file name."""
    files = sorted(Path(__file__).parent.glob("*.yaml"))
    return [Template.model_validate(yaml.safe_load(path.read_text())) for path in files]
