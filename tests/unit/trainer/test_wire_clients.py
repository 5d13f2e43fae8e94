"""Both genuine clients on one trainer: protobuf and JSON give the same numbers, over bad connections too."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import tinker
import torch
from chaos_proxy import chaos
from fireworks.training.sdk import types as fireworks_types
from fireworks.training.sdk.client import FiretitanServiceClient
from proofs import Record, count
from trainer_harness import BASE_MODEL, serving, trainer_spec

RANK = 16  # where both clients mean the same scale: one sends alpha 32, the other leaves it out
RL_CONFIG = {"clip_low_threshold": 0.7, "clip_high_threshold": 1.3}


@pytest.fixture(scope="module")
def lora_url(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(trainer_spec(tiny_dir, tmp_path_factory.mktemp("lora"), lora_rank=RANK)) as url:
        yield url


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@contextlib.contextmanager
def tinker_client(url: str) -> Iterator[tinker.TrainingClient]:
    service = tinker.ServiceClient(base_url=url, api_key="tml-any")
    yield service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=3).result()
    service.close("success").result(timeout=30)


@contextlib.contextmanager
def fireworks_client(url: str) -> Iterator[Any]:
    service = FiretitanServiceClient(base_url=url, api_key="any")
    yield service.create_lora_training_client(BASE_MODEL, rank=RANK, seed=3)
    service.close()


CLIENTS = {"tinker": (tinker_client, tinker.types), "fireworks": (fireworks_client, fireworks_types)}


def datums(types: Any, count: int, length: int = 20) -> list[Any]:
    made = []
    for i in range(count):
        generator = torch.Generator().manual_seed(i)
        tokens = torch.randint(1, 1000, (length + 1 + i % 3,), generator=generator)
        values = torch.randn((2, len(tokens) - 1), generator=generator)
        inputs = {"target_tokens": tokens[1:], "logprobs": values[0] - 7, "advantages": values[1]}
        made.append(types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1].tolist()), loss_fn_inputs=inputs))
    return made


def bare(data: list[Any], types: Any) -> list[Any]:
    """The same sequences without the inputs of a built-in loss."""
    return [
        types.Datum(model_input=d.model_input, loss_fn_inputs={"target_tokens": d.loss_fn_inputs["target_tokens"]})
        for d in data
    ]


def numbers(output: Any) -> Any:
    """Every number of a forward or forward_backward result, exactly; one client adds a count of its own."""
    rows = [
        {name: (tensor.dtype, tensor.shape, list(tensor.data)) for name, tensor in datum.items()}
        for datum in output.loss_fn_outputs
    ]
    return rows, {name: value for name, value in output.metrics.items() if name != "response_tokens"}


def custom_loss(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    loss = sum((row.exp() * row).sum() for row in logprobs)
    return loss, {"entropy:sum": loss.item()}


def life(client: Any, types: Any, count: int, name: str) -> list[Any]:
    """Train, use every operation, and return all numbers that came back."""
    data = datums(types, count)
    adam = types.AdamParams(learning_rate=1e-2, grad_clip_norm=1.0)
    told = []
    for _ in range(2):
        passed = client.forward_backward(data, "cross_entropy")
        client.forward_backward(data, "ppo", RL_CONFIG).result()
        client.optim_step(adam).result()
        told.append(numbers(passed.result()))
    told.append(numbers(client.forward_backward(data, "importance_sampling").result()))
    custom = client.forward_backward_custom(bare(data, types), custom_loss).result()
    told.append(custom.metrics["entropy:sum"])
    assert custom.metrics["reused_forward:sum"] > 0
    client.optim_step(adam).result()
    told.append(numbers(client.forward(data, "cross_entropy", {"top_k": 3}).result()))
    saved = client.save_state(name).result().path
    client.forward_backward(data, "cross_entropy").result()
    client.optim_step(adam).result()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        client.load_state_with_optimizer(saved).result()
    told.append(numbers(client.forward(data, "cross_entropy").result()))
    assert told[-1][1] == pytest.approx(told[-2][1])
    assert client.save_weights_for_sampler(f"{name}-sampler").result().path
    return told


def unload(url: str, client: tinker.TrainingClient) -> dict:
    """Tinker's client has no call for it."""
    with httpx.Client(base_url=f"{url}/api/v1", timeout=40) as http:
        accepted = http.post("unload_model", json={"model_id": client.model_id}).json()
        return http.post("retrieve_future", json={"request_id": accepted["request_id"]}).json()


def test_protobuf_and_json_give_the_same_bits(lora_url):
    with tinker_client(lora_url) as by_proto, fireworks_client(lora_url) as by_json:
        assert life(by_proto, tinker.types, 5, "proto") == life(by_json, fireworks_types, 5, "json")
        assert unload(lora_url, by_proto)["type"] == "unload_model"
        by_json.unload_model().result()
        with pytest.raises(Exception, match="unloaded"):
            by_proto.forward(datums(tinker.types, 1), "cross_entropy").result()


def test_mistakes_fail_their_future_and_training_goes_on(lora_url):
    [good] = datums(tinker.types, 1)
    long = datums(tinker.types, 1, length=300)
    with tinker_client(lora_url) as client:
        before = numbers(client.forward([good], "cross_entropy").result())
        for call, told in [
            (lambda: client.forward_backward([good], "nonsense"), "nonsense"),
            (lambda: client.forward_backward([good], "cross_entropy", {"tau": 1.0}), "tau"),
            (lambda: client.forward_backward(long, "cross_entropy"), "context of 256"),
            (lambda: client.save_state("No Good"), "No Good"),
            (lambda: client.optim_step(tinker.types.DimuonParams(learning_rate=1.0)), "adam_params"),
        ]:
            with pytest.raises(tinker.RequestFailedError, match=told) as caught:
                call().result(timeout=30)
            assert caught.value.category is tinker.types.RequestErrorCategory.User
        assert numbers(client.forward([good], "cross_entropy").result()) == before


@pytest.mark.prove
@pytest.mark.parametrize("sdk", CLIENTS)
def test_cut_connections_change_no_number(sdk, lora_url, record: Record):
    connect, types = CLIENTS[sdk]
    with connect(lora_url) as client:
        calm = life(client, types, 3, f"calm-{sdk}")
    num_cut = 0
    for i in range(count(1, 20)):
        with chaos(lora_url, cut_rate=0.05, seed=i) as (url, proxy), connect(url) as client:
            assert life(client, types, 3, f"cut-{sdk}-{i}") == calm
        num_cut += proxy.num_cut
    record("connections cut", num_cut)
    assert num_cut > 0


@pytest.mark.prove
@pytest.mark.parametrize("sdk", CLIENTS)
def test_chunks_in_any_order_change_no_number(sdk, lora_url):
    connect, types = CLIENTS[sdk]
    data = datums(types, 2060, length=2)  # clients send 1024 in a request, all at once: three of them
    with connect(lora_url) as client:
        calm = numbers(client.forward_backward(data, "importance_sampling").result())
    for i in range(count(1, 10)):
        with chaos(lora_url, delay_s=0.2, seed=i) as (url, _), connect(url) as client:
            assert numbers(client.forward_backward(data, "importance_sampling").result()) == calm
