"""What a run needs from the platform: trainers, a deployment, a promoted model, and their removal afterwards.

Knows no algorithm. Invariant: whatever a `Workspace` creates is gone when its block ends, however it ends, or, after a
kill, when the next run of that `log_path` begins to create; checkpoints and promoted models stay. Nothing is created
before the server, the key and the shapes are known to be good.
"""

from __future__ import annotations

import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from training.utils.client import ReconnectableClient
from training.utils.config import DeployConfig, InfraConfig, WeightSyncConfig
from training.utils.errors import ConfigError, PlatformError
from training.utils.ledger import Entry, Ledger
from training.utils.reference import FrozenBase

if TYPE_CHECKING:
    from fireworks.training.sdk import DeploymentSampler, TrainingShapeProfile, WeightSyncer

HOSTED_URL = "https://api.fireworks.ai"
PROBE_TIMEOUT_S = 10
DELETE_TIMEOUT_S = 60
SAMPLING_WINDOW = 64
COLLECTIONS = {"trainer": "rlorTrainerJobs", "deployment": "deployments"}

log = logging.getLogger(__name__)


class Workspace:
    """A run's access to the platform at FIREWORKS_BASE_URL with FIREWORKS_API_KEY. Use as a context manager.

    What it creates is recorded in `log_path`, if there is one. Raises PlatformError at once when the key is missing or
    refused, or nobody answers.
    """

    def __init__(self, log_path: str | Path | None = None) -> None:
        self.base_url = os.environ.get("FIREWORKS_BASE_URL", HOSTED_URL).rstrip("/")
        self.api_key = os.environ.get("FIREWORKS_API_KEY", "")
        if not self.api_key:
            raise PlatformError("FIREWORKS_API_KEY is not set: export the key that the server printed when it started")
        _probe(self.base_url, self.api_key)
        from fireworks.training.sdk import DeploymentManager, TrainerJobManager

        self.trainers = TrainerJobManager(api_key=self.api_key, base_url=self.base_url)
        self.deployments = DeploymentManager(api_key=self.api_key, base_url=self.base_url)
        self._cleanup = ExitStack()
        self._ledger = Ledger(log_path) if log_path is not None else None

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *error: Any) -> None:
        self._cleanup.__exit__(*error)

    def resolve(self, shape_id: str) -> TrainingShapeProfile:
        """The shape's current version: context length, deployment shape, trainer mode. Creates nothing."""
        with explained(f"training shape {shape_id}"):
            return self.trainers.resolve_training_profile(shape_id)

    def trainer(
        self,
        base_model: str,
        profile: TrainingShapeProfile,
        infra: InfraConfig,
        *,
        lora_rank: int = 0,
        learning_rate: float = 1e-5,
        forward_only: bool = False,
    ) -> ReconnectableClient:
        """Start a trainer of this shape and connect to it. It is deleted when the workspace closes."""
        from fireworks.training.sdk import TrainerJobConfig

        job = TrainerJobConfig(
            base_model=base_model,
            lora_rank=lora_rank,
            learning_rate=learning_rate,
            region=infra.region,
            extra_args=infra.extra_args,
            training_shape_ref=profile.training_shape_version,
            forward_only=forward_only,
            requested_job_id=f"trainer-{uuid.uuid4().hex[:12]}",
        )
        with explained(f"trainer for {base_model}"):
            self._owns(Entry("trainer", str(job.requested_job_id)))
            created = self.trainers.create(job)
            endpoint = self.trainers.wait_for_ready(created.job_id, created.job_name, timeout_s=infra.trainer_timeout_s)
            client = ReconnectableClient(
                self.trainers, created.job_id, base_model, lora_rank, fw_api_key=self.api_key, endpoint=endpoint
            )
        self._cleanup.callback(client.close)
        return client

    def reference(
        self, base_model: str, infra: InfraConfig, client: ReconnectableClient, lora_rank: int
    ) -> ReconnectableClient | FrozenBase | None:
        """What gives the base model's log-probs: a trainer of `infra.ref_training_shape_id`; without one the frozen
        base below the adapter of `client`; None for a full-parameter run without one.
        """
        if infra.ref_training_shape_id is not None:
            return self.trainer(base_model, self.resolve(infra.ref_training_shape_id), infra, forward_only=True)
        return FrozenBase(client, base_model) if lora_rank else None

    def states(self, job_id: str) -> list[str]:
        """Names of what a job has saved; none for a job that the server does not know."""
        with explained(f"checkpoints of {job_id}"):
            try:
                return [row["name"].rpartition("/")[2] for row in self.trainers.list_checkpoints(job_id)]
            except RuntimeError:
                # Checkpoints may outlive their job, so only a list that is refused makes its job worth a question.
                if self.trainers.try_get(job_id) is None:
                    return []
                raise

    def delete_state(self, job_id: str, name: str) -> bool:
        """Remove a saved state for good. False when the server deletes no checkpoints, or has none of that name."""
        with explained(f"checkpoint {name} of {job_id}"):
            return self._delete(f"rlorTrainerJobs/{job_id}/checkpoints/{name}")

    def deployment(
        self, base_model: str, profile: TrainingShapeProfile, deploy: DeployConfig, trainer: ReconnectableClient | None
    ) -> str:
        """Create the deployment that samples this trainer's weights, or attach an existing one. Returns its id.

        Without a trainer it serves `base_model` as it is. Only a deployment created here is deleted when the workspace
        closes.
        """
        job_name = trainer.endpoint.job_name if trainer else None
        deployment_id = deploy.deployment_id or derive_deployment_id(base_model)
        with explained(f"deployment {deployment_id}"):
            if self.deployments.get(deployment_id) is not None:
                if job_name:
                    self.deployments.reattach_trainer(
                        deployment_id,
                        base_model=base_model,
                        trainer_job_name=job_name,
                        timeout_s=deploy.deployment_timeout_s,
                    )
                return deployment_id
            config = deployment_config(deployment_id, base_model, profile, deploy, job_name)
            self._owns(Entry("deployment", deployment_id))
            if self.deployments.create_or_get(config).state != "READY":
                self.deployments.wait_for_ready(deployment_id, timeout_s=deploy.deployment_timeout_s)
        return deployment_id

    def _owns(self, entry: Entry) -> None:
        """What is about to be created is recorded first, and removed when the workspace closes.

        Before the first of it, what killed runs of this `log_path` left is removed, and other runs are kept out.
        """
        if self._ledger is not None:
            if not self._ledger.is_claimed:
                left_over = self._ledger.claim()
                self._cleanup.callback(self._ledger.release)
                for left in left_over:
                    self._remove(left)
            self._ledger.add(entry)
        self._cleanup.callback(self._remove, entry)

    def _remove(self, entry: Entry) -> None:
        """Delete it. One that cannot be deleted now is named, and stays on record for the next run."""
        try:
            self._delete(f"{COLLECTIONS[entry.kind]}/{entry.ident}")
        except httpx.HTTPError as exc:
            log.warning("%s %s could not be removed: %s", entry.kind, entry.ident, exc)
        else:
            if self._ledger is not None:
                self._ledger.removed(entry)

    def _delete(self, resource: str) -> bool:
        """Delete a resource of this account. False when there is none, or the server deletes no such thing."""
        answer = httpx.delete(
            f"{self.base_url}/v1/accounts/{self.trainers.account_id}/{resource}",
            params={"ignoreChecks": "true", "hard": "true"} if resource.startswith("deployments/") else None,
            headers={"X-Api-Key": self.api_key},
            timeout=DELETE_TIMEOUT_S,
        )
        if answer.status_code in (404, 405, 501):
            return False
        answer.raise_for_status()
        return True

    def syncer(
        self, client: ReconnectableClient, deployment_id: str, base_model: str, lora_rank: int, sync: WeightSyncConfig
    ) -> WeightSyncer:
        """What carries weights from this trainer into this deployment: full weights first, then deltas."""
        from fireworks.training.sdk import WeightSyncer

        return WeightSyncer(
            policy_client=client,
            deploy_mgr=self.deployments,
            deployment_id=deployment_id,
            base_model=base_model,
            hotload_timeout=sync.weight_sync_timeout,
            first_checkpoint_type=sync.first_checkpoint_type,
            lora_rank=lora_rank,
        )

    def sampler(self, deployment_id: str, tokenizer: Any) -> DeploymentSampler:
        """Token-in, token-out access to a deployment, closed by the caller. Its concurrency follows the server."""
        from fireworks.training.sdk import AdaptiveConcurrencyController, DeploymentSampler

        return DeploymentSampler(
            inference_url=self.deployments.inference_url,
            model=f"accounts/{self.deployments.account_id}/deployments/{deployment_id}",
            api_key=self.api_key,
            tokenizer=tokenizer,
            concurrency_controller=AdaptiveConcurrencyController(initial_window=SAMPLING_WINDOW),
        )

    def promote(self, job_id: str, snapshot: str, output_model_id: str, base_model: str) -> str:
        """Turn a saved snapshot into a model that can be deployed; returns the model's name."""
        with explained(f"promotion of {snapshot} to {output_model_id}"):
            model = self.trainers.promote_checkpoint(job_id, snapshot, output_model_id, base_model)
        return str(model.get("name", f"accounts/{self.trainers.account_id}/models/{output_model_id}"))


def deployment_config(
    deployment_id: str,
    base_model: str,
    profile: TrainingShapeProfile,
    deploy: DeployConfig,
    trainer_job_name: str | None,
) -> Any:
    """The SDK's deployment request for these settings. Raises ConfigError when no deployment shape is known."""
    from fireworks.training.sdk import DeploymentConfig

    shape = deploy.deployment_shape or profile.deployment_shape
    if not shape:
        fix = f"set it: training shape {profile.training_shape} names no deployment shape of its own"
        raise ConfigError("DeployConfig.deployment_shape", deploy.deployment_shape, fix)
    replicas: dict[str, int] = {}
    if deploy.replica_count is not None:
        replicas = {"min_replica_count": deploy.replica_count, "max_replica_count": deploy.replica_count}
    return DeploymentConfig(
        deployment_id=deployment_id,
        base_model=base_model,
        deployment_shape=shape,
        region=deploy.deployment_region,
        hot_load_bucket_type=deploy.hot_load_bucket_type,
        enable_hot_load=trainer_job_name is not None,
        hot_load_trainer_job=trainer_job_name,
        disable_speculative_decoding=deploy.disable_speculative_decoding,
        extra_args=deploy.deployment_extra_args,
        extra_values=deploy.extra_values,
        for_training=trainer_job_name is not None,
        **replicas,
    )


def context_limit(profile: TrainingShapeProfile, max_seq_len: int | None) -> int:
    """Tokens one sequence may have: what the shape holds, or less when asked. Raises ConfigError for more."""
    holds = profile.max_supported_context_length
    if max_seq_len is not None and max_seq_len > holds:
        raise ConfigError("Config.max_seq_len", max_seq_len, f"{profile.training_shape} holds {holds} tokens")
    return max_seq_len or holds


def derive_deployment_id(base_model: str) -> str:
    """A fresh deployment id that starts with the base model's name: lower case letters, digits, hyphens."""
    name = re.sub(r"[^a-z0-9]+", "-", base_model.rsplit("/", 1)[-1].lower()).strip("-")
    return f"{name[:50].rstrip('-') or 'model'}-{uuid.uuid4().hex[:8]}"


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn the SDK's refusals into a PlatformError that says what was being done."""
    try:
        yield
    except httpx.HTTPStatusError as exc:
        raise PlatformError(f"{what}: HTTP {exc.response.status_code}: {exc.response.text[:500]}") from exc
    except (PlatformError, ConfigError):
        raise
    except (RuntimeError, TimeoutError, ValueError, httpx.HTTPError) as exc:
        raise PlatformError(f"{what}: {exc}") from exc


def _probe(base_url: str, api_key: str) -> None:
    # The SDK retries an unreachable server for five minutes; a mistyped address should not cost that.
    try:
        answer = httpx.get(
            f"{base_url}/v1/accounts?pageSize=2", headers={"X-Api-Key": api_key}, timeout=PROBE_TIMEOUT_S
        )
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        fix = "start the server (`firebox up`) or set FIREWORKS_BASE_URL"
        raise PlatformError(f"no server answers at {base_url} ({exc}): {fix}") from exc
    if answer.status_code in (401, 403):
        fix = "FIREWORKS_API_KEY and FIREWORKS_BASE_URL must belong together"
        raise PlatformError(f"{base_url} refused the key (HTTP {answer.status_code}): {fix}")
    if not answer.is_success:
        raise PlatformError(f"{base_url} answered HTTP {answer.status_code}: {answer.text[:300]}")
