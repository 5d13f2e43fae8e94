"""Every public method of the managers of the Fireworks SDK, called for real, as `<class>.<method>`.

Knows no test: `endpoints.verdicts` makes the calls, in the order of a life.
"""

from __future__ import annotations

import inspect
import uuid
import warnings
from collections.abc import Callable
from typing import Any

from endpoints import ADAM, TIMEOUT_S, Calls, datum, settled, truly
from running import MODEL

CLASSES = ("FireworksClient", "TrainerJobManager", "DeploymentManager", "WeightSyncer", "FiretitanServiceClient")
SHAPE = "accounts/local/trainingShapes/tiny-cpu"

NOT_HERE = {
    "FireworksClient.promote_training_job_checkpoint": "of hosted fine-tuning jobs, which this server has none of",
    "FireworksClient.list_training_job_checkpoints": "of hosted fine-tuning jobs, which this server has none of",
    "FiretitanServiceClient.create_training_client_from_state": "which the SDK refuses itself on dedicated trainers",
    "FiretitanServiceClient.create_training_client_from_state_with_optimizer": "likewise",
    "FiretitanServiceClient.delete_training_session": "sends nothing unless the service is the serverless one",
    "FiretitanServiceClient.get_telemetry": "sends nothing",
}
"""What has no meaning on this server, and why."""


def public_methods() -> set[str]:
    """`<class>.<method>` of all of them; async twins, which send the same, and what is inherited are left out."""
    from fireworks.training import sdk

    found = set()
    for owner in CLASSES:
        cls, parent = getattr(sdk, owner), sdk.FireworksClient
        inherited = dir(parent) if issubclass(cls, parent) and cls is not parent else ()
        for name, _ in inspect.getmembers(cls, callable):
            if not name.startswith("_") and not name.endswith("_async") and name not in inherited:
                found.add(f"{owner}.{name}")
    return found


class Have(dict[str, Any]):
    """What calls before gave to those after."""

    def keep(self, what: str, value: Any) -> Any:
        self[what] = settled(value)
        return self[what]


def jobs_and_deployments(url: str, key: str, adapter_of: str) -> Calls:
    """The three managers and the syncer; `adapter_of` is a session of the root API with one saved adapter."""
    from fireworks.training import sdk

    have = Have()
    trainers = sdk.TrainerJobManager(api_key=key, base_url=url)
    deployments = sdk.DeploymentManager(api_key=key, base_url=url)
    account = sdk.FireworksClient(api_key=key, base_url=url)
    model, deployment = (f"{kind}-{uuid.uuid4().hex[:8]}" for kind in ("model", "deployment"))
    yield "FireworksClient.model_is_moe", lambda: truly(account.model_is_moe(MODEL) is False)
    yield "FireworksClient.resolve_training_profile", lambda: have.keep("p", account.resolve_training_profile(SHAPE))
    profile = have["p"]

    def fresh() -> Any:
        return sdk.TrainerJobConfig(base_model=MODEL, training_shape_ref=profile.training_shape_version)

    yield "TrainerJobManager.create", lambda: have.keep("job", trainers.create(fresh()))
    job, name = have["job"].job_id, have["job"].job_name
    yield (
        "TrainerJobManager.wait_for_ready",
        lambda: have.keep("endpoint", trainers.wait_for_ready(job, name, timeout_s=TIMEOUT_S)),
    )
    yield "TrainerJobManager.get", lambda: truly(trainers.get(job)["state"] == "JOB_STATE_RUNNING")
    yield "TrainerJobManager.try_get", lambda: truly(trainers.try_get("no-such-job") is None)
    yield "TrainerJobManager.wait_for_existing", lambda: trainers.wait_for_existing(job, timeout_s=TIMEOUT_S)
    yield "TrainerJobManager.reconnect_and_wait", lambda: trainers.reconnect_and_wait(job, timeout_s=TIMEOUT_S)
    service = sdk.FiretitanServiceClient(base_url=have["endpoint"].base_url, api_key=key)
    client = service.create_training_client(base_model=MODEL)
    yield from _serving(sdk, deployments, client, deployment, profile, name)
    yield (
        "FireworksClient.list_checkpoints",
        lambda: have.keep("rows", [r for r in account.list_checkpoints(job) if r["promotable"]]),
    )
    yield (
        "FireworksClient.promote_checkpoint",
        lambda: account.promote_checkpoint(name=have["rows"][0]["name"], output_model_id=model, base_model=MODEL),
    )
    service.close()
    cancelled = f"/v1/accounts/local/rlorTrainerJobs/{job}:cancel"
    trainers._post(cancelled, json={}, timeout=TIMEOUT_S)
    yield "TrainerJobManager.resume_and_wait", lambda: trainers.resume_and_wait(job, timeout_s=TIMEOUT_S)
    yield "DeploymentManager.delete", lambda: deployments.delete(deployment)
    yield "TrainerJobManager.delete", lambda: trainers.delete(job)
    yield (
        "TrainerJobManager.create_and_wait",
        lambda: have.keep("w", trainers.create_and_wait(fresh(), timeout_s=TIMEOUT_S)),
    )
    trainers.delete(have["w"].job_id)
    session = f"accounts/local/trainingSessions/{adapter_of}"
    yield (
        "FireworksClient.list_training_session_checkpoints",
        lambda: have.keep("s", [r for r in account.list_training_session_checkpoints(session) if r["promotable"]]),
    )
    yield (
        "FireworksClient.promote_session_checkpoint",
        lambda: truly(
            account.promote_session_checkpoint(have["s"][0]["name"], f"{model}-s", MODEL)["kind"] == "HF_PEFT_ADDON"
        ),
    )
    yield "FireworksClient.delete_training_session", lambda: account.delete_training_session(session)
    for owner, manager in (("FireworksClient", account), ("DeploymentManager", deployments)):
        yield f"{owner}.close", manager.close


def _serving(sdk: Any, deployments: Any, client: Any, deployment: str, profile: Any, job_name: str) -> Calls:
    have, identities = Have(), iter("abcdef")
    config = sdk.DeploymentConfig(
        deployment_id=deployment,
        base_model=MODEL,
        deployment_shape=profile.deployment_shape_version,
        hot_load_trainer_job=job_name,
    )
    yield "DeploymentManager.create_or_get", lambda: deployments.create_or_get(config)
    yield "DeploymentManager.wait_for_ready", lambda: deployments.wait_for_ready(deployment, timeout_s=TIMEOUT_S)
    yield "DeploymentManager.get", lambda: truly(deployments.get(deployment).state == "READY")
    yield "DeploymentManager.warmup", lambda: truly(deployments.warmup(f"accounts/local/deployments/{deployment}"))

    def save() -> str:
        saved = client.save_weights_for_sampler_ext(next(identities), checkpoint_type="base")
        return str(have.keep("saved", saved.snapshot_name))

    yield "DeploymentManager.hotload", lambda: deployments.hotload(deployment, MODEL, save())
    yield (
        "DeploymentManager.wait_for_hotload",
        lambda: truly(deployments.wait_for_hotload(deployment, MODEL, have["saved"], timeout_seconds=TIMEOUT_S)),
    )
    yield (
        "DeploymentManager.hotload_check_status",
        lambda: truly(deployments.hotload_check_status(deployment, MODEL)["replicas"][0]["readiness"]),
    )
    yield (
        "DeploymentManager.hotload_and_wait",
        lambda: truly(deployments.hotload_and_wait(deployment, MODEL, save(), timeout_seconds=TIMEOUT_S)),
    )
    yield (
        "DeploymentManager.update",
        lambda: deployments.update(deployment, body={"description": "d"}, update_mask=["description"]),
    )
    yield (
        "DeploymentManager.reattach_trainer",
        lambda: deployments.reattach_trainer(
            deployment,
            base_model=MODEL,
            trainer_job_name=job_name,
            timeout_s=TIMEOUT_S,
            hot_load_transition_type="SYNC",
        ),
    )
    syncer = sdk.WeightSyncer(client, deployments, deployment, base_model=MODEL)
    yield "WeightSyncer.wait_for_hotload_ready", lambda: syncer.wait_for_hotload_ready(timeout_s=TIMEOUT_S)
    yield "WeightSyncer.save_only", lambda: have.keep("only", truly(syncer.save_only("only", "base")))
    yield "WeightSyncer.hotload", lambda: truly(syncer.hotload(have["only"], "base"))
    yield "WeightSyncer.save_and_hotload", lambda: truly(syncer.save_and_hotload("delta"))
    yield "WeightSyncer.check_deployment_state", lambda: truly(syncer.check_deployment_state().startswith("delta"))
    yield "WeightSyncer.reset_delta_chain", syncer.reset_delta_chain
    yield "WeightSyncer.get_deployment_sampler", lambda: syncer.get_deployment_sampler().close()
    yield "WeightSyncer.get_sampling_client", lambda: syncer.get_sampling_client().close()
    yield "DeploymentManager.scale_to_zero", lambda: deployments.scale_to_zero(deployment)


def managed(url: str, key: str, tokenizer: str) -> Calls:
    """What a service provisions by itself: a trainer, a reference, a deployment."""
    from fireworks.training import sdk

    have, call = Have(), "FiretitanServiceClient."
    ends: dict[str, Any] = {"cleanup_trainer_on_close": True, "cleanup_deployment_on_close": "delete"}
    urls = {"base_url": url, "inference_url": url, "hotload_api_url": url}
    yield (
        call + "from_firetitan_config",
        lambda: have.keep(
            "service",
            sdk.FiretitanServiceClient.from_firetitan_config(
                api_key=key, base_model=MODEL, tokenizer_model=tokenizer, lora_rank=4,
                training_shape_id=f"{SHAPE}-lora", **urls, **ends,
            ),
        ),
    )  # fmt: skip
    service = have["service"]
    yield (
        call + "create_training_client",
        lambda: have.keep("client", service.create_training_client(MODEL, lora_rank=4)),
    )
    client = have["client"]
    yield call + "get_server_capabilities", service.get_server_capabilities
    yield (
        call + "create_reference_client",
        lambda: have.keep("ref", service.create_reference_client(MODEL, lora_rank=4)),
    )
    settled(have["ref"].forward([datum(sdk.types)], "cross_entropy"))
    yield call + "release_references", service.release_references
    settled(client.forward_backward([datum(sdk.types)], "cross_entropy"))
    settled(client.optim_step(sdk.types.AdamParams(**ADAM)))
    path = settled(client.save_weights_for_sampler("one")).path
    yield call + "requires_initial_sampler_sync", service.requires_initial_sampler_sync
    yield call + "hotload_sampler_snapshot", lambda: service.hotload_sampler_snapshot(path)
    yield call + "create_sampling_client", lambda: service.create_sampling_client(model_path=path)
    yield call + "create_deployment_sampler", lambda: service.create_deployment_sampler(path).close()
    own = f"accounts/local/deployments/{service.deployment_id}"
    yield (
        call + "create_deployment_sampler_for_model",
        lambda: service.create_deployment_sampler_for_model(own).close(),
    )
    yield (
        call + "create_inference_deployment_sampler",
        lambda: service.create_inference_deployment_sampler(
            sdk.DeploymentConfig(deployment_id=f"judge-{uuid.uuid4().hex[:8]}", base_model=MODEL),
            timeout_s=TIMEOUT_S, cleanup_on_close="delete",
        ).close(),
    )  # fmt: skip
    job = service.trainer_job_id
    yield (
        call + "list_checkpoints",
        lambda: have.keep("rows", [r for r in service.list_checkpoints(job) if r["promotable"]]),
    )
    yield (
        call + "promote_checkpoint",
        lambda: service.promote_checkpoint(
            name=have["rows"][0]["name"], output_model_id=f"managed-{uuid.uuid4().hex[:8]}", base_model=MODEL
        ),
    )
    settled(client.save_state("state"))
    yield call + "create_rest_client", service.create_rest_client
    yield call + "close", service.close


def dedicated(url: str, key: str) -> Calls:
    """What a service does on an endpoint that is there already, with LoRA."""
    from fireworks.training import sdk

    have, call = Have(), "FiretitanServiceClient."
    trainers = sdk.TrainerJobManager(api_key=key, base_url=url)
    profile = trainers.resolve_training_profile(f"{SHAPE}-lora")
    config = sdk.TrainerJobConfig(base_model=MODEL, training_shape_ref=profile.training_shape_version, lora_rank=4)
    endpoint = trainers.create_and_wait(config, timeout_s=TIMEOUT_S)
    service = sdk.FiretitanServiceClient(base_url=endpoint.base_url, api_key=key)
    yield (
        call + "create_lora_training_client",
        lambda: have.keep("client", service.create_lora_training_client(MODEL, rank=4)),
    )
    yield call + "create_base_training_client", lambda: service.create_base_training_client(MODEL)
    service.close()
    trainers.delete(endpoint.job_id)


def root_session(url: str, key: str) -> tuple[str, Callable[[], None]]:
    """A session of the root API with one saved adapter, and what closes its client."""
    import tinker as sdk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        service = sdk.ServiceClient(base_url=url, api_key=f"tml-{key}")
    client = service.create_lora_training_client("tiny", rank=2)
    client.save_weights_for_sampler("adapter").result(timeout=TIMEOUT_S)
    return client.model_id.partition(":")[0], lambda: service.close("success")
