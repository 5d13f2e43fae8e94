"""Hardware templates, one version of one template per YAML file. A shape is a template applied to one model and mode.

Owns what a file may say. Invariant: no two files describe the same version of the same template.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from firebox.wire.errors import InvalidArgument

SHIPPED: Final = Path(__file__).parent


class Template(BaseModel):
    """One version of one kind of hardware.

    `accelerator_type` is CPU, or what the names of the accelerators that will do begin with; a count of `all` is every
    one of this machine. A worker has them alone unless they are `shared`. `threads` is per worker: a number,
    `share` for an equal part of the cores, or `all`. A shape named without a version is the newest `validated` one.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str = Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$")
    version: int = Field(default=1, ge=1)
    validated: bool = True
    accelerator_type: str = Field(min_length=1)
    accelerator_count: Annotated[int, Field(ge=0)] | Literal["all"] = 0
    shared: bool = False
    node_count: int = Field(default=1, ge=1)
    max_context_length: int = Field(ge=1)
    threads: Annotated[int, Field(ge=1)] | Literal["share", "all"]
    dtype: Literal["float32", "bfloat16"]


def load_templates(own: Path) -> list[Template]:
    """The templates that come with the server and those in the folder `own`, by name and version.

    Raises InvalidArgument naming the file and the field.
    """
    found: dict[tuple[str, int], Template] = {}
    for path in (*sorted(SHIPPED.glob("*.yaml")), *sorted(own.glob("*.yaml"))):
        template = _read(path)
        key = (template.id, template.version)
        if key in found:
            raise InvalidArgument(
                f"{path}: version: {template.id!r} has a version {template.version}; give another one"
            )
        found[key] = template
    return [found[key] for key in sorted(found)]


def latest(templates: Sequence[Template]) -> list[Template]:
    """The newest validated version of each template."""
    newest = {template.id: template for template in templates if template.validated}
    return list(newest.values())


def _read(path: Path) -> Template:
    try:
        return Template.model_validate(yaml.safe_load(path.read_text()))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidArgument(f"{path}: not a readable YAML file: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = first["loc"][0] if first["loc"] else "the file"
        raise InvalidArgument(f"{path}: {field}: {first['msg']} (got {first['input']!r})") from error
