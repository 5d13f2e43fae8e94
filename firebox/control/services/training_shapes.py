"""Training and deployment shapes: every hardware template applied to every registered model and mode.

Nothing is stored: shapes follow from the models and the catalogue. A shape has exactly one version, `1`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from firebox import __version__
from firebox.control.catalogue import Template
from firebox.control.services import models
from firebox.control.services.context import Control
from firebox.control.tables.models import ModelRow
from firebox.wire.control import DeploymentShapeSnapshot, ShapeVersion, TrainerMode, TrainingShapeSnapshot
from firebox.wire.errors import FailedPrecondition, InvalidArgument, NotFound
from firebox.wire.names import SHARED_ACCOUNT, resource

_MODES: Final[dict[TrainerMode, str]] = {"POLICY_TRAINER": "", "LORA_TRAINER": "-lora", "FORWARD_ONLY": "-forward"}
_TERM: Final = re.compile(r'(?P<field>[\w.]+)\s*(?P<op>!=|>=|<=|=)\s*(?P<value>"[^"]*"|[\w.+-]+)')
_REF: Final = re.compile(r"(?P<parent>accounts/[^/]+/\w+/[^/]+)(/versions/(?P<version>[^/]+))?")


@dataclass(frozen=True)
class Shape:
    """One shape: `mode` is None for a deployment shape."""

    model: ModelRow
    template: Template
    mode: TrainerMode | None

    @property
    def id(self) -> str:
        return f"{self.model.id}-{self.template.id}{_MODES[self.mode] if self.mode else ''}"

    @property
    def name(self) -> str:
        return resource(self.model.account, "trainingShapes" if self.mode else "deploymentShapes", self.id)

    @property
    def version_name(self) -> str:
        return f"{self.name}/versions/1"

    @property
    def context_length(self) -> int:
        return min(int(self.model.facts["context_length"]), self.template.max_context_length)


async def training(control: Control, account: str) -> list[Shape]:
    """Every training shape; an adapter is not a model to train from, so it has none."""
    rows = [row for row in await models.listing(control, account) if row.facts["kind"] == "HF_BASE_MODEL"]
    return [Shape(row, template, mode) for row in rows for template in control.templates for mode in _MODES]


async def deployment(control: Control, account: str) -> list[Shape]:
    rows = await models.listing(control, account)
    return [Shape(row, template, None) for row in rows for template in control.templates]


def find(shapes: Sequence[Shape], account: str, ref: str, *, field: str) -> Shape:
    """The shape that `ref`, a shape or version name, stands for; raises NotFound naming the known ids."""
    match = _REF.fullmatch(ref)
    if match is None:
        raise InvalidArgument(f"{field}: {ref!r} is not a shape; expected accounts/<account>/<collection>/<id>")
    parent = match["parent"].replace(f"accounts/{SHARED_ACCOUNT}/", f"accounts/{account}/", 1)
    found = next((shape for shape in shapes if shape.name == parent), None)
    if found is None or match["version"] not in (None, "1", "latest"):
        known = ", ".join(shape.id for shape in shapes) or "none, because no model is registered"
        raise NotFound(f"{field}: {ref!r} does not exist; known shapes: {known}")
    return found


def fitting(control: Control, shapes: Sequence[Shape], wanted: Shape, *, field: str) -> Shape:
    """`wanted` if this host can run it; raises InvalidArgument naming the alternatives otherwise."""
    if control.runs_here(wanted.template):
        return wanted
    fits = [s.id for s in shapes if s.model is wanted.model and s.mode == wanted.mode and control.runs_here(s.template)]
    raise InvalidArgument(
        f"{field}: {wanted.id!r} needs {wanted.template.accelerator_count} {wanted.template.accelerator_type}, which "
        f"this server cannot use; shapes that fit: {', '.join(fits)}",
        reason="NO_ACCELERATOR",
    )


def select_shape(
    control: Control, shapes: Sequence[Shape], base_model: str, mode: TrainerMode | None, accelerator: str | None
) -> Shape:
    """The shape for a caller that named none: the first of the model and mode that runs here."""
    fits = [s for s in shapes if s.model.name == base_model and s.mode == mode and control.runs_here(s.template)]
    if not fits:
        raise FailedPrecondition(f"baseModel: {base_model!r} has no shape for {mode or 'serving'} on this server")
    chosen = [s for s in fits if accelerator is None or s.template.accelerator_type == accelerator]
    if not chosen:
        raise InvalidArgument(
            f"acceleratorType: this server cannot use {accelerator!r}; name one of these shapes instead: "
            f"{', '.join(s.id for s in fits)}",
            reason="NO_ACCELERATOR",
        )
    return chosen[0]


def show(shape: Shape) -> ShapeVersion:
    facts, template = shape.model.facts, shape.template
    if shape.mode is None:
        snapshot: TrainingShapeSnapshot | DeploymentShapeSnapshot = DeploymentShapeSnapshot(
            base_model=shape.model.name,
            model_type=facts["model_type"],
            parameter_count=str(facts["parameter_count"]),
            accelerator_type=template.accelerator_type,
            accelerator_count=template.accelerator_count,
        )
    else:
        snapshot = TrainingShapeSnapshot(
            base_model=shape.model.name,
            model_type=facts["model_type"],
            parameter_count=str(facts["parameter_count"]),
            trainer_mode=shape.mode,
            trainer_image_tag=__version__,
            deployment_image_tag=__version__,
            max_supported_context_length=shape.context_length,
            deployment_shape_version=Shape(shape.model, template, None).version_name,
            accelerator_type=template.accelerator_type,
            accelerator_count=template.accelerator_count,
            base_model_weight_precision=template.dtype,
        )
    return ShapeVersion(name=shape.version_name, create_time=shape.model.create_time, snapshot=snapshot)


def search(versions: Sequence[ShapeVersion], account: str, expression: str, order_by: str) -> list[ShapeVersion]:
    """The versions that satisfy every AND-ed term of `expression`, sorted by `order_by` (`create_time desc`)."""
    terms = list(_terms(account, expression))
    found = [v for v in versions if all(_holds(v, *term) for term in terms)]
    field, _, direction = order_by.strip().partition(" ")
    if field in ("create_time", "name"):
        found.sort(key=lambda v: str(getattr(v, field)), reverse=direction.strip() == "desc")
    elif field:
        raise InvalidArgument(f"orderBy: {order_by!r} is not supported; use create_time or name, with or without desc")
    return found


def _terms(account: str, expression: str) -> Iterator[tuple[str, str, str]]:
    for text in re.split(r"\s+AND\s+", expression.strip()) if expression.strip() else ():
        match = _TERM.fullmatch(text.strip())
        if match is None:
            raise InvalidArgument(f"filter: {text!r} is not understood; write field=value terms joined by AND")
        value = match["value"].strip('"').replace(f"accounts/{SHARED_ACCOUNT}/", f"accounts/{account}/", 1)
        yield match["field"], match["op"], value


def _holds(version: ShapeVersion, field: str, op: str, value: str) -> bool:
    holder: object = version.snapshot if field.startswith("snapshot.") else version
    actual = getattr(holder, field.removeprefix("snapshot."), None)
    if actual is None:
        raise InvalidArgument(f"filter: {field!r} is not a field of a shape version")
    text = str(actual).lower() if isinstance(actual, bool) else str(actual)
    if op in ("=", "!="):
        return (text == value) is (op == "=")
    try:
        return float(text) >= float(value) if op == ">=" else float(text) <= float(value)
    except ValueError:
        raise InvalidArgument(f"filter: {field} {op} {value}: both sides must be numbers") from None
