"""Training and deployment shapes: every hardware template applied to every registered model and mode.

Nothing is stored: shapes follow from the models and the catalogue. A shape owns hardware, runtime and context length.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from firebox import __version__
from firebox.control.catalogue import Template, latest
from firebox.control.services import models
from firebox.control.services.capacity import Need
from firebox.control.services.context import Control
from firebox.control.tables.models import ModelRow
from firebox.launch.machine import HOST
from firebox.wire.control import DeploymentShapeSnapshot, ShapeVersion, TrainerMode, TrainingShapeSnapshot
from firebox.wire.errors import FailedPrecondition, InvalidArgument, NotFound
from firebox.wire.names import SHARED_ACCOUNT, resource

_MODES: Final[dict[TrainerMode, str]] = {"POLICY_TRAINER": "", "LORA_TRAINER": "-lora", "FORWARD_ONLY": "-forward"}
_REF: Final = re.compile(r"(?P<parent>accounts/[^/]+/\w+/[^/]+)(/versions/(?P<version>[^/]+))?")
_NAMED_AT_MOST: Final = 12

_PROCESS_BYTES: Final = 512 * 2**20
"""What a worker takes before it has a model: Python, torch, transformers."""
_BYTES_PER_PARAMETER: Final[dict[TrainerMode | None, int]] = {
    "POLICY_TRAINER": 16,  # weights, gradients and two moments, in float32
    "LORA_TRAINER": 4,
    "FORWARD_ONLY": 4,
    None: 8,  # a sampler: what it serves, and what is being loaded
}


@dataclass(frozen=True)
class Shape:
    """One version of one shape: `mode` is None for a deployment shape."""

    model: ModelRow
    template: Template
    mode: TrainerMode | None

    @property
    def id(self) -> str:
        return self._id(self.model.id)

    @property
    def name(self) -> str:
        return self._name(self.id)

    @property
    def public_names(self) -> list[str]:
        """What the shape is called where its model goes by one of its aliases."""
        return [self._name(self._id(ident)) for ident in models.alias_ids(self.model)]

    @property
    def version_name(self) -> str:
        return f"{self.name}/versions/{self.template.version}"

    @property
    def context_length(self) -> int:
        return min(int(self.model.facts["context_length"]), self.template.max_context_length)

    def _id(self, model: str) -> str:
        return f"{model}-{self.template.id}{_MODES[self.mode] if self.mode else ''}"

    def _name(self, ident: str) -> str:
        return resource(self.model.account, "trainingShapes" if self.mode else "deploymentShapes", ident)


async def training(control: Control, account: str) -> list[Shape]:
    """Every training shape; an adapter is not a model to train from, so it has none."""
    rows = [row for row in await models.listing(control, account) if row.facts["kind"] == "HF_BASE_MODEL"]
    return [Shape(row, template, mode) for row in rows for template in control.templates for mode in _MODES]


async def deployment(control: Control, account: str) -> list[Shape]:
    rows = await models.listing(control, account)
    return [Shape(row, template, None) for row in rows for template in control.templates]


def find(shapes: Sequence[Shape], account: str, ref: str, *, field: str) -> Shape:
    """The shape that `ref`, a shape or version name, stands for; raises NotFound naming what there is.

    Without a version it is the newest validated one.
    """
    match = _REF.fullmatch(ref)
    if match is None:
        raise InvalidArgument(f"{field}: {ref!r} is not a shape; expected accounts/<account>/<collection>/<id>")
    versions = called(shapes, account, match["parent"])
    wanted = match["version"]
    if wanted in (None, "latest"):
        chosen = [shape for shape in versions if shape.template.validated]
    else:
        chosen = [shape for shape in versions if str(shape.template.version) == wanted]
    if not chosen:
        known = ", ".join(shape.version_name for shape in versions) or _ids(shapes)
        raise NotFound(f"{field}: {ref!r} does not exist; known shapes: {known}")
    return chosen[-1]


def called(shapes: Sequence[Shape], account: str, name: str) -> list[Shape]:
    """Every version of the shape `name`, oldest first; none when there is no such shape.

    A shape goes by its own id and, where that is nobody's, by the ids that the aliases of its model make.
    """
    name = name.replace(f"accounts/{SHARED_ACCOUNT}/", f"accounts/{account}/", 1)
    own = [shape for shape in shapes if shape.name == name]
    return own or [shape for shape in shapes if name in shape.public_names]


async def canonical_names(control: Control, account: str) -> Callable[[str], str]:
    """How names in a filter are read: public names of models and shapes as those of the account's own."""
    shared, own = f"accounts/{SHARED_ACCOUNT}/", f"accounts/{account}/"
    rows = await models.listing(control, account)
    aliases = {f"{own}models/{ident}": row.name for row in rows for ident in models.alias_ids(row)}
    aliases |= {row.name: row.name for row in rows}

    def canonical(name: str) -> str:
        name = name.replace(shared, own, 1)
        return aliases.get(name, name)

    return canonical


def need(control: Control, shape: Shape) -> Need:
    """What one worker on this shape takes. Its memory is an estimate: weights and optimizer, not activations."""
    template, mode = shape.template, shape.mode
    weights = int(shape.model.facts["parameter_count"]) * _BYTES_PER_PARAMETER[mode]
    if template.accelerator_count == 0:
        return Need(HOST, 1, _PROCESS_BYTES + weights, shared=True)
    kind = template.accelerator_type
    count = control.capacity.count(kind) if template.accelerator_count == "all" else template.accelerator_count
    return Need(kind, count, _PROCESS_BYTES + weights // max(1, count), shared=template.shared)


def misfit(control: Control, shape: Shape) -> str:
    """Why this server cannot run the shape, however long one waits; empty when it can."""
    if shape.template.node_count > 1:
        return f"needs {shape.template.node_count} nodes, and this server is one"
    return control.capacity.misfit(need(control, shape))


def fitting(control: Control, shapes: Sequence[Shape], wanted: Shape, *, field: str) -> Shape:
    """`wanted` if this server can run it; raises InvalidArgument naming the alternatives otherwise."""
    why = misfit(control, wanted)
    if not why:
        return wanted
    alike = [s for s in shapes if s.model is wanted.model and s.mode == wanted.mode and not misfit(control, s)]
    raise InvalidArgument(f"{field}: {wanted.id!r} {why}; shapes that fit: {_ids(alike)}", reason="DOES_NOT_FIT")


def select_shape(
    control: Control,
    shapes: Sequence[Shape],
    base_model: str,
    mode: TrainerMode | None,
    accelerator: str | None,
    *,
    accelerator_count: int | None = None,
    context_length: int = 1,
) -> Shape:
    """The shape for a caller that named none: the smallest with an accelerator that fits, or the plainest without.

    Raises FailedPrecondition when the model has none for `mode`, and InvalidArgument when none has what is asked for.
    """
    known = [shape for shape in _latest(shapes) if shape.model.name == base_model and shape.mode == mode]
    fits = [shape for shape in known if not misfit(control, shape)]
    if not fits:
        why = [f"{shape.id!r} {misfit(control, shape)}" for shape in known if shape.template.accelerator_count == 0]
        raise FailedPrecondition(
            f"baseModel: {base_model!r} has no shape for {mode or 'serving'} on this server. {'; '.join(why)}".rstrip()
        )
    for field, value, having in (
        ("acceleratorType", accelerator, [s for s in fits if str(accelerator).startswith(s.template.accelerator_type)]),
        ("acceleratorCount", accelerator_count, [s for s in fits if s.template.accelerator_count == accelerator_count]),
        ("maxContextLength", context_length, [s for s in fits if s.context_length >= context_length]),
    ):
        chosen = [shape for shape in fits if value is None or shape in having]
        if not chosen:
            raise InvalidArgument(
                f"{field}: {value!r} is not to be had on this server; name one of these shapes instead: {_ids(fits)}",
                reason="DOES_NOT_FIT",
            )
        fits = chosen
    return min(fits, key=lambda s: (s.template.accelerator_count == 0, need(control, s).count))


def show(control: Control, shape: Shape) -> ShapeVersion:
    facts, template = shape.model.facts, shape.template
    snapshot: TrainingShapeSnapshot | DeploymentShapeSnapshot = DeploymentShapeSnapshot(
        base_model=shape.model.name,
        model_type=facts["model_type"],
        parameter_count=str(facts["parameter_count"]),
        accelerator_type=template.accelerator_type,
        accelerator_count=0 if template.accelerator_count == 0 else need(control, shape).count,
    )
    if shape.mode is not None:
        snapshot = TrainingShapeSnapshot(
            **snapshot.model_dump(exclude={"engine"}),
            trainer_mode=shape.mode,
            trainer_image_tag=__version__,
            deployment_image_tag=__version__,
            max_supported_context_length=shape.context_length,
            node_count=template.node_count,
            deployment_shape_version=Shape(shape.model, template, None).version_name,
            base_model_weight_precision=template.dtype,
        )
    return ShapeVersion(
        name=shape.version_name,
        create_time=shape.model.create_time,
        validated=template.validated,
        latest_validated=template in latest(control.templates),
        misfit=misfit(control, shape) or None,
        snapshot=snapshot,
    )


def _latest(shapes: Sequence[Shape]) -> list[Shape]:
    current = latest([shape.template for shape in shapes])
    return [shape for shape in shapes if shape.template in current]


def _ids(shapes: Sequence[Shape]) -> str:
    """The ids of some shapes, for a message."""
    ids = list(dict.fromkeys(shape.id for shape in shapes))
    more = f" and {len(ids) - _NAMED_AT_MOST} more" if len(ids) > _NAMED_AT_MOST else ""
    return ", ".join(ids[:_NAMED_AT_MOST]) + more or "none"
