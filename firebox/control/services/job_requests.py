"""What a create call asks of a trainer job: checked, made canonical, and given a shape.

With a shape named, the shape owns hardware, runtime and context length; without one, those fields select it. Knows
neither rows nor states.
"""

from __future__ import annotations

import re
from typing import Any, Final

from firebox import __version__
from firebox.control.services import models, training_shapes
from firebox.control.services.context import Control, own
from firebox.control.services.training_shapes import Shape
from firebox.wire.control import CreateTrainerJob, TrainerMode
from firebox.wire.errors import InvalidArgument

MAX_INACTIVITY_S: Final = 3 * 3600.0
DEFAULT_INACTIVITY_S: Final = 3600.0

_DURATION: Final = re.compile(r"\d{1,9}(\.\d{1,9})?s")
_THREADS: Final = re.compile(r"--threads[= ]([1-9]\d{0,3})")


async def resolve(control: Control, account: str, request: CreateTrainerJob, ref: str) -> Shape:
    """The shape of the job, for which `request` is completed; `ref` is a shape or version name, or empty.

    Raises InvalidArgument naming a field that this server cannot honour or the shape owns, and NotFound for an unknown
    model or shape.
    """
    config = request.training_config
    if not config.base_model:
        raise InvalidArgument(
            "trainingConfig.baseModel: a model name is needed, for example accounts/local/models/tiny"
        )
    _refuse_unsupported(request)
    inactivity_s(request)
    num_threads(config.extra_args)
    ident = own(account, config.base_model, "models", field="trainingConfig.baseModel")
    config.base_model = (await models.get(control, account, ident)).name
    shapes = await training_shapes.training(control, account)
    if ref:
        shape = training_shapes.find(shapes, account, ref, field="trainingShape")
        _check_mode(request, shape)
        shape = training_shapes.fitting(control, shapes, shape, field="trainingShape")
        _check_owned(request, shape)
    else:
        shape = training_shapes.select_shape(
            control,
            shapes,
            config.base_model,
            _mode(request),
            config.accelerator_type,
            accelerator_count=config.accelerator_count,
            context_length=config.max_context_length or 1,
        )
    config.max_context_length = config.max_context_length or shape.context_length
    request.forward_only = request.forward_only or shape.mode == "FORWARD_ONLY"
    return shape


def inactivity_s(request: CreateTrainerJob) -> float | None:
    """Seconds without a call after which the job is stopped; None when it never is."""
    if request.disable_inactivity_cleanup:
        return None
    text = request.inactivity_timeout or "0s"
    if not _DURATION.fullmatch(text) or float(text[:-1]) > MAX_INACTIVITY_S:
        raise InvalidArgument(
            f"inactivityTimeout: {text!r} is not a number of seconds up to {MAX_INACTIVITY_S:.0f}, such as '1800s'"
        )
    return float(text[:-1]) or DEFAULT_INACTIVITY_S


def num_threads(extra_args: list[str] | None) -> int | None:
    """The threads that the trainer is given by `--threads N`, the one extra argument there is; None without it."""
    if not extra_args:
        return None
    match = _THREADS.fullmatch(" ".join(extra_args))
    if match is None:
        raise InvalidArgument(f"trainingConfig.extraArgs: {extra_args} is not understood; known: --threads <number>")
    return int(match[1])


def differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    """One line per field in which two requests differ."""
    found = []
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            found.append(f"{prefix}{key} is {old!r} there and {new!r} here")
    return found


def _mode(request: CreateTrainerJob) -> TrainerMode:
    if request.training_config.lora_rank:
        return "LORA_TRAINER"
    return "FORWARD_ONLY" if request.forward_only else "POLICY_TRAINER"


def _check_mode(request: CreateTrainerJob, shape: Shape) -> None:
    config = request.training_config
    if shape.model.name != config.base_model:
        raise InvalidArgument(f"trainingConfig.baseModel: {shape.id!r} is a shape of {shape.model.name!r}")
    # A reference without an adapter may run on any shape: it computes, and trains nothing.
    if (config.lora_rank > 0) != (shape.mode == "LORA_TRAINER") and not (request.forward_only and not config.lora_rank):
        right = Shape(shape.model, shape.template, _mode(request)).id
        raise InvalidArgument(
            f"trainingConfig.loraRank: {config.lora_rank} does not go with {shape.id!r} ({shape.mode}); use {right!r}"
        )


def _check_owned(request: CreateTrainerJob, shape: Shape) -> None:
    config, template = request.training_config, shape.template
    for field, value, owned in (
        ("trainingConfig.acceleratorType", config.accelerator_type, template.accelerator_type),
        ("trainingConfig.acceleratorCount", config.accelerator_count, template.accelerator_count),
        ("trainingConfig.maxContextLength", config.max_context_length, shape.context_length),
        ("nodeCount", request.node_count, template.node_count),
    ):
        if value is not None and value != owned:
            raise InvalidArgument(f"{field}: the shape {shape.id!r} owns it and has {owned}, not {value}; leave it out")


def _refuse_unsupported(request: CreateTrainerJob) -> None:
    config = request.training_config
    for field, value in (
        ("trainingConfig.projectionHeadDim", config.projection_head_dim),
        ("extraValues", request.extra_values),
    ):
        if value:
            raise InvalidArgument(f"{field}: {value!r} is not supported by this server; leave it out")
    if config.custom_image_tag not in (None, __version__):
        raise InvalidArgument(
            f"trainingConfig.customImageTag: {config.custom_image_tag!r} is not the version of this server, "
            f"{__version__!r}; leave it out"
        )
    for field, count in (("nodeCount", request.node_count), ("trainerReplicaCount", request.trainer_replica_count)):
        if count not in (None, 1):
            raise InvalidArgument(f"{field}: {count} is not supported; a job has one trainer on one node, leave it out")
