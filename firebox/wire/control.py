"""The REST resources and request bodies of the control plane, in the camelCase JSON of the wire.

Owns field names and types; knows nothing of how a resource lives. Unknown request fields are ignored, because SDK
generations differ in the hints they send; fields that would change a result and are not supported are refused by
the services.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

TrainerMode = Literal["POLICY_TRAINER", "LORA_TRAINER", "FORWARD_ONLY"]
Transition = Literal["ASYNC", "SYNC"]


class Camel(BaseModel):
    """camelCase outside, snake_case inside; both are read."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, protected_namespaces=())

    def wire(self) -> dict[str, Any]:
        """The JSON object of this resource, without the fields that are not set."""
        return self.model_dump(by_alias=True, exclude_none=True)


class Account(Camel):
    name: str
    state: str = "READY"


class CreateApiKey(Camel):
    """`account` comes from the path. The limits are per key; none means none."""

    account: str = ""
    display_name: str = Field(min_length=1, max_length=63)
    operator: bool = False
    requests_per_minute: int | None = Field(default=None, ge=1, le=1_000_000)
    max_concurrent: int | None = Field(default=None, ge=1, le=1_000_000)


class ApiKey(Camel):
    """`secret` is the key itself, in the answer to its creation only."""

    name: str
    state: str
    display_name: str
    operator: bool
    create_time: str
    last_used_time: str | None = None
    requests_per_minute: int | None = None
    max_concurrent: int | None = None
    secret: str | None = None


class BaseModelDetails(Camel):
    model_type: str
    parameter_count: str
    moe: bool
    supports_fireattention: bool = False


class PeftDetails(Camel):
    base_model: str
    r: int
    target_modules: list[str]


class Model(Camel):
    name: str
    state: str = "READY"
    kind: Literal["HF_BASE_MODEL", "HF_PEFT_ADDON"]
    context_length: int
    create_time: str
    base_model_details: BaseModelDetails
    peft_details: PeftDetails | None = None
    aliases: list[str] | None = None
    promoted_from: str | None = None
    max_abs_diff: float | None = None


class UpdateModel(Camel):
    aliases: list[str] = Field(max_length=16)


class CreateModel(Camel):
    model_id: str
    staged_dir: str


class ShardingScheme(Camel):
    pipeline_parallelism: int = 1


class TrainingShapeSnapshot(Camel):
    base_model: str
    model_type: str
    parameter_count: str
    trainer_mode: TrainerMode
    trainer_image_tag: str
    max_supported_context_length: int
    node_count: int = 1
    deployment_shape_version: str
    deployment_image_tag: str
    accelerator_type: str
    accelerator_count: int
    base_model_weight_precision: str
    trainer_sharding_scheme: ShardingScheme = Field(default_factory=ShardingScheme)


class DeploymentShapeSnapshot(Camel):
    base_model: str
    model_type: str
    parameter_count: str
    accelerator_type: str
    accelerator_count: int
    engine: str = "FIREBOX"


class ShapeVersion(Camel):
    """`misfit` says why this server cannot run the shape, and is absent where it can."""

    name: str
    create_time: str
    latest_validated: bool = True
    public: bool = True
    validated: bool = True
    misfit: str | None = None
    snapshot: TrainingShapeSnapshot | DeploymentShapeSnapshot


class TrainingConfig(Camel):
    base_model: str = ""
    lora_rank: int = Field(default=0, ge=0, le=1024)
    learning_rate: float | None = None
    max_context_length: int | None = Field(default=None, ge=1)
    projection_head_dim: int | None = None
    accelerator_type: str | None = None
    accelerator_count: int | None = Field(default=None, ge=0)
    custom_image_tag: str | None = None
    region: str | None = None
    extra_args: list[str] | None = None


class CreateTrainerJob(Camel):
    """`inactivity_timeout` is a number of seconds, as in `1800s`. A region is kept and shown: there is one place."""

    training_config: TrainingConfig
    display_name: str | None = Field(default=None, max_length=63)
    forward_only: bool = False
    node_count: int | None = None
    trainer_replica_count: int | None = None
    hot_load_deployment_id: str | None = None
    extra_values: dict[str, str] | None = None
    inactivity_timeout: str | None = None
    disable_inactivity_cleanup: bool = False


class Status(Camel):
    code: int
    message: str
    details: list[dict[str, Any]] = Field(default_factory=list)


class TrainerJob(Camel):
    name: str
    state: str
    create_time: str
    update_time: str
    training_config: TrainingConfig
    training_shape: str
    forward_only: bool
    display_name: str | None = None
    hot_load_deployment_id: str | None = None
    inactivity_timeout: str | None = None
    status: Status | None = None
    status_message: str | None = None


class Checkpoint(Camel):
    name: str
    create_time: str
    update_time: str
    checkpoint_type: str
    promotable: bool


class Promote(BaseModel):
    """The promotion body; the public clients write this one in snake_case."""

    output_model: str
    trainer_job_id: str
    base_model: str


class PromoteOfSession(BaseModel):
    """The promotion body of a training session's checkpoint: the session tells the trainer."""

    output_model: str
    base_model: str


class Operation(Camel):
    name: str
    done: bool
    response: dict[str, Any] | None = None
    error: Status | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)


class CreateDeployment(Camel):
    base_model: str
    description: str = ""
    min_replica_count: int = Field(default=0, ge=0)
    max_replica_count: int = Field(default=1, ge=0)
    deployment_shape: str | None = None
    accelerator_type: str | None = None
    enable_hot_load: bool = False
    for_training: bool = False
    hot_load_bucket_type: str | None = None
    hot_load_trainer_job: str | None = None
    hot_load_transition_type: Transition | None = None
    extra_args: list[str] | None = None
    extra_values: dict[str, str] | None = None
    annotations: dict[str, str] | None = None


class UpdateDeployment(Camel):
    description: str | None = None
    min_replica_count: int | None = Field(default=None, ge=0)
    max_replica_count: int | None = Field(default=None, ge=0)
    hot_load_trainer_job: str | None = None
    hot_load_transition_type: Transition | None = None


class Deployment(Camel):
    name: str
    state: str
    create_time: str
    update_time: str
    base_model: str
    description: str
    min_replica_count: int
    max_replica_count: int
    deployment_shape: str
    enable_hot_load: bool
    for_training: bool
    hot_load_transition_type: Transition
    hot_load_trainer_job: str | None = None
    hot_load_bucket_url: str | None = None
    annotations: dict[str, str] | None = None
    status: Status | None = None
    status_message: str | None = None


class IncrementalMetadata(BaseModel):
    previous_snapshot_identity: str


class HotLoad(BaseModel):
    """The hot-load body, snake_case on the wire. Prefix caches are keyed by snapshot, so resetting them is implied."""

    identity: str
    reset_prompt_cache: bool = True
    incremental_snapshot_metadata: IncrementalMetadata | None = None
