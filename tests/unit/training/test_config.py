"""The configuration classes: fields and defaults of the public reference, checks at construction and in `validate`."""

import dataclasses
import subprocess
import sys
import typing

import pytest

from training.recipes import dpo_loop, orpo_loop, rl_loop, sft_loop
from training.utils import (
    ConfigError,
    DeployConfig,
    InfraConfig,
    OptimConfig,
    RunConfig,
    TrainerConfig,
    WandBConfig,
    WeightSyncConfig,
    validate,
)

OPTIONAL_STR, OPTIONAL_INT = str | None, int | None
PUBLISHED = {
    InfraConfig: [
        ("training_shape_id", OPTIONAL_STR, None),
        ("ref_training_shape_id", OPTIONAL_STR, None),
        ("region", OPTIONAL_STR, None),
        ("trainer_timeout_s", float, 3600),
        ("extra_args", list[str] | None, None),
        ("accelerator_type", OPTIONAL_STR, None),
        ("accelerator_count", OPTIONAL_INT, None),
        ("node_count", OPTIONAL_INT, None),
        ("custom_image_tag", OPTIONAL_STR, None),
    ],
    DeployConfig: [
        ("deployment_id", OPTIONAL_STR, None),
        ("tokenizer_model", OPTIONAL_STR, None),
        ("deployment_shape", OPTIONAL_STR, None),
        ("deployment_region", OPTIONAL_STR, None),
        ("hot_load_bucket_type", str, "FW_HOSTED"),
        ("deployment_timeout_s", float, 5400),
        ("deployment_extra_args", list[str] | None, None),
        ("sample_timeout", int, 600),
        ("disable_speculative_decoding", bool, True),
        ("extra_values", dict[str, str] | None, None),
        ("replica_count", OPTIONAL_INT, None),
        ("deployment_accelerator_type", OPTIONAL_STR, None),
    ],
    WeightSyncConfig: [
        ("dcp_save_interval", int, 0),
        ("weight_sync_interval", int, 1),
        ("dcp_timeout", int, 2700),
        ("first_checkpoint_type", str, "base"),
        ("weight_sync_before_training", bool, False),
        ("weight_sync_timeout", int, 600),
    ],
    WandBConfig: [
        ("entity", OPTIONAL_STR, None),
        ("project", OPTIONAL_STR, None),
        ("run_name", OPTIONAL_STR, None),
    ],
}
SHAPE = "accounts/local/trainingShapes/tiny-cpu"


@pytest.mark.parametrize("cls", PUBLISHED)
def test_fields_types_and_defaults_are_the_published_ones(cls: type) -> None:
    hints = typing.get_type_hints(cls)
    fields = {field.name: (hints[field.name], field.default) for field in dataclasses.fields(cls)}
    assert fields == {name: (kind, default) for name, kind, default in PUBLISHED[cls]}
    assert TrainerConfig is InfraConfig


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        (lambda: InfraConfig(trainer_timeout_s=0), "InfraConfig.trainer_timeout_s", "0"),
        (lambda: InfraConfig(training_shape_id=7), "InfraConfig.training_shape_id", "7"),  # type: ignore[arg-type]
        (lambda: InfraConfig(extra_args=["a", 1]), "InfraConfig.extra_args", "['a', 1]"),  # type: ignore[list-item]
        (lambda: WeightSyncConfig(dcp_save_interval=-1), "WeightSyncConfig.dcp_save_interval", "-1"),
        (lambda: WeightSyncConfig(dcp_save_interval=True), "WeightSyncConfig.dcp_save_interval", "True"),
        (lambda: WeightSyncConfig(dcp_timeout="60"), "WeightSyncConfig.dcp_timeout", "'60'"),  # type: ignore[arg-type]
        (lambda: DeployConfig(replica_count=0), "DeployConfig.replica_count", "0"),
    ],
)
def test_construction_refuses_and_names_field_and_value(make: typing.Any, field: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value).startswith(f"{field} = {value}: ")


def test_validate_sees_what_was_assigned_later() -> None:
    infra = InfraConfig(training_shape_id=SHAPE)
    validate(infra)
    infra.trainer_timeout_s = -5
    with pytest.raises(ConfigError, match="trainer_timeout_s = -5"):
        validate(infra)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (InfraConfig(), "training_shape_id = None"),
        (InfraConfig(training_shape_id="tiny-cpu"), "full name"),
        (InfraConfig(training_shape_id=SHAPE, ref_training_shape_id="x"), "ref_training_shape_id"),
        (InfraConfig(training_shape_id=SHAPE, node_count=1), "node_count = 1: leave it unset"),
        (InfraConfig(training_shape_id=SHAPE, custom_image_tag="v1"), "custom_image_tag"),
        (DeployConfig(deployment_shape="s", deployment_accelerator_type="H200"), "deployment_accelerator_type"),
        (DeployConfig(deployment_accelerator_type="H200"), "deployment_accelerator_type = 'H200': leave it unset"),
        (WeightSyncConfig(first_checkpoint_type="full"), "first_checkpoint_type = 'full'"),
    ],
)
def test_validate_refuses_what_contradicts(config: typing.Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(config)


def test_recipes_keep_the_published_normalization() -> None:
    for recipe, published in ((sft_loop, None), (rl_loop, "num_loss_tokens"), (dpo_loop, None), (orpo_loop, None)):
        (field,) = [f for f in dataclasses.fields(recipe.Config) if f.name == "grad_accumulation_normalization"]
        assert field.default == published


@pytest.mark.parametrize("recipe", [sft_loop, dpo_loop, orpo_loop, rl_loop])
def test_every_recipe_can_be_scheduled_seeded_evaluated_and_resumed(recipe: typing.Any) -> None:
    hints = typing.get_type_hints(recipe.Config)
    shared = {"optim": OptimConfig, "infra": InfraConfig, "weight_sync": WeightSyncConfig, "wandb": WandBConfig}
    assert {name: hints[name] for name in shared} == shared
    assert hints["run"] is RunConfig
    assert {"seed", "eval_every", "log_path", "output_model_id", "lora_rank"} <= hints.keys()


def test_rl_refuses_a_missing_tokenizer_before_anything_is_created() -> None:
    config = rl_loop.Config("m", "d", "a:b", infra=InfraConfig(training_shape_id=SHAPE))
    with pytest.raises(ConfigError, match=r"deployment\.tokenizer_model = None"):
        rl_loop.main(config)


def test_a_bad_output_model_id_is_refused_up_front() -> None:
    config = sft_loop.Config("m", "t", "d", output_model_id="My Model", infra=InfraConfig(training_shape_id=SHAPE))
    with pytest.raises(ConfigError, match="output_model_id = 'My Model'"):
        sft_loop.main(config)


def test_configs_load_without_torch() -> None:
    code = (
        "import sys\n"
        "from training.utils import InfraConfig, DeployConfig, WeightSyncConfig, WandBConfig, ReconnectableClient\n"
        "assert not {'torch', 'transformers', 'fireworks'} & sys.modules.keys(), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
