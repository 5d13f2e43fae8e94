"""The genuine SDK drives a trainer process over TCP."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
import torch
from fireworks.training.sdk import types
from fireworks.training.sdk.client import FiretitanServiceClient
from trainer_harness import serving

from firebox.wire.worker import WorkerRuntime

BASE = "accounts/local/models/tiny"
ADAM = types.AdamParams(learning_rate=1e-3)


def datum(first: int = 5, length: int = 24, **inputs: object) -> types.Datum:
    tokens = list(range(first, first + length + 1))
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], **(inputs or {"weights": [1.0] * length})},
    )


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    with contextlib.ExitStack() as stack:
        yield lambda *arguments: stack.enter_context(serving(*arguments))


@pytest.fixture
def connect(serve) -> Iterator[Callable[[str], FiretitanServiceClient]]:
    services = []  # closed before their servers, which they tell something at the end

    def open_service(url: str) -> FiretitanServiceClient:
        services.append(FiretitanServiceClient(base_url=url, api_key="any"))
        return services[-1]

    yield open_service
    for service in services:
        service.close()


def test_full_parameter_training(url, connect):
    client = connect(url).create_training_client(BASE)
    losses = []
    for _ in range(4):
        passed = client.forward_backward([datum(), datum(60)], "cross_entropy")
        stepped = client.optim_step(
            ADAM, grad_accumulation_normalization="num_loss_tokens", emit_grad_norm_metrics=True
        )
        losses.append(passed.result().metrics["loss:sum"])
        assert stepped.result().metrics["grad_norm"] > 0
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]

    saved = client.save_weights_for_sampler_ext("step")
    assert saved.path == saved.snapshot_name
    before = client.forward([datum()], "cross_entropy").result()
    client.save_state("four").result()
    client.forward_backward([datum()], "cross_entropy").result()
    client.optim_step(ADAM).result()
    changed = client.forward([datum()], "cross_entropy").result()
    assert changed.metrics != before.metrics
    client.load_state_with_optimizer("four").result()
    after = client.forward([datum()], "cross_entropy").result()
    assert after.metrics == before.metrics
    assert client.list_checkpoints() == ["four"]

    with pytest.raises(Exception, match="sampler snapshot"):
        client.load_state(saved.path).result()
    with pytest.raises(Exception, match="saved ones: four"):
        client.load_state("five").result()
    with pytest.raises(Exception, match="four exists already"):
        client.save_state("four").result()
    client.unload_model().result()


def test_custom_loss_equals_the_built_in_one(url, connect):
    client = connect(url).create_training_client(BASE)

    def negative_log_likelihood(data, logprobs):
        loss = -torch.cat(logprobs).sum()
        return loss, {"mine:sum": loss.item()}

    custom = client.forward_backward_custom([datum(), datum(60)], negative_log_likelihood).result()
    norm = client.optim_step(types.AdamParams(learning_rate=0.0), emit_grad_norm_metrics=True).result()
    built_in = client.forward_backward([datum(), datum(60)], "cross_entropy").result()
    other = client.optim_step(types.AdamParams(learning_rate=0.0), emit_grad_norm_metrics=True).result()
    assert custom.metrics["mine:sum"] == pytest.approx(built_in.metrics["loss:sum"], rel=1e-6)
    assert norm.metrics["grad_norm"] == pytest.approx(other.metrics["grad_norm"], rel=1e-6)


def test_chunks_arrive_out_of_order_and_merge_in_order(url, connect):
    client = connect(url).create_training_client(BASE)
    data = [datum(first=5 + i % 200, length=2 + i % 3) for i in range(2100)]
    whole = client.forward(data, "cross_entropy").result()
    assert len(whole.loss_fn_outputs) == 2100
    for i in (0, 1023, 1024, 2099):
        alone = client.forward([data[i]], "cross_entropy").result()
        torch.testing.assert_close(
            whole.loss_fn_outputs[i]["logprobs"].to_torch(), alone.loss_fn_outputs[0]["logprobs"].to_torch()
        )


def test_two_sessions_share_the_live_weights(url, connect):
    first = connect(url).create_training_client(BASE)
    first.forward_backward([datum()], "cross_entropy").result()
    first.optim_step(ADAM).result()
    second = connect(url).create_training_client(BASE)
    assert (
        second.forward([datum()], "cross_entropy").result().metrics
        == first.forward([datum()], "cross_entropy").result().metrics
    )
    second.optim_step(ADAM).result()


def test_mistakes_fail_their_future_and_nothing_else(url, connect):
    client = connect(url).create_training_client(BASE)
    good = client.forward([datum()], "cross_entropy").result()
    mistakes = [
        (lambda: client.forward_backward([datum()], "nonsense"), "nonsense"),
        (lambda: client.forward_backward([datum()], "cross_entropy", {"tau": 1}), "tau"),
        (lambda: client.forward_backward([datum()], "ppo"), "logprobs"),
        (lambda: client.forward_backward([datum(first=5000)], "cross_entropy"), "vocabulary"),
        (lambda: client.forward_backward([datum(length=300)], "cross_entropy"), "context of 256"),
        (lambda: client.forward_backward([datum(weights=[1.0])], "cross_entropy"), "weights"),
        (lambda: client.optim_step(types.AdamParams(beta1=1.5)), "beta1"),
        (lambda: client.save_state("No Good"), "No Good"),
        (lambda: client.load_adapter("accounts/local/models/x"), "load_adapter"),
    ]
    for call, told in mistakes:
        with pytest.raises(Exception, match=told):
            call().result(timeout=30)
    assert client.forward([datum()], "cross_entropy").result().metrics == good.metrics


def test_adapters_of_one_job_do_not_touch_each_other(make_spec, serve, connect):
    service = connect(serve(make_spec(lora_rank=8)))
    one = service.create_lora_training_client(BASE, rank=4, seed=1)
    two = service.create_lora_training_client(BASE, rank=8, seed=2)
    reference = service.create_base_training_client(BASE)
    start = reference.forward([datum()], "cross_entropy").result().metrics
    assert one.forward([datum()], "cross_entropy").result().metrics == start
    for _ in range(3):
        one.forward_backward([datum()], "cross_entropy").result()
        one.optim_step(types.AdamParams(learning_rate=1e-2)).result()
    assert one.forward([datum()], "cross_entropy").result().metrics["loss:sum"] < start["loss:sum"]
    assert two.forward([datum()], "cross_entropy").result().metrics == start
    assert reference.forward([datum()], "cross_entropy").result().metrics == start
    with pytest.raises(Exception, match="frozen"):
        reference.forward_backward([datum()], "cross_entropy").result()
    with pytest.raises(Exception, match="rank: 16"):
        service.create_lora_training_client(BASE, rank=16)


def test_forward_only_job_computes_and_refuses_to_train(make_spec, serve, connect):
    client = connect(serve(make_spec(forward_only=True))).create_training_client(BASE)
    assert client.forward([datum()], "cross_entropy").result().metrics["loss:sum"] > 0
    with pytest.raises(Exception, match="frozen"):
        client.forward_backward([datum()], "cross_entropy").result()
    with pytest.raises(Exception, match="frozen"):
        client.optim_step(ADAM).result()


def test_throughput_mode_trains_models_of_many_clients_together(make_spec, serve, connect):
    """Two clients send at once, behind a long pass of a third: their requests share a pass, and learn as alone."""
    runtime = WorkerRuntime(socket="", token="", mode="throughput")
    url = serve(make_spec(lora_rank=4, runtime=runtime))
    clients = [connect(url).create_training_client(BASE, lora_rank=4) for _ in range(3)]
    together, losses = 0.0, []
    for _ in range(4):
        busy = clients[2].forward_backward([datum(length=200)] * 20, "cross_entropy")
        passed = [client.forward_backward([datum()], "cross_entropy") for client in clients[:2]]
        for client in clients[:2]:
            client.optim_step(ADAM).result()
        metrics = [future.result().metrics for future in passed]
        together = max(together, *(one.get("models_together:max", 1.0) for one in metrics))
        losses.append(sum(one["loss:sum"] for one in metrics))
        busy.result()
    assert together == 2
    assert losses == sorted(losses, reverse=True)


def test_a_full_trainer_makes_the_sdk_wait_and_nothing_is_lost(make_spec, serve, connect, monkeypatch):
    """Five requests at once where one has room: the SDK is told to come back, and the sequence has no hole."""
    small = "import firebox.trainer.session as s\ns.Session.__init__.__kwdefaults__['max_waiting_bytes'] = 100\n"
    statuses: list[int] = []
    send = httpx.AsyncClient.send

    async def noted(self: httpx.AsyncClient, request: httpx.Request, **options: object) -> httpx.Response:
        response = await send(self, request, **options)
        statuses.append(response.status_code)
        return response

    client = connect(serve(make_spec(), small)).create_training_client(BASE)
    monkeypatch.setattr(httpx.AsyncClient, "send", noted)
    passed = [client.forward_backward([datum(first, 100)] * 4, "cross_entropy") for first in range(5)]
    assert [future.result().metrics["loss:sum"] > 0 for future in passed] == [True] * 5
    assert client.optim_step(ADAM).result() is not None
    assert 429 in statuses


@pytest.mark.parametrize("rank", [0, 4])
def test_everything_is_saved_before_a_job_is_paused(make_spec, serve, connect, rank):
    url = serve(make_spec(lora_rank=rank))
    client = connect(url).create_training_client(BASE, lora_rank=rank)
    client.forward_backward([datum()], "cross_entropy").result()
    client.optim_step(ADAM).result()
    expected = client.forward([datum()], "cross_entropy").result().metrics
    (name,) = httpx.post(f"{url}/worker/save_all", timeout=60).json()["checkpoints"]
    client.optim_step(ADAM).result()
    client.load_state_with_optimizer(name).result()
    assert client.forward([datum()], "cross_entropy").result().metrics == expected


def test_a_silent_session_is_saved_and_unloaded(make_spec, serve, connect):
    quick = "import firebox.trainer.silence as s\ns.SILENCE_S = 1.0\n"
    url = serve(make_spec(lora_rank=4), quick)
    client = connect(url).create_training_client(BASE, lora_rank=4)
    for _ in range(2):
        client.forward_backward([datum()], "cross_entropy").result()
        client.optim_step(ADAM).result()
    expected = client.forward([datum()], "cross_entropy").result().metrics
    names: list[str] = []
    deadline = time.monotonic() + 20
    while not names and time.monotonic() < deadline:  # the SDK's heartbeat is slower than this trainer's patience
        time.sleep(0.2)
        names = httpx.get(f"{url}/api/v1/list_checkpoints").json()["checkpoints"]
    assert [name.startswith("silent-session-") for name in names] == [True]
    with pytest.raises(Exception, match="silent for too long"):
        client.forward([datum()], "cross_entropy").result()
    again = connect(url).create_training_client(BASE, lora_rank=4)
    again.load_state_with_optimizer(names[0]).result()
    assert again.forward([datum()], "cross_entropy").result().metrics == expected
