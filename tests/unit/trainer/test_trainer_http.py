"""The wire without an SDK: what no well-behaved client sends."""

from __future__ import annotations

import json

import httpx
import pytest


class Wire:
    """Raw calls to one trainer, with one model created."""

    def __init__(self, url: str) -> None:
        self.root = url
        self.http = httpx.Client(base_url=f"{url}/api/v1", timeout=40)
        self.session_id = self.post("create_session", {"tags": []})["session_id"]
        create = {"session_id": self.session_id, "model_seq_id": 0, "base_model": "tiny"}
        self.model_id = self.result(self.post("create_model", create))["model_id"]

    def post(self, path: str, body: dict) -> dict:
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def result(self, accepted: dict) -> dict:
        return self.post("retrieve_future", {"request_id": accepted["request_id"]})

    def forward_body(self, seq_id: int, targets: list[int]) -> dict:
        datum = {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}, {"tokens": [3]}]},
            "loss_fn_inputs": {"target_tokens": {"data": targets, "dtype": "int64"}},
        }
        return {
            "model_id": self.model_id,
            "seq_id": seq_id,
            "forward_backward_input": {"data": [datum], "loss_fn": "cross_entropy"},
        }


@pytest.fixture
def wire(url: str) -> Wire:
    return Wire(url)


def test_unreadable_bodies_and_unknown_routes_get_an_envelope(wire: Wire):
    for path, body in [
        ("forward_backward", b"{not json"),
        ("forward_backward", b""),
        ("optim_step", b"[]"),
        ("optim_step", b'{"model_id": 5, "seq_id": 1}'),
        ("create_model", b'{"session_id": "s"}'),
        ("retrieve_future", b"{}"),
        ("session_heartbeat", b"\xff"),
    ]:
        answer = wire.http.post(path, content=body)
        assert answer.status_code == 400, path
        assert answer.json()["error"]["message"], path
    for method, path, status in [("POST", "no_such_call", 404), ("GET", "forward", 405)]:
        answer = wire.http.request(method, path, json={})
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == 5
    assert wire.http.post("retrieve_future", json={"request_id": "x"}).status_code == 404
    assert wire.http.get("healthz").json() == {"status": "ok"}


def test_a_body_with_nan_consumes_its_place(wire: Wire):
    body = wire.forward_body(1, [2, 3, 4])
    body["forward_backward_input"]["data"][0]["loss_fn_inputs"]["weights"] = {
        "data": [1.0, float("nan"), 1.0],
        "dtype": "float32",
    }
    accepted = wire.http.post("forward_backward", content=json.dumps(body)).json()
    failed = wire.result(accepted)
    assert failed["category"] == "user"
    assert "finite" in failed["error"]
    assert "metrics" in wire.result(wire.post("forward_backward", wire.forward_body(2, [2, 3, 4])))


def test_wrong_types_fail_the_future_and_name_the_field(wire: Wire):
    body = wire.forward_body(1, [2, 3, 4])
    body["forward_backward_input"]["data"][0]["model_input"]["chunks"][0]["tokens"] = ["a"]
    assert "tokens" in wire.result(wire.post("forward_backward", body))["error"]
    image = wire.forward_body(2, [2, 3, 4])
    image["forward_backward_input"]["data"][0]["model_input"]["chunks"][0] = {
        "type": "image",
        "data": "",
        "format": "png",
    }
    assert "image" in wire.result(wire.post("forward_backward", image))["error"]
    step = {"model_id": wire.model_id, "seq_id": 3, "adam_params": {"learning_rate": 1, "momentum": 2}}
    assert "momentum" in wire.result(wire.post("optim_step", step))["error"]
    unknown = wire.result(wire.post("optim_step", {"model_id": "who", "seq_id": 1, "adam_params": {}}))
    assert "model_id: 'who'" in unknown["error"]


def test_results_can_be_read_again_and_hold_every_log_prob(wire: Wire):
    accepted = wire.post("forward_backward", wire.forward_body(1, [2, 3, 4]))
    assert wire.post("forward_backward", wire.forward_body(1, [2, 3, 4])) == accepted
    first = wire.result(accepted)
    assert wire.result(accepted) == first
    logprobs = first["loss_fn_outputs"][0]["logprobs"]
    assert logprobs["shape"] == [3]
    assert first["metrics"]["loss:sum"] == pytest.approx(-sum(logprobs["data"]), rel=1e-6)
    assert all(key.count(":") == 1 for key in first["metrics"])


def test_facts_about_the_model(wire: Wire):
    info = wire.post("get_info", {"model_id": wire.model_id})
    assert info["model_data"]["arch"] == "qwen3"
    assert info["is_lora"] is False
    capabilities = wire.http.get("get_server_capabilities").json()["supported_models"]
    assert capabilities[0]["model_name"] == "accounts/local/models/tiny"
    assert wire.post("tokenizer/encode", {"text": "hello"})["tokens"]
    wrong = {"session_id": wire.session_id, "model_seq_id": 1, "base_model": "accounts/local/models/other"}
    assert "base_model" in wire.result(wire.post("create_model", wrong))["error"]
    assert wire.model_id in httpx.get(f"{wire.root}/worker/status").json()["models"]
