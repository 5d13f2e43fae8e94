"""The dry run of a recipe: every setting and where its value comes from, what the shapes decide, an estimate.

Knows no recipe and touches no resource. Invariant: each field of a configuration is listed exactly once, under the
name that the command line gives it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.table import Column, Table

from training.utils.config import Checked, RecipeConfig, RunConfig

if TYPE_CHECKING:
    from fireworks.training.sdk import TrainingShapeProfile

BY_SHAPE = {
    "infra.accelerator_type": "accelerator_type",
    "infra.accelerator_count": "accelerator_count",
    "infra.node_count": "node_count",
    "infra.custom_image_tag": "trainer_image_tag",
    "deployment.deployment_shape": "deployment_shape",
}


class Setting(NamedTuple):
    """One resolved value. `source` is set, default, derived, environment, or the name of the shape that decides."""

    name: str
    value: Any
    source: str


def settings(config: RecipeConfig) -> dict[str, Any]:
    """All fields by their names on the command line, as plain values. For records of a run."""
    return {s.name: _plain(s.value) for s in _listed(config)}


def resolve(config: RecipeConfig, policy: TrainingShapeProfile) -> list[Setting]:
    """Every setting as a run would use it: the user's, the defaults, and what the trainer's shape fills in."""
    resolved = [Setting("FIREWORKS_BASE_URL", os.environ.get("FIREWORKS_BASE_URL", "unset"), "environment")]
    for setting in _listed(config):
        if setting.value is None and setting.name in BY_SHAPE:
            value = getattr(policy, BY_SHAPE[setting.name])
            setting = Setting(setting.name, value, str(policy.training_shape_version))
        elif setting.value is None and setting.name == "deployment.deployment_id":
            setting = Setting(setting.name, "made when it is created", "derived from base_model")
        resolved.append(setting)
    return resolved


def show(config: RecipeConfig, policy: TrainingShapeProfile, estimate: Mapping[str, Any]) -> dict[str, Any]:
    """Print settings, shape and estimate as tables. Returns them: {"settings", "shape", "estimate"}."""
    resolved = resolve(config, policy)
    shape = {name: value for name, value in vars(policy).items() if value not in (None, "")}
    console = Console(stderr=True)
    for title, rows in (
        ("Settings and where they come from", [(s.name, _text(s.value), s.source) for s in resolved]),
        (f"Training shape {policy.training_shape}", [(name, _text(value)) for name, value in shape.items()]),
        ("Estimate; nothing was created", [(name, _text(value)) for name, value in estimate.items()]),
    ):
        table = Table.grid("", *[Column(overflow="fold") for _ in rows[0]], padding=(0, 2))
        for row in rows:
            table.add_row("", *row)
        console.print(f"\n{title}", table)
    sources = {s.name: {"value": _plain(s.value), "source": s.source} for s in resolved}
    return {"settings": sources, "shape": shape, "estimate": dict(estimate)}


def _listed(config: Checked | RecipeConfig, prefix: str = "", defaults: Checked | None = None) -> Iterator[Setting]:
    for field in fields(config):  # type: ignore[arg-type]
        value, default = getattr(config, field.name), _default(field, defaults)
        if is_dataclass(value) and isinstance(value, Checked):
            nested = "" if isinstance(value, RunConfig) else f"{prefix}{field.name}."
            yield from _listed(value, nested, default if isinstance(default, Checked) else None)
        else:
            yield Setting(prefix + field.name, value, "default" if default == value else "set")


def _default(field: Field[Any], defaults: Checked | None) -> Any:
    if defaults is not None:
        return getattr(defaults, field.name)
    return field.default_factory() if field.default_factory is not MISSING else field.default


def _plain(value: Any) -> Any:
    """What JSON can hold; anything else, a function say, becomes its text."""
    return value if isinstance(value, str | int | float | list | dict | None) else str(value)


def _text(value: Any) -> str:
    return "-" if value is None else str(value)
