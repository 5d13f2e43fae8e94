"""What an account can have on a server, made through the genuine SDKs, and every route by which it could be reached."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import time
import uuid
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import Any

from proofs import FULL
from running import MODEL, RunningServer

from firebox.control.app import ControlPlane
from firebox.control.layout import Layout
from firebox.gateway.app import build_app
from firebox.gateway.guard import allowed_hosts
from firebox.gateway.proxy import LookUps
from firebox.gateway.tinker import RootCalls
from firebox.launch.local import LocalLauncher
from firebox.launch.machine import Machine

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")


def routes(folder: Path) -> list[tuple[str, str]]:
    """(method, path template) of every route of the whole server, documentation included."""
    layout = Layout(folder)
    layout.create()
    control = ControlPlane(layout, LocalLauncher(layout.run, layout.lock), Machine.here(), idle_s=60.0)

    async def nobody(*_: Any) -> Any:
        raise AssertionError("no request is sent to this app")

    @contextlib.asynccontextmanager
    async def life() -> AsyncIterator[None]:
        yield

    calls = RootCalls(**{field.name: nobody for field in fields(RootCalls)})
    app = build_app(
        control.app, LookUps(nobody, nobody), calls, lambda _: None, lambda _: None, allowed_hosts("127.0.0.1"), life
    )
    found = [(m, r.path) for r in (*app.routes, *control.app.routes) for m in getattr(r, "methods", None) or ()]
    found += [(m.upper(), path) for path, calls in control.app.openapi()["paths"].items() for m in calls]
    control.context.db.close()
    return sorted({(method, re.sub(r":\w+}", "}", path)) for method, path in found})


@contextlib.contextmanager
def estate(server: RunningServer) -> Iterator[Mapping[str, str]]:
    """Something of every kind, by the names that route templates have for it."""
    with contextlib.ExitStack() as ends:
        have = {"account": "local", "model": "tiny", "shape": "tiny-cpu", "version": "1", "segment": "weights"}
        have |= {"file": "adapter_config.json", "ticket": "not-a-ticket", "path": "api/v1/healthz"}
        have |= _fireworks(server, ends) | _tinker(server, ends)
        have["key"] = server.ask("GET", "/v1/accounts/local/apiKeys").json()["apiKeys"][0]["name"].split("/")[-1]
        yield have


def _fireworks(server: RunningServer, ends: contextlib.ExitStack) -> dict[str, str]:
    from fireworks.training import sdk

    trainers = sdk.TrainerJobManager(api_key=server.key, base_url=server.url)
    deployments = sdk.DeploymentManager(api_key=server.key, base_url=server.url)
    profile = trainers.resolve_training_profile("accounts/local/trainingShapes/tiny-cpu")
    created = trainers.create(sdk.TrainerJobConfig(base_model=MODEL, training_shape_ref=profile.training_shape_version))
    ends.callback(trainers.delete, created.job_id)
    endpoint = trainers.wait_for_ready(created.job_id, created.job_name, timeout_s=120)
    service = sdk.FiretitanServiceClient(base_url=endpoint.base_url, api_key=server.key)
    ends.callback(service.close)
    client = service.create_training_client(base_model=MODEL)
    snapshot = client.save_weights_for_sampler_ext("theirs", checkpoint_type="base").snapshot_name
    deployment = f"theirs-{uuid.uuid4().hex[:8]}"
    deployments.create_or_get(
        sdk.DeploymentConfig(
            deployment_id=deployment,
            base_model=MODEL,
            deployment_shape=profile.deployment_shape_version,
            hot_load_trainer_job=created.job_name,
        )
    )
    ends.callback(deployments.delete, deployment)
    deployments.wait_for_ready(deployment, timeout_s=120)
    operation = _promotion(server, ends, snapshot, created.job_name) if FULL else "0" * 32
    return {"job": created.job_id, "deployment": deployment, "checkpoint": snapshot, "operation": operation}


def _promotion(server: RunningServer, ends: contextlib.ExitStack, checkpoint: str, job: str) -> str:
    """The id of a promotion; while that runs, only the server knows it."""
    model = f"accounts/local/models/theirs-{uuid.uuid4().hex[:8]}"
    body = {"output_model": model, "trainer_job_id": job, "base_model": MODEL}
    pool = ends.enter_context(ThreadPoolExecutor(1))
    promoting = pool.submit(server.ask, "POST", f"/v1/accounts/local/checkpoints/{checkpoint}:promote", json=body)
    ends.callback(lambda: promoting.result() and server.ask("DELETE", f"/v1/{model}"))
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        with sqlite3.connect(server.data / "firebox.db") as database:
            found = database.execute("SELECT id FROM operations WHERE request LIKE ?", (f"%{checkpoint}%",)).fetchall()
        if found:
            return str(found[0][0])
        time.sleep(0.05)
    raise AssertionError("the promotion did not begin")


def _tinker(server: RunningServer, ends: contextlib.ExitStack) -> dict[str, str]:
    import tinker as sdk

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        service = sdk.ServiceClient(base_url=server.url, api_key=f"tml-{server.key}")
    client = service.create_lora_training_client("tiny", rank=2)
    ends.callback(lambda: service.close("success"))
    client.save_state("theirs").result(timeout=120)
    client.save_weights_for_sampler("theirs").result(timeout=120)
    run, session = client.model_id, client.model_id.partition(":")[0]
    service.create_sampling_client(model_path=f"tinker://{run}/sampler_weights/theirs")
    deadline = time.monotonic() + 30
    while not (samplers := server.ask("GET", f"/api/v1/sessions/{session}").json()["sampler_ids"]):
        assert time.monotonic() < deadline, "the client did not create its sampler"
        time.sleep(0.05)
    return {"run": run, "session": session, "session_id": session, "sampler": samplers[0], "name": "theirs"}
