"""How settings become requests to the platform, and what is refused before one is sent."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from training.utils import ConfigError, DeployConfig, InfraConfig, PlatformError, WeightSyncConfig, Workspace, provision
from training.utils.provision import context_limit, deployment_config, derive_deployment_id

TRAINER = "accounts/local/rlorTrainerJobs/j"


def profile(**changes: Any) -> Any:
    from fireworks.training.sdk import TrainingShapeProfile

    values = {
        "training_shape_version": "accounts/local/trainingShapes/s/versions/1",
        "trainer_image_tag": "",
        "max_supported_context_length": 128,
        "node_count": 1,
        "deployment_shape_version": "accounts/local/deploymentShapes/d/versions/1",
        "deployment_image_tag": "",
        "accelerator_type": "CPU",
        "accelerator_count": 1,
        "base_model_weight_precision": "FP32",
        "pipeline_parallelism": 1,
    }
    return TrainingShapeProfile(**values | changes)


def test_a_deployment_is_asked_for_as_configured() -> None:
    deploy = DeployConfig(
        deployment_region="r",
        hot_load_bucket_type="MINIO",
        deployment_extra_args=["--a"],
        disable_speculative_decoding=False,
        extra_values={"k": "v"},
        replica_count=3,
    )
    asked = deployment_config("d", "m", profile(), deploy, TRAINER)
    assert (asked.min_replica_count, asked.max_replica_count) == (3, 3)
    assert (asked.region, asked.hot_load_bucket_type, asked.extra_args) == ("r", "MINIO", ["--a"])
    assert (asked.disable_speculative_decoding, asked.extra_values) == (False, {"k": "v"})
    assert asked.deployment_shape == profile().deployment_shape, "the training shape brings its own"
    assert asked.hot_load_trainer_job == TRAINER
    shaped = deployment_config(
        "d", "m", profile(), DeployConfig(deployment_shape="accounts/a/deploymentShapes/x"), None
    )
    assert shaped.deployment_shape == "accounts/a/deploymentShapes/x"
    assert not shaped.enable_hot_load
    assert shaped.disable_speculative_decoding
    with pytest.raises(ConfigError, match=r"DeployConfig\.deployment_shape = None"):
        deployment_config("d", "m", profile(deployment_shape_version=""), DeployConfig(), None)


def test_deployment_ids_are_valid_and_named_after_the_model() -> None:
    first, second = (derive_deployment_id("accounts/local/models/Qwen3.5-8B") for _ in range(2))
    assert first.startswith("qwen3-5-8b-")
    assert first != second
    assert len(derive_deployment_id("accounts/a/models/" + "x" * 80)) <= 63


def test_a_sequence_may_be_as_long_as_the_shape_holds() -> None:
    assert (context_limit(profile(), None), context_limit(profile(), 64)) == (128, 64)
    with pytest.raises(ConfigError, match=r"max_seq_len = 129: .* holds 128 tokens"):
        context_limit(profile(), 129)


def test_a_missing_key_or_server_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    with pytest.raises(PlatformError, match="FIREWORKS_API_KEY is not set"):
        Workspace()
    monkeypatch.setenv("FIREWORKS_API_KEY", "k")
    monkeypatch.setenv("FIREWORKS_BASE_URL", "http://127.0.0.1:1")
    with pytest.raises(PlatformError, match=r"no server answers at http://127\.0\.0\.1:1"):
        Workspace()


@pytest.fixture
def slow_platform(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A platform on which nothing ever gets ready, and what was deleted on it; the first time that fails."""
    from fireworks.training.sdk import DeploymentManager, TrainerJobManager

    deleted: list[str] = []

    def delete(url: str, **_: Any) -> httpx.Response:
        deleted.append(url.rpartition("/v1/accounts/local/")[2].rstrip("0123456789abcdef"))
        status = 503 if len(deleted) == 1 else 200
        return httpx.Response(status, request=httpx.Request("DELETE", url))

    def never(*_: Any, timeout_s: float) -> None:
        raise TimeoutError(f"waited {timeout_s} s")

    monkeypatch.setenv("FIREWORKS_API_KEY", "k")
    monkeypatch.setattr(provision, "_probe", lambda *_: None)
    monkeypatch.setattr(TrainerJobManager, "create", lambda *_: SimpleNamespace(job_id="j", job_name=TRAINER))
    monkeypatch.setattr(DeploymentManager, "get", lambda *_: None)
    monkeypatch.setattr(DeploymentManager, "create_or_get", lambda *_: SimpleNamespace(state="CREATING"))
    for manager in (TrainerJobManager, DeploymentManager):
        monkeypatch.setattr(manager, "wait_for_ready", never)
        monkeypatch.setattr(manager, "account_id", "local")
    monkeypatch.setattr(httpx, "delete", delete)
    return deleted


def test_waits_are_as_long_as_configured_and_nothing_stays_behind(
    slow_platform: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Workspace(tmp_path) as workspace:
        with pytest.raises(PlatformError, match=r"trainer for m: waited 7\.5 s"):
            workspace.trainer("m", profile(), InfraConfig(trainer_timeout_s=7.5))
        with pytest.raises(PlatformError, match=r"deployment d-x: waited 8\.5 s"):
            workspace.deployment("m", profile(), DeployConfig(deployment_id="d-x", deployment_timeout_s=8.5), None)
        assert slow_platform == []
    assert slow_platform == ["deployments/d-x", "rlorTrainerJobs/trainer-"]
    assert "deployment d-x could not be removed" in caplog.text
    with Workspace(tmp_path) as workspace, pytest.raises(PlatformError):
        workspace.trainer("m", profile(), InfraConfig())
    assert slow_platform[2:] == ["deployments/d-x", "rlorTrainerJobs/trainer-"]
    assert (tmp_path / "created.jsonl").read_text() == ""


def test_weights_are_carried_as_configured(slow_platform: list[str]) -> None:
    sync = WeightSyncConfig(first_checkpoint_type="delta", weight_sync_timeout=9)
    with Workspace() as workspace:
        syncer = workspace.syncer(None, "d", "m", 0, sync)  # type: ignore[arg-type]
    assert (syncer.hotload_timeout, syncer.first_checkpoint_type) == (9, "delta")
