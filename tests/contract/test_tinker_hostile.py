"""What no client sends, sent to every route of the root API: always an answer in time, never a server error."""

from __future__ import annotations

import httpx
import pytest
from running import RunningServer

ROUTES = [
    "create_session", "session_heartbeat", "sessions/x/finish", "create_model", "unload_model", "get_info",
    "forward", "forward_backward", "optim_step", "load_weights", "save_weights", "save_weights_for_sampler",
    "save_weights_external", "weights_info", "create_sampling_session", "asample", "retrieve_future", "client/config",
    "client/dynamic_config", "telemetry",
]  # fmt: skip
JSON = [
    b"", b"{", b"[]", b"null", b"5", b"[" * 100_000, b"\xff" * 100, b'{"model_id":5}', b'{"model_id":"x","seq_id":1}',
    b'{"model_id":"x","seq_id":-1e400}', b'{"model_id":"\\ud800","session_id":"\\ud800","seq_id":1}',
    b'{"session_id":"x","model_seq_id":0,"path":"y","optimizer":true,"base_model":"z"}',
    b'{"session_id":"session-%s","model_seq_id":99999999999999999999,"base_model":"tiny"}' % (b"0" * 32),
    b'{"request_id":"x"}', b'{"request_id":"a.b"}', b'{"request_id":"_.b"}', b'{"request_id":""}',
    b'{"sampling_session_id":"q","seq_id":1,"num_samples":100000000}', b'{"tinker_path":"tinker://../weights/x"}',
    b'{"session_id":"%s","sampling_session_seq_id":1,"base_model":"tiny"}' % (b"s" * 5000),
]  # fmt: skip
MESSAGES = [
    b"",
    b"\xff" * 100,
    b"\x0a",
    b"\x0a\x05ab",
    b"\x0a\xff\xff\xff\xff\xff",
    b"\x0a\x03\xff\xfe\xfd",
    b"\x12\x00",
]
GETS = [
    "training_runs?limit=-1&offset=-5", "training_runs?limit=x", "training_runs/%2e%2e", "training_runs/x/checkpoints",
    "samplers/x", "sessions/%ff", "downloads/x/y", "training_runs/x/checkpoints/weights/y/archive",
    "training_runs/x/checkpoints/other/y/archive", "nothing",
]  # fmt: skip


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, answer.text
    assert answer.content or answer.status_code == 204
    if answer.status_code >= 400:
        assert answer.json()["error"]["message"]


@pytest.mark.parametrize("route", ROUTES)
def test_every_body_is_answered(server: RunningServer, route: str) -> None:
    headers = {"X-API-Key": server.key}
    with httpx.Client(base_url=f"{server.url}/api/v1/", headers=headers, timeout=5) as client:
        for body in JSON:
            check(client.post(route, content=body, headers={"content-type": "application/json"}))
        for body in MESSAGES:
            kind = {"content-type": "application/x-protobuf"}
            check(client.post(route, content=body, headers=kind))
            check(client.post(route, content=body, headers=kind | {"content-encoding": "zstd"}))


@pytest.mark.parametrize("path", GETS)
def test_every_path_is_answered(server: RunningServer, path: str) -> None:
    check(httpx.get(f"{server.url}/api/v1/{path}", headers={"X-API-Key": server.key}, timeout=5))


def test_refused_requests_leave_the_server_as_it_was(server: RunningServer) -> None:
    names = [
        model["model_name"] for model in server.ask("GET", "/api/v1/get_server_capabilities").json()["supported_models"]
    ]
    assert "tiny" in names
