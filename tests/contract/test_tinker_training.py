"""The genuine, unmodified Tinker SDK trains at the server's root, where there are no jobs."""

from __future__ import annotations

import io
import json
import os
import signal
import sqlite3
import tarfile
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import tinker
from running import RunningServer, running
from safetensors.torch import load_file
from tinker import types

ADAM = types.AdamParams(learning_rate=1e-2)
HUB_NAME = "Some-Lab/Tiny-0.1B"

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def datum(first: int = 5, length: int = 24) -> types.Datum:
    tokens = list(range(first, first + length + 1))
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[length]),
            "weights": types.TensorData(data=[1.0] * length, dtype="float32", shape=[length]),
        },
    )


def train(client: tinker.TrainingClient, *data: types.Datum) -> float:
    """One step; the loss before it."""
    passed, stepped = client.forward_backward(list(data), "cross_entropy"), client.optim_step(ADAM)
    stepped.result()
    return passed.result().metrics["loss:sum"]


def loss(client: tinker.TrainingClient, *data: types.Datum) -> float:
    return client.forward(list(data), "cross_entropy").result().metrics["loss:sum"]


def open_service(server: RunningServer, **options: str) -> tinker.ServiceClient:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tinker.ServiceClient(base_url=server.url, api_key=f"tml-{server.key}", **options)


@pytest.fixture(autouse=True)
def no_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")


@pytest.fixture
def connect(server: RunningServer) -> Iterator[Callable[[], tinker.ServiceClient]]:
    made = []

    def connect() -> tinker.ServiceClient:
        made.append(open_service(server))
        return made[-1]

    yield connect
    for service in made:
        service.close("success").result()


@pytest.fixture
def rest(server: RunningServer) -> tinker.RestClient:
    return tinker.RestClient(base_url=server.url, api_key=f"tml-{server.key}")


def test_two_runs_of_different_rank_do_not_touch_each_other(connect):
    first, second = connect(), connect()
    small = first.create_lora_training_client("tiny", rank=2, seed=1, train_unembed=False).result()
    large = second.create_lora_training_client("accounts/local/models/tiny", rank=16, seed=2).result()
    assert (small.get_info().lora_rank, large.get_info().lora_rank) == (2, 16)
    mixed = [(train(small, datum()), train(large, datum(60))) for _ in range(3)]
    assert mixed[0][0] > mixed[2][0]
    assert mixed[0][1] > mixed[2][1]

    alone = second.create_lora_training_client("tiny", rank=16, seed=2).result()
    assert [train(alone, datum(60)) for _ in range(3)] == [large_loss for _, large_loss in mixed]
    assert loss(alone, datum(60)) == loss(large, datum(60))


def test_samples_come_from_the_weights_that_were_trained(connect):
    service = connect()
    client = service.create_lora_training_client("tiny", rank=4, seed=3).result()
    tokens = list(range(5, 30))
    trained, sampled = [], []
    samplers = []
    for _ in range(2):
        train(client, datum())
        passed = client.forward([datum()], "cross_entropy").result()
        trained.append(passed.loss_fn_outputs[0]["logprobs"].data)
        samplers.append(client.save_weights_and_get_sampling_client().result())
    for sampler in samplers:
        sampled.append(sampler.compute_logprobs(types.ModelInput.from_ints(tokens)).result())
    for ours, theirs in zip(trained, sampled, strict=True):
        assert theirs[0] is None
        assert theirs[1:] == pytest.approx(ours, abs=1e-5)
    assert sampled[0] != sampled[1]


def test_saved_state_goes_on_as_if_nothing_had_happened(connect):
    service = connect()
    client = service.create_lora_training_client("tiny", rank=4, seed=3).result()
    train(client, datum())
    client.forward_backward([datum(40)], "cross_entropy").result()  # a pending gradient is part of the state
    saved = client.save_state("half-way").result()
    assert saved.path == f"tinker://{client.model_id}/weights/half-way"

    twin = service.create_training_client_from_state_with_optimizer(saved.path).result()
    fresh = service.create_training_client_from_state(saved.path).result()
    assert twin.get_info().lora_rank == 4
    assert loss(fresh, datum()) == loss(twin, datum()) == loss(client, datum())
    for other in (client, twin, fresh):
        train(other, datum())
    assert loss(twin, datum()) == loss(client, datum())
    assert loss(fresh, datum()) != loss(client, datum())

    client.load_state_with_optimizer(saved.path).result()
    train(client, datum())
    assert loss(client, datum()) == loss(twin, datum())


def test_mistakes_fail_their_future_and_nothing_else(connect):
    service = connect()
    client = service.create_lora_training_client("tiny", rank=4, seed=3).result()
    weights = client.save_weights_for_sampler("weights").result().path
    client.save_state("taken").result()
    mistakes = [
        (lambda: client.save_state("No Good"), "No Good"),
        (lambda: client.save_state("parked-1"), "the server's own"),
        (lambda: client.save_weights_external("x", age_encryption_recipients=["age1x"]), "not encrypted"),
        (lambda: client.save_state("taken"), "exists already"),
        (lambda: client.load_state(weights), "save_state makes a checkpoint"),
        (lambda: client.load_state(f"tinker://{client.model_id}/weights/nothing"), "weights/taken"),
        (lambda: client.load_state("tinker://../../etc/passwd"), "is not a checkpoint"),
        (lambda: client.load_state("/etc/passwd"), "is not a checkpoint"),
        (lambda: client.forward_backward([datum(first=5000)], "cross_entropy"), "vocabulary"),
        (lambda: service.create_lora_training_client("nobody/knows", rank=4), "known names: tiny"),
        (lambda: service.create_lora_training_client("tiny", rank=4000), "1024"),
        (lambda: service.create_training_client_from_state(weights), "save_state makes a checkpoint"),
        (lambda: service.create_lora_training_client("tiny", optimizer=types.DimuonOptimizerConfig()), "dimuon"),
    ]
    for mistake, told in mistakes:
        with pytest.raises(tinker.RequestFailedError, match=told) as failure:
            mistake().result()
        assert failure.value.category.value == "user"
    before = loss(client, datum())
    train(client, datum())
    assert loss(client, datum()) < before


def test_model_answers_to_its_hub_name(server, connect, rest):
    server.command("models", "alias", "tiny", HUB_NAME)
    names = [model.model_name for model in rest.get_server_capabilities().result().supported_models]
    assert {"tiny", HUB_NAME} <= set(names)
    client = connect().create_lora_training_client(HUB_NAME, rank=2).result()
    assert client.get_info().model_data.model_name == HUB_NAME
    assert client.get_tokenizer().encode("abc")
    assert "no-slash" in server.ask("PATCH", "/v1/accounts/local/models/tiny", json={"aliases": ["no-slash"]}).text


def test_wrong_key_is_refused(server):
    for key in ("tml-wrong", "wrong"):
        answer = httpx.get(f"{server.url}/api/v1/get_server_capabilities", headers={"X-API-Key": key})
        assert answer.status_code == 401
    with pytest.raises(tinker.APIStatusError, match="key is missing or wrong"):
        tinker.ServiceClient(base_url=server.url, api_key="tml-wrong").create_lora_training_client("tiny").result()


def test_finished_session_is_over(server, connect):
    service = open_service(server)
    client = service.create_lora_training_client("tiny", rank=2).result()
    session = service.holder.get_session_id()
    service.close("success").result()
    assert server.ask("POST", "/api/v1/session_heartbeat", json={"session_id": session}).status_code == 410
    order = {"model_id": client.model_id, "seq_id": 1, "adam_params": {}}
    promise = server.ask("POST", "/api/v1/optim_step", json=order).json()
    told = server.ask("POST", "/api/v1/retrieve_future", json=promise).json()
    assert "finished" in told["error"]


def test_pool_is_not_among_the_users_jobs(server, connect):
    connect().create_lora_training_client("tiny", rank=2).result()
    jobs = server.ask("GET", "/v1/accounts/local/rlorTrainerJobs").json()["rlorTrainerJobs"]
    pools = server.ask("GET", "/v1/accounts/local/rlorTrainerJobs?pooled=true").json()["rlorTrainerJobs"]
    assert [job["name"] for job in jobs if "/pool-" in job["name"]] == []
    assert len(pools) == 1
    refused = server.ask("DELETE", f"/v1/{pools[0]['name']}")
    assert "the server's own" in refused.json()["error"]["message"]


def test_records_outlive_workers(server, connect, rest):
    service = connect()
    client = service.create_lora_training_client("tiny", rank=4, user_metadata={"note": "first"}).result()
    state = client.save_state("one_0.5", ttl_seconds=7200, user_metadata={"step": "1"}).result().path
    weights = client.save_weights_for_sampler("one").result().path

    run = rest.get_training_run(client.model_id).result()
    assert (run.base_model, run.lora_rank, run.user_metadata) == ("tiny", 4, {"note": "first"})
    assert run.last_checkpoint.tinker_path == state
    assert run.last_sampler_checkpoint.tinker_path == weights
    listed = rest.list_training_runs(limit=1).result()
    assert [found.training_run_id for found in listed.training_runs] == [client.model_id]
    assert listed.cursor.total_count >= 1
    found = {c.tinker_path: c for c in rest.list_checkpoints(client.model_id).result().checkpoints}
    assert set(found) == {state, weights}
    assert found[state].user_metadata == {"step": "1"}
    assert found[state].expires_at is not None
    assert found[weights].expires_at is None
    assert {state, weights} <= {c.tinker_path for c in rest.list_user_checkpoints().result().checkpoints}
    info = rest.get_weights_info_by_tinker_path(state).result()
    assert (info.base_model, info.lora_rank, info.train_attn) == ("tiny", 4, True)
    session = service.holder.get_session_id()
    assert session in rest.list_sessions().result().sessions
    assert rest.get_session(session).result().training_run_ids == [client.model_id]

    rest.set_checkpoint_ttl_from_tinker_path(state, None).result()
    rest.set_checkpoint_ttl_from_tinker_path(weights, 3600).result()
    found = {c.tinker_path: c for c in rest.list_checkpoints(client.model_id).result().checkpoints}
    assert found[state].expires_at is None
    assert found[weights].expires_at is not None
    with pytest.raises(tinker.BadRequestError, match="nobody to publish to"):
        rest.publish_checkpoint_from_tinker_path(state).result()
    rest.unpublish_checkpoint_from_tinker_path(state).result()
    rest.delete_checkpoint_from_tinker_path(weights).result()
    assert [c.tinker_path for c in rest.list_checkpoints(client.model_id).result().checkpoints] == [state]
    rest.delete_checkpoint_from_tinker_path(weights).result()  # a client whose connection broke asks again
    with pytest.raises(tinker.NotFoundError, match="does not exist"):
        rest.delete_checkpoint_from_tinker_path(f"{weights}-other").result()
    _expire(server, state)
    assert rest.list_checkpoints(client.model_id).result().checkpoints == []
    with pytest.raises(tinker.RequestFailedError, match="does not exist"):
        service.create_training_client_from_state(state).result()
    assert client.save_state("one_0.5").result().path == state, "its name is free again"
    with pytest.raises(tinker.NotFoundError, match="does not exist"):
        rest.get_training_run("session-0:train:0").result()


def _expire(server: RunningServer, path: str) -> None:
    """Let the time to live of a checkpoint be over; the shortest one that clients may ask for is an hour."""
    with sqlite3.connect(server.data / "firebox.db") as database:
        database.execute("UPDATE run_checkpoints SET expires_at = '2020-01-01T00:00:00Z' WHERE id = ?", (path,))


def test_adapter_can_be_taken_away_without_a_key(server, connect, rest, tmp_path):
    client = connect().create_lora_training_client("tiny", rank=4).result()
    train(client, datum())
    path = client.save_weights_external("gift").result().path
    assert path == f"tinker://{client.model_id}/external_weights/gift"
    offered = rest.get_external_weights_urls(path).result()
    assert set(offered.urls) == {"adapter_config.json", "adapter_model.safetensors"}
    for name, url in offered.urls.items():
        urllib.request.urlretrieve(url, tmp_path / name)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 4
    assert load_file(tmp_path / "adapter_model.safetensors")

    weights = client.save_weights_for_sampler("gift").result().path
    assert [c.tinker_path for c in rest.list_checkpoints(client.model_id).result().checkpoints] == [path, weights]
    place = f"/api/v1/training_runs/{client.model_id}/checkpoints/sampler_weights/gift"
    url = server.ask("GET", f"{place}/archive").json()["url"]  # what older clients ask for
    with urllib.request.urlopen(url) as answer, tarfile.open(fileobj=io.BytesIO(answer.read())) as archive:
        assert archive.getnames() == ["adapter_config.json", "adapter_model.safetensors"]
    deadline = time.monotonic() + 10
    while list((server.data / "staging").iterdir()):  # the server tidies up once the last byte is out
        assert time.monotonic() < deadline, "the archive stays behind"
        time.sleep(0.05)

    for other in ("manifest.json", "%2e%2e/%2e%2e/firebox.db", "..%2f..%2f..%2ffirebox.db", ""):
        assert httpx.get(f"{url.rpartition('/')[0]}/{other}").status_code in (401, 404)
    assert httpx.get(url.replace("/downloads/", "/downloads/x")).status_code == 401
    client.save_state("gift").result()
    refused = server.ask("GET", f"{place.replace('sampler_weights', 'weights')}/archive")
    assert "training state" in refused.json()["error"]["message"]


def test_parked_run_comes_back(tmp_path: Path):
    with running(tmp_path, "--idle-minutes", "0.02") as server:
        rest = tinker.RestClient(base_url=server.url, api_key=f"tml-{server.key}")
        service = open_service(server)
        client, steady = (service.create_lora_training_client("tiny", rank=4, seed=5).result() for _ in range(2))
        for model in (client, steady):
            train(model, datum())
            model.forward_backward([datum(40)], "cross_entropy").result()
        expected = [train(steady, datum()) for _ in range(3)]
        deadline = time.monotonic() + 30
        while server.workers():  # the SDK's heartbeat is slower than this server's patience
            assert time.monotonic() < deadline, "the idle trainer was not stopped"
            time.sleep(0.1)
        assert [train(client, datum()) for _ in range(3)] == expected
        assert rest.list_checkpoints(client.model_id).result().checkpoints == []
        service.close("success").result()
        own = [path.name for path in server.data.glob("jobs/local/pool-*/checkpoints/*")]
        assert own == [], "what the server saved for itself stays behind"


def test_run_outlives_servers_and_a_lost_one_says_so(tmp_path: Path):
    with running(tmp_path) as server:
        service = open_service(server)
        client = service.create_lora_training_client("tiny", rank=4, seed=5).result()
        losses = [train(client, datum())]
        workers = server.workers()
        for end in (signal.SIGKILL, signal.SIGTERM):
            server.end(end)
            server.options = ("--port", server.url.rpartition(":")[2])
            server.start()
            losses.append(train(client, datum()))
            assert (server.workers() == workers) == (end == signal.SIGKILL)
        assert losses == sorted(losses, reverse=True)

        state = client.save_state("safe").result().path
        (pid,) = server.workers()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(tinker.RequestFailedError, match=r"may have ended|was lost"):
            client.optim_step(ADAM).result()
        with pytest.raises(tinker.RequestFailedError, match=r"create a training client from tinker://.*/weights/safe"):
            client.optim_step(ADAM).result()
        resumed = service.create_training_client_from_state_with_optimizer(state).result()
        assert train(resumed, datum()) < losses[-1]
        service.close("success").result()
