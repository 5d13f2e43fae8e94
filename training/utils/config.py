"""Settings that recipes share, as plain dataclasses with assignable fields. Imports neither torch nor an SDK.

Owns types, ranges and contradictions between fields; what a shape resolves to lives in `provision`. Invariant: a field
is checked when the object is built and once more by `validate`, because it may have been assigned in between.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal, Protocol, get_type_hints

import tyro
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
    return {f.name: TypeAdapter(hints[f.name]) for f in fields(cls) if _nested_type(cls, f.name) is None}


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
    """Where the trainers run. The shape is the one setting a run needs: it brings the hardware."""

    training_shape_id: str | None = None  # shape of the trainer, accounts/<account>/trainingShapes/<shape>; required
    ref_training_shape_id: str | None = None  # shape of a frozen reference trainer; unset: none is started
    region: str | None = None  # place the trainers there
    trainer_timeout_s: PositiveFloat = 3600  # wait at most so many seconds for a trainer to answer
    extra_args: list[str] | None = None  # arguments for the trainer's command line
    accelerator_type: str | None = None  # decided by the shape, not to be set
    accelerator_count: Positive | None = None  # decided by the shape, not to be set
    node_count: Positive | None = None  # decided by the shape, not to be set
    custom_image_tag: str | None = None  # decided by the shape, not to be set

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
    """The deployment that rollouts are sampled from. An existing one is attached to and left alone afterwards."""

    deployment_id: str | None = None  # unset: derived from the base model's name
    tokenizer_model: str | None = None  # Hugging Face name or local directory; RL needs it, it tokenizes prompts here
    deployment_shape: str | None = None  # unset: the one that belongs to the training shape
    deployment_region: str | None = None  # place the deployment there
    hot_load_bucket_type: str = "FW_HOSTED"  # where weights are stored on their way to the deployment
    deployment_timeout_s: PositiveFloat = 5400  # wait at most so many seconds until it can sample
    deployment_extra_args: list[str] | None = None  # arguments for the server's command line
    sample_timeout: WholeSeconds = 600  # wait at most so many seconds for one completion
    disable_speculative_decoding: bool = True  # a draft model would lag behind hot-loaded weights
    extra_values: dict[str, str] | None = None  # further values for the deployment
    replica_count: Positive | None = None  # both the least and the most replicas
    deployment_accelerator_type: str | None = None  # decided by the deployment shape, not to be set

    def check_together(self) -> None:
        if self.deployment_accelerator_type is not None:
            raise self.refuse("deployment_accelerator_type", "leave it unset: the deployment shape decides it")


@dataclass
class WeightSyncConfig(Checked):
    """How often weights leave the trainer, counted in optimizer steps; 0 switches that kind off."""

    dcp_save_interval: Count = 0  # steps between checkpoints that a run can be resumed from; 0: it cannot be resumed
    weight_sync_interval: Count = 1  # steps between hot-loads into the deployment
    dcp_timeout: WholeSeconds = 2700  # wait at most so many seconds for a checkpoint to be saved or loaded
    first_checkpoint_type: str = "base"  # first weights for the deployment: base is all of them, delta the changes
    weight_sync_before_training: bool = False  # hot-load the trainer's weights before the first step
    weight_sync_timeout: WholeSeconds = 600  # wait at most so many seconds for a hot-load

    def check_together(self) -> None:
        if self.first_checkpoint_type not in ("base", "delta"):
            raise self.refuse("first_checkpoint_type", "use 'base' or 'delta'")


@dataclass
class WandBConfig(Checked):
    """Weights & Biases: on as soon as one field is set. WANDB_MODE=offline keeps everything on this machine."""

    entity: str | None = None  # team or user
    project: str | None = None  # project within it
    run_name: str | None = None  # unset: made up by the service


@dataclass
class RunConfig(Checked):
    """Where a run begins, what it keeps and who else is shown its metrics."""

    dry_run: bool = False  # show settings, shapes and an estimate, and create nothing
    resume_from: str | None = None  # a checkpoint of this log_path, step-40 say; unset: the newest
    init_from: str | None = None  # weights of a fresh start: cross_job://<job>/<name>, or the model name of an adapter
    keep_checkpoints: Count = 0  # keep only so many of the newest ones to resume from; 0 keeps all
    trackio: str | None = None  # project of a trackio dashboard
    tensorboard: bool = False  # write event files into log_path/tensorboard


# On a command line these are plain options, --dry-run instead of --run.dry-run.
RunOptions = Annotated[RunConfig, tyro.conf.arg(name="")]


@dataclass
class OptimConfig(Checked):
    """AdamW and its schedule."""

    learning_rate: PositiveFloat = 1e-4  # the peak, which warm-up reaches
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"  # what follows the warm-up
    warmup_steps: Count = 0  # steps that rise linearly from zero
    weight_decay: NonNegative = 0.01  # decoupled, per step times the learning rate
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9  # decay of the first moment
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.999  # decay of the second moment
    eps: Annotated[float, Gt(0)] = 1e-8  # keeps the division finite
    grad_clip_norm: NonNegative = 1.0  # bound of the global gradient norm; 0: none


class RecipeConfig(Protocol):
    """What the configuration of every recipe has, whatever it trains."""

    base_model: str
    dataset: str
    log_path: str
    output_model_id: str | None
    lora_rank: int
    seed: int
    optim: OptimConfig
    infra: InfraConfig
    weight_sync: WeightSyncConfig
    wandb: WandBConfig
    run: RunConfig


def check_output_model_id(model_id: str | None) -> None:
    """Refuse an id for the promoted model that the platform would refuse after hours of training."""
    from fireworks.training.sdk import validate_output_model_id

    if model_id is not None and (errors := validate_output_model_id(model_id)):
        raise ConfigError("Config.output_model_id", model_id, errors[0])
