"""Who may do what: every route, every method, every kind of credential; and one account beside another."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import pytest
from estate import METHODS, estate, routes
from proofs import Record
from running import RunningServer

from firebox.wire.worker import SamplerSpec, TrainerSpec, WorkerRuntime

pytestmark = [pytest.mark.prove, pytest.mark.filterwarnings("ignore::FutureWarning")]


@pytest.fixture(scope="module")
def theirs(server: RunningServer) -> Iterator[Mapping[str, str]]:
    """Something of every kind that belongs to the account `local`."""
    with estate(server) as have:
        yield have


@pytest.fixture(scope="module")
def stranger(server: RunningServer) -> str:
    """The key of another account."""
    made = server.ask("POST", "/v1/accounts/stranger/apiKeys", json={"displayName": "stranger"})
    return str(made.json()["secret"])


def filled(template: str, values: Mapping[str, str]) -> str:
    return template.format_map({"path": "api/v1/healthz", **values})


def test_no_route_is_reached_without_a_right(
    server: RunningServer, tmp_path: Any, theirs: Mapping[str, str], record: Record
) -> None:
    revoked = server.ask("POST", "/v1/accounts/local/apiKeys", json={"displayName": "revoked"}).json()
    assert server.ask("DELETE", "/v1/" + revoked["name"]).status_code == 200
    credentials: dict[str, tuple[dict[str, str], int]] = {
        "none": ({}, 401),
        "empty": ({"X-Api-Key": ""}, 401),
        "wrong": ({"X-Api-Key": f"{server.key}x"}, 401),
        "wrong bearer": ({"Authorization": "Bearer fb_wrong"}, 401),
        "revoked": ({"X-Api-Key": revoked["secret"]}, 401),
        "another host": ({"X-Api-Key": server.key, "Host": "evil.example"}, 403),
        "another origin": ({"X-Api-Key": server.key, "Origin": "https://evil.example"}, 403),
    }
    paths = sorted({filled(template, theirs) for _, template in routes(tmp_path / "walk")})
    let_in, asked = [], 0
    with httpx.Client(base_url=server.url) as client:
        for path in paths:
            for method in METHODS:
                for kind, (headers, status) in credentials.items():
                    asked += 1
                    if client.request(method, path, headers=headers).status_code != status:
                        let_in.append(f"{method} {path} with {kind} credentials")
    assert let_in == []
    record("requests refused", asked)
    record("paths", len(paths))


def everything(server: RunningServer) -> str:
    """What the account sees of its own, as one text."""
    seen = [
        server.ask("GET", f"/v1/accounts/local/{listing}").json()
        for listing in ("models", "rlorTrainerJobs", "deployments")
    ]
    return json.dumps([*seen, server.ask("GET", "/api/v1/training_runs").json()["training_runs"][0]["training_run_id"]])


def body_for(theirs: Mapping[str, str]) -> dict[str, Any]:
    """One body with every field by which some route is told what to work on."""
    job, base = f"accounts/local/rlorTrainerJobs/{theirs['job']}", "accounts/local/models/tiny"
    return {
        "model": f"accounts/local/deployments/{theirs['deployment']}",
        "prompt": [1],
        "baseModel": base,
        "base_model": base,
        "trainingConfig": {"baseModel": base},
        "hotLoadTrainerJob": job,
        "trainer_job_id": job,
        "output_model": "accounts/local/models/stolen",
        "identity": theirs["checkpoint"],
        "modelId": "stolen",
        "stagedDir": "0" * 32,
        "displayName": "stolen",
        "aliases": ["a/b"],
        "session_id": theirs["session"],
        "model_seq_id": 9,
        "sampling_session_seq_id": 9,
        "sampling_session_id": theirs["sampler"],
        "model_id": theirs["run"],
        "model_path": f"tinker://{theirs['run']}/sampler_weights/theirs",
        "tinker_path": f"tinker://{theirs['run']}/weights/theirs",
        "path": f"tinker://{theirs['run']}/weights/theirs",
        "request_id": f"{theirs['job']}.1",
        "seq_id": 1,
        "num_samples": 1,
        "ttl_seconds": 1,
    }


FREE = {"/api/v1/create_session", "/api/v1/client/config", "/api/v1/client/dynamic_config", "/api/v1/telemetry"}
"""What only makes something of the caller's own, or nothing."""


def settled(client: httpx.Client, answer: httpx.Response) -> httpx.Response:
    """The result behind a request id, where the answer is one."""
    if answer.content and answer.headers.get("content-type") == "application/json":
        told = answer.json()
        if isinstance(told, dict) and "request_id" in told:
            return client.post("/api/v1/retrieve_future", json={"request_id": told["request_id"]})
    return answer


def leaked(answer: httpx.Response, theirs: Mapping[str, str], sent: str) -> list[str]:
    """Ids that are told although they were not sent."""
    secrets = {theirs[kind] for kind in ("job", "deployment", "checkpoint", "run", "session", "operation", "key")}
    return [secret for secret in secrets if secret in answer.text and secret not in sent]


def test_no_account_reaches_what_belongs_to_another(
    server: RunningServer, tmp_path: Any, theirs: Mapping[str, str], stranger: str, record: Record
) -> None:
    before, body = everything(server), body_for(theirs)
    deployment = {"fireworks-deployment": f"accounts/local/deployments/{theirs['deployment']}"}
    wrong, asked = [], 0
    with httpx.Client(base_url=server.url, headers={"X-Api-Key": stranger, "Prefer": "wait=0"}, timeout=60) as client:
        for method, template in routes(tmp_path / "walk"):
            accounts = ("local", "stranger", "fireworks", "-") if "{account}" in template else ("",)
            for account in accounts:
                path = filled(template, {**theirs, "account": account})
                content = None if method in ("GET", "HEAD") else body
                answer = settled(client, client.request(method, path, json=content, headers=deployment))
                asked += 1
                owned = "{" in template or content is not None
                served = answer.status_code < 400 and "error" not in answer.text
                ids = {key for key in theirs if f"{{{key}}}" in template} - {"account"}
                mine = template in FREE or (not ids and account != "local" and method == "GET")
                if leaked(answer, theirs, path + json.dumps(body)) or (owned and served and not mine):
                    wrong.append(f"{method} {path}: {answer.status_code} {answer.text[:200]}")
    assert wrong == []
    assert everything(server) == before
    record("requests of another account", asked)


@pytest.mark.parametrize("credential", [{}, {"x-firebox-worker-token": "wrong"}, {"Authorization": "Bearer wrong"}])
def test_workers_answer_only_who_has_their_token(
    server: RunningServer, theirs: Mapping[str, str], credential: dict[str, str], tiny_dir: Any
) -> None:
    """Every route of both kinds of worker, on the sockets of the workers that are running."""
    from firebox.sampler.server import build_app as build_sampler
    from firebox.trainer.server import build_app as build_trainer

    runtime = WorkerRuntime(socket="", token="t")
    names = {"base_model": "accounts/local/models/tiny", "model_dir": str(tiny_dir), "max_context_length": 64}
    jobs = {"job_dir": "/nowhere/j", "jobs_dir": "/nowhere"}
    trainer = TrainerSpec(job="accounts/local/rlorTrainerJobs/j", runtime=runtime, **jobs, **names)
    sampler = SamplerSpec(deployment="accounts/local/deployments/d", runtime=runtime, **names)
    found = {route.path for app in (build_trainer(trainer), build_sampler(sampler)) for route in app.routes}
    assert {"/worker/hotload", "/worker/runs/park", "/api/v1/forward_backward", "/worker/sample"} <= found
    sockets = sorted((server.data / "run").glob("*.sock"))
    assert len(sockets) >= 3
    for path in sockets:
        assert path.stat().st_mode & 0o077 == 0
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://worker") as client:
            for route in found:
                for method in METHODS:
                    answer = client.request(method, route.replace("{session_id}", "s"), headers=credential)
                    assert answer.status_code == 401, f"{method} {route}"


def test_stranger_does_not_read_anothers_futures(
    server: RunningServer, theirs: Mapping[str, str], stranger: str
) -> None:
    """Request ids of the server's own answers can be guessed: they are of no use to another account."""
    ask = {
        "sampling_session_id": theirs["sampler"],
        "seq_id": 77,
        "num_samples": 1,
        "sampling_params": {"max_tokens": 1},
    }
    ask["prompt"] = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    promised = server.ask("POST", "/api/v1/asample", json=ask).json()["request_id"]
    body = {"request_id": promised}
    mine = server.ask("POST", "/api/v1/retrieve_future", json=body, headers={"X-Api-Key": stranger}).json()
    assert "not known" in mine["error"]
    assert server.ask("POST", "/api/v1/retrieve_future", json=body).json()["sequences"]
