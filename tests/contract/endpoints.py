"""Every endpoint that the two SDKs reach, as calls of the genuine SDK in the order of a life.

Knows no test: `verdicts` makes the calls and tells of each how it went.
"""

from __future__ import annotations

import asyncio
import uuid
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
from running import MODEL

Calls = Iterator[tuple[str, Callable[[], Any]]]
TIMEOUT_S = 120
ATTEMPTS = 5
PROMPT = [5, 6, 7, 8]
ADAM = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}


def settled(value: Any) -> Any:
    return value.result(timeout=TIMEOUT_S) if hasattr(value, "result") else value


def verdicts(calls: Calls) -> dict[str, str]:
    """Call -> "ok", or what went wrong; when a later call needs what a failed one should have given, that ends it."""
    told: dict[str, str] = {}
    try:
        for name, call in calls:
            told[name] = _verdict(call)
    except KeyError as missing:
        told["the rest"] = f"was not reached without {missing}"
    return told


def _verdict(call: Callable[[], Any]) -> str:
    for _ in range(ATTEMPTS):
        try:
            settled(call())
        except httpx.TransportError as error:
            cut = error  # the control-plane clients leave a cut connection to their caller, who asks again
        except Exception as error:  # noqa: BLE001 - whatever a client raises belongs into the table
            return f"{type(error).__name__}: {error}"[:300]
        else:
            return "ok"
    return f"{type(cut).__name__}: {cut}, {ATTEMPTS} times"


def datum(types: Any, *names: str) -> Any:
    tokens = np.arange(5, 26)
    inputs = {"target_tokens": types.TensorData.from_numpy(tokens[1:])}
    for name in names:
        inputs[name] = types.TensorData.from_numpy(np.full(20, -1.0, dtype=np.float32))
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs)


def custom_loss(data: list[Any], logprobs: list[Any]) -> tuple[Any, dict[str, float]]:
    loss = -sum(row.sum() for row in logprobs)
    return loss, {"mine:sum": loss.item()}


def training(client: Any, types: Any) -> Calls:
    """What both SDKs offer on a training client."""
    policy = ("logprobs", "advantages")
    yield "forward", lambda: client.forward([datum(types)], "cross_entropy")
    for loss, inputs in (("cross_entropy", ()), ("importance_sampling", policy), ("ppo", policy), ("cispo", policy)):
        yield f"forward_backward {loss}", lambda loss=loss, i=inputs: client.forward_backward([datum(types, *i)], loss)
    yield "forward_backward_custom", lambda: client.forward_backward_custom([datum(types)], custom_loss)
    yield "optim_step", lambda: client.optim_step(types.AdamParams(**ADAM))
    yield "get_info", client.get_info
    yield "save_state", lambda: client.save_state("one")


def fireworks(url: str, key: str) -> Calls:
    from fireworks.training import sdk
    from fireworks.training.sdk import types

    trainers = sdk.TrainerJobManager(api_key=key, base_url=url)
    deployments = sdk.DeploymentManager(api_key=key, base_url=url)
    deployment, output = (f"{kind}-{uuid.uuid4().hex[:8]}" for kind in ("deployment", "model"))
    shape = "accounts/local/trainingShapes/tiny-cpu"
    name = f"accounts/local/deployments/{deployment}"
    have: dict[str, Any] = {}

    def keep(what: str, value: Any) -> Any:
        have[what] = value
        return value

    yield "resolve_training_profile", lambda: keep("profile", trainers.resolve_training_profile(shape))
    config = sdk.TrainerJobConfig(base_model=MODEL, training_shape_ref=have["profile"].training_shape_version)
    yield "create job", lambda: keep("job", trainers.create(config))
    job, job_name = have["job"].job_id, have["job"].job_name
    yield "wait_for_ready", lambda: keep("endpoint", trainers.wait_for_ready(job, job_name, timeout_s=TIMEOUT_S))
    yield "get job", lambda: trainers.get(job)
    yield "try_get of no job", lambda: trainers.try_get("no-such-job")
    service = sdk.FiretitanServiceClient(base_url=have["endpoint"].base_url, api_key=key)
    yield "create_training_client", lambda: keep("client", service.create_training_client(base_model=MODEL))
    client = have["client"]
    yield from training(client, types)
    yield (
        "optim_step normalized",
        lambda: client.optim_step(types.AdamParams(**ADAM), grad_accumulation_normalization="num_loss_tokens"),
    )
    yield "load_state", lambda: client.load_state("one")
    yield "load_state_with_optimizer", lambda: client.load_state_with_optimizer("one")
    yield "list_checkpoints of the trainer", client.list_checkpoints
    yield "resolve_checkpoint_path", lambda: client.resolve_checkpoint_path("one", source_job_id=job)
    yield "get_server_capabilities", service.get_server_capabilities

    yield (
        "create deployment",
        lambda: deployments.create_or_get(
            sdk.DeploymentConfig(
                deployment_id=deployment,
                base_model=MODEL,
                deployment_shape=have["profile"].deployment_shape_version,
                hot_load_trainer_job=job_name,
            )
        ),
    )
    yield "wait for deployment", lambda: deployments.wait_for_ready(deployment, timeout_s=TIMEOUT_S)
    yield "get deployment", lambda: deployments.get(deployment)
    syncer = sdk.WeightSyncer(client, deployments, deployment, base_model=MODEL)
    for kind in ("base", "delta"):
        # Two calls: a snapshot is saved once, but loading it may be asked for again after a cut connection.
        yield f"save {kind}", lambda kind=kind: keep("saved", truly(syncer.save_only(f"s-{kind}", kind)))
        yield f"hotload {kind}", lambda kind=kind: loaded(syncer.hotload(have["saved"], kind))
    yield "hotload status", lambda: deployments.hotload_check_status(deployment, MODEL)
    yield "warmup", lambda: deployments.warmup(name)
    yield "sample", lambda: asyncio.run(_fireworks_sample(sdk, url, key, name))
    yield (
        "update deployment",
        lambda: deployments.update(deployment, body={"minReplicaCount": 1}, update_mask="min_replica_count"),
    )
    yield (
        "save for promotion",
        lambda: keep("snapshot", client.save_weights_for_sampler_ext("final", checkpoint_type="base").snapshot_name),
    )
    yield "list_checkpoints of the job", lambda: truly(trainers.list_checkpoints(job))
    yield "promote_checkpoint", lambda: trainers.promote_checkpoint(job, have["snapshot"], output, MODEL)
    yield from adapters(sdk, trainers, key, job)
    yield "scale_to_zero", lambda: deployments.scale_to_zero(deployment)
    yield "delete deployment", lambda: deployments.delete(deployment)
    yield "close service", service.close
    yield "delete job", lambda: trainers.delete(job)


def adapters(sdk: Any, trainers: Any, key: str, source: str) -> Calls:
    """What is for LoRA jobs only, and for two jobs; `source` has a checkpoint `one` of all weights."""
    have: dict[str, Any] = {}

    def keep(what: str, value: Any) -> Any:
        have[what] = value
        return value

    shape = "accounts/local/trainingShapes/tiny-cpu-lora"
    yield "resolve LoRA profile", lambda: keep("profile", trainers.resolve_training_profile(shape))
    config = sdk.TrainerJobConfig(
        base_model=MODEL, training_shape_ref=have["profile"].training_shape_version, lora_rank=4
    )
    yield "create LoRA job", lambda: keep("job", trainers.create(config))
    job, job_name = have["job"].job_id, have["job"].job_name
    yield "wait for LoRA job", lambda: keep("endpoint", trainers.wait_for_ready(job, job_name, timeout_s=TIMEOUT_S))
    service = sdk.FiretitanServiceClient(base_url=have["endpoint"].base_url, api_key=key)
    yield "create LoRA client", lambda: keep("client", service.create_training_client(MODEL, lora_rank=4))
    client, adapter = have["client"], f"adapter-{uuid.uuid4().hex[:8]}"
    yield "forward_backward of LoRA", lambda: client.forward_backward([datum(sdk.types)], "cross_entropy")
    yield "optim_step of LoRA", lambda: client.optim_step(sdk.types.AdamParams(**ADAM))
    for kind in ("base", "merged_base"):
        yield f"save LoRA {kind}", lambda k=kind: keep(k, client.save_weights_for_sampler_ext(k, checkpoint_type=k))
    yield "promote adapter", lambda: trainers.promote_checkpoint(job, have["base"].snapshot_name, adapter, MODEL)
    yield "load_adapter", lambda: client.load_adapter(f"accounts/local/models/{adapter}")
    yield "save_state of LoRA", lambda: client.save_state("lora")
    yield "load_state across jobs", lambda: client.load_state(f"cross_job://{job}/lora")
    yield "load_state of another kind", lambda: refused(client.load_state(f"cross_job://{source}/one"), "another model")
    yield "unload_model", client.unload_model
    yield "close LoRA service", service.close
    yield "delete LoRA job", lambda: trainers.delete(job)


def refused(future: Any, told: str) -> None:
    try:
        future.result(timeout=TIMEOUT_S)
    except Exception as error:  # noqa: BLE001  each SDK has classes of its own
        truly(told in str(error))
    else:
        raise AssertionError("it was not refused")


def loaded(answer: bool) -> None:
    """The SDK tells of a cut connection during a hot-load by False alone, and leaves asking again to its caller."""
    if not answer:
        raise httpx.ReadError("the hot-load was not confirmed")


def truly(value: Any) -> Any:
    assert value, f"the call gave {value!r}"
    return value


async def _fireworks_sample(sdk: Any, url: str, key: str, model: str) -> None:
    sampler = sdk.DeploymentSampler(inference_url=url, model=model, api_key=key, tokenizer=None)
    try:
        truly(await sampler.sample_with_prompt_tokens(PROMPT, n=2, max_tokens=4, logprobs=True))
    finally:
        sampler.close()
        await asyncio.sleep(0)


def tinker(url: str, key: str) -> Calls:
    import tinker as sdk
    from tinker import types

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        service = sdk.ServiceClient(base_url=url, api_key=f"tml-{key}")
    rest = service.create_rest_client()
    have: dict[str, Any] = {}

    def keep(what: str, value: Any) -> Any:
        have[what] = settled(value)
        return have[what]

    yield "get_server_capabilities", service.get_server_capabilities
    yield "create_lora_training_client", lambda: keep("client", service.create_lora_training_client("tiny", rank=4))
    client = have["client"]
    yield from training(client, types)
    state = f"tinker://{client.model_id}/weights/one"
    weights = f"tinker://{client.model_id}/sampler_weights/w"
    yield "load_state", lambda: client.load_state(state)
    yield "load_state_with_optimizer", lambda: client.load_state_with_optimizer(state)
    yield "create_training_client_from_state", lambda: service.create_training_client_from_state(state)
    yield "..._with_optimizer", lambda: service.create_training_client_from_state_with_optimizer(state)
    yield "save_weights_for_sampler", lambda: client.save_weights_for_sampler("w")
    yield "create_sampling_client", lambda: keep("named", service.create_sampling_client(model_path=weights))
    yield "create_sampling_client base", lambda: keep("base", service.create_sampling_client(base_model="tiny"))
    yield "save_weights_and_get_sampling_client", lambda: keep("own", client.save_weights_and_get_sampling_client())
    prompt, params = types.ModelInput.from_ints(PROMPT), types.SamplingParams(max_tokens=4)
    for which in ("named", "base", "own"):
        yield (
            f"sample {which}",
            lambda which=which: have[which].sample(
                prompt, 2, params, include_prompt_logprobs=True, topk_prompt_logprobs=2, topk_sample_logprobs=2
            ),
        )
    yield "compute_logprobs", lambda: have["own"].compute_logprobs(prompt)
    yield "list_training_runs", rest.list_training_runs
    yield "get_training_run", lambda: rest.get_training_run(client.model_id)
    yield "get_training_run_by_tinker_path", lambda: rest.get_training_run_by_tinker_path(state)
    yield "get_weights_info_by_tinker_path", lambda: rest.get_weights_info_by_tinker_path(state)
    yield "list_checkpoints", lambda: rest.list_checkpoints(client.model_id)
    yield "list_user_checkpoints", rest.list_user_checkpoints
    yield "list_sessions", rest.list_sessions
    yield "get_session", lambda: rest.get_session(client.model_id.partition(":")[0])
    yield "save_weights_external", lambda: client.save_weights_external("out")
    yield (
        "get_external_weights_urls",
        lambda: rest.get_external_weights_urls(f"tinker://{client.model_id}/external_weights/out"),
    )
    yield "set_checkpoint_ttl", lambda: rest.set_checkpoint_ttl_from_tinker_path(weights, 7200)
    yield "delete_checkpoint", lambda: rest.delete_checkpoint_from_tinker_path(weights)
    yield "close", lambda: service.close("success")


SDKS = {"fireworks": fireworks, "tinker": tinker}
