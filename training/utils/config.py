"""Settings that recipes share, as plain dataclasses with assignable fields. Imports neither torch nor an SDK.

Owns types, ranges and contradictions between fields; what a shape resolves to lives in `provision`. Invariant: a field
is checked when the object is built and once more by `validate`, because it may have been assigned in between.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, get_type_hints

from annotated_types import Ge, Gt, Lt
from pydantic import TypeAdapter, ValidationError

from training.utils.errors import ConfigError

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Gt(0)]
NonNegative = Annotated[float, Ge(0)]
PositiveFloat = Annotated[float, Gt(0)]
WholeSeconds = Annotated[int, Gt(0)]
Normalization = Literal["num_loss_tokens", "num_sequences", "none"]


def _adapters(cls: type) -> dict[str, TypeAdapter[Any]]:
    hints = get_type_hints(cls, include_extras=True)
    return {f.name: TypeAdapter(hints[f.name]) for f in fields(cls) if not is_dataclass(hints[f.name])}


class Checked:
    """Base of every configuration: refuses a field of the wrong type or range as soon as the object exists."""

    def __post_init__(self) -> None:
        self.check_fields()

    def check_fields(self) -> None:
        """Raise ConfigError for the first field whose value does not fit its annotation."""
        for name, adapter in _adapters(type(self)).items():
            value = getattr(self, name)
            try:
                adapter.validate_python(value, strict=True)
            except ValidationError as exc:
                fix = "; ".join(error["msg"][0].lower() + error["msg"][1:] for error in exc.errors())
                raise ConfigError(f"{type(self).__name__}.{name}", value, fix) from None

    def check_together(self) -> None:
        """Raise ConfigError for what is missing or contradictory. Called by `validate` only."""

    def refuse(self, field: str, fix: str) -> ConfigError:
        """The error for one field of this object, ready to raise."""
        return ConfigError(f"{type(self).__name__}.{field}", getattr(self, field), fix)


def validate(config: Checked) -> None:
    """Check a whole configuration, nested parts first, before anything is created."""
    for field in fields(config):  # type: ignore[arg-type]
        value, nested = getattr(config, field.name), _nested_type(type(config), field.name)
        if nested is not None and not isinstance(value, nested):
            raise config.refuse(field.name, f"must be a {nested.__name__}")
        if isinstance(value, Checked):
            validate(value)
    config.check_fields()
    config.check_together()


def _nested_type(cls: type, name: str) -> type | None:
    hint = get_type_hints(cls)[name]
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


@dataclass
class InfraConfig(Checked):
    """Where the trainers run.

    `training_shape_id` (accounts/<account>/trainingShapes/<shape>) is the one setting a run needs: the shape brings the
    hardware. `ref_training_shape_id` asks an RL run for a frozen reference trainer too; without it none is started.
    `trainer_timeout_s` bounds the wait for a trainer to answer, in seconds.
    """

    training_shape_id: str | None = None
    ref_training_shape_id: str | None = None
    region: str | None = None
    trainer_timeout_s: PositiveFloat = 3600
    extra_args: list[str] | None = None
    # The shape fills these. They exist so that a resolved setup can be described with the same class.
    accelerator_type: str | None = None
    accelerator_count: Positive | None = None
    node_count: Positive | None = None
    custom_image_tag: str | None = None

    def check_together(self) -> None:
        if not self.training_shape_id:
            raise self.refuse(
                "training_shape_id", "set the shape of the trainer: accounts/<account>/trainingShapes/<id>"
            )
        for name in ("training_shape_id", "ref_training_shape_id"):
            parts = (getattr(self, name) or "").split("/")
            named = len(parts) in (4, 6) and parts[0] == "accounts" and parts[2] == "trainingShapes" and all(parts)
            if parts != [""] and not named:
                raise self.refuse(name, "give the full name, accounts/<account>/trainingShapes/<shape>[/versions/<v>]")
        for name in ("accelerator_type", "accelerator_count", "node_count", "custom_image_tag"):
            if getattr(self, name) is not None:
                raise self.refuse(name, "leave it unset: training_shape_id decides it")


# The same settings under the name that newer scripts import.
TrainerConfig = InfraConfig


@dataclass
class DeployConfig(Checked):
    """The deployment that rollouts are sampled from.

    An unset `deployment_id` is derived from the base model's name; an existing one is attached to and left alone
    afterwards. `tokenizer_model` is a Hugging Face name or a local directory. `deployment_shape` unset means the one
    that belongs to the training shape. `sample_timeout` (s) is for one completion, `deployment_timeout_s` for start-up.
    `replica_count` pins the least and the most replicas to one number.
    """

    deployment_id: str | None = None
    tokenizer_model: str | None = None
    deployment_shape: str | None = None
    deployment_region: str | None = None
    hot_load_bucket_type: str = "FW_HOSTED"
    deployment_timeout_s: PositiveFloat = 5400
    deployment_extra_args: list[str] | None = None
    sample_timeout: WholeSeconds = 600
    disable_speculative_decoding: bool = True
    extra_values: dict[str, str] | None = None
    replica_count: Positive | None = None
    # Filled by the deployment shape.
    deployment_accelerator_type: str | None = None

    def check_together(self) -> None:
        if self.deployment_shape and self.deployment_accelerator_type is not None:
            raise self.refuse("deployment_accelerator_type", "leave it unset: deployment_shape decides it")


@dataclass
class WeightSyncConfig(Checked):
    """How often weights leave the trainer, counted in optimizer steps; 0 switches that kind off.

    `dcp_save_interval` writes checkpoints that a run can resume from, and is off unless set. `weight_sync_interval`
    saves and hot-loads weights for sampling. Timeouts are in seconds.
    """

    dcp_save_interval: Count = 0
    weight_sync_interval: Count = 1
    dcp_timeout: WholeSeconds = 2700
    first_checkpoint_type: str = "base"
    weight_sync_before_training: bool = False
    weight_sync_timeout: WholeSeconds = 600

    def check_together(self) -> None:
        if self.first_checkpoint_type not in ("base", "delta"):
            raise self.refuse("first_checkpoint_type", "use 'base' or 'delta'")


@dataclass
class WandBConfig(Checked):
    """Weights & Biases. Tracking is on as soon as one field is set; an unset `run_name` is made up by the service."""

    entity: str | None = None
    project: str | None = None
    run_name: str | None = None


@dataclass
class OptimConfig(Checked):
    """AdamW and its schedule. `learning_rate` is the peak, reached after `warmup_steps` that rise linearly from zero.

    `grad_clip_norm` bounds the global gradient norm, 0 means no bound.
    """

    learning_rate: PositiveFloat = 1e-4
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: Count = 0
    weight_decay: NonNegative = 0.01
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999
    eps: Annotated[float, Gt(0)] = 1e-8
    grad_clip_norm: NonNegative = 1.0


def check_output_model_id(model_id: str | None) -> None:
    """Refuse an id for the promoted model that the platform would refuse after hours of training."""
    from fireworks.training.sdk import validate_output_model_id

    if model_id is not None and (errors := validate_output_model_id(model_id)):
        raise ConfigError("Config.output_model_id", model_id, errors[0])
