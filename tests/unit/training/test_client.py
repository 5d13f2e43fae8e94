"""`ReconnectableClient` against a real trainer over a socket: the published interface, both SDKs' types, deadlines."""

import inspect
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from training.utils import CheckpointError, ConfigError, ReconnectableClient, load_state
from training.utils.client import to_adam, to_datums
from training.utils.datums import build_datum

MODEL = "accounts/local/models/tiny"
TOKENS = [5, 6, 7, 8, 9, 10]


@pytest.fixture(scope="module")
def client(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReconnectableClient]:
    from fireworks.training.sdk import TrainerServiceEndpoint

    from firebox.trainer.server import build_app
    from firebox.wire.worker import TrainerSpec, WorkerRuntime

    jobs = tmp_path_factory.mktemp("jobs")
    name = "accounts/local/rlorTrainerJobs/job"
    spec = TrainerSpec(
        job=name,
        base_model=MODEL,
        model_dir=str(tiny_dir),
        job_dir=str(jobs / "job"),
        jobs_dir=str(jobs),
        max_context_length=64,
        runtime=WorkerRuntime(socket="", token=""),
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(build_app(spec), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    endpoint = TrainerServiceEndpoint(name, "job", f"http://127.0.0.1:{listener.getsockname()[1]}")
    # A resolved endpoint needs no manager: nothing is waited for.
    client = ReconnectableClient(None, "job", MODEL, fw_api_key="k", endpoint=endpoint)  # type: ignore[arg-type]
    yield client
    client.close()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def datum(weight: float = 1.0) -> Any:
    return build_datum(TOKENS, weights=[weight] * len(TOKENS))


def test_the_interface_is_the_published_one() -> None:
    parameters = inspect.signature(ReconnectableClient).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "rlor_mgr": inspect.Parameter.empty,
        "job_id": inspect.Parameter.empty,
        "base_model": inspect.Parameter.empty,
        "lora_rank": 0,
        "fw_api_key": None,
        "default_timeout": 600,
        "endpoint": None,
        "reconnect": False,
    }
    assert parameters["reconnect"].kind is inspect.Parameter.KEYWORD_ONLY
    methods = {
        "forward": ["data", "loss_fn"],
        "forward_backward": ["data", "loss_fn", "loss_fn_config"],
        "forward_backward_custom": ["data", "loss_fn"],
        "optim_step": ["params", "grad_accumulation_normalization"],
        "save_state": ["name", "timeout"],
        "load_state_with_optimizer": ["path", "timeout"],
        "save_weights_for_sampler_ext": ["name", "checkpoint_type", "timeout"],
        "resolve_checkpoint_path": ["name", "source_job_id"],
        "list_checkpoints": [],
    }
    for name, expected in methods.items():
        assert list(inspect.signature(getattr(ReconnectableClient, name)).parameters)[1:] == expected
    for name in ("save_state", "load_state_with_optimizer"):
        assert inspect.signature(getattr(ReconnectableClient, name)).parameters["timeout"].default == 2700
    assert all(isinstance(getattr(ReconnectableClient, name), property) for name in ("inner", "endpoint", "job_id"))


def test_a_key_is_required(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set FIREWORKS_API_KEY"):
        ReconnectableClient(None, "job", MODEL)  # type: ignore[arg-type]


def test_types_of_the_tinker_package_mean_the_same(client: ReconnectableClient) -> None:
    import tinker

    foreign = tinker.Datum(
        model_input=tinker.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={
            "target_tokens": tinker.TensorData(data=TOKENS[1:], dtype="int64", shape=[5]),
            "weights": tinker.TensorData(data=[1.0] * 5, dtype="float32", shape=[5]),
        },
    )
    own = datum()
    assert to_datums([own]) == [own]
    assert client.forward([foreign]).metrics == client.forward([own]).metrics
    from fireworks.training import tinker as fireworks_tinker

    same = fireworks_tinker.AdamParams(learning_rate=0.5)
    assert to_adam(same) is same
    adam = to_adam(tinker.AdamParams(learning_rate=0.5, beta2=0.9))
    assert (adam.learning_rate, adam.beta2) == (0.5, 0.9)


def test_a_custom_loss_has_the_gradient_of_the_same_built_in_loss(client: ReconnectableClient) -> None:
    def negative_log_likelihood(data: Any, logprobs: Any) -> Any:
        return -sum(values.sum() for values in logprobs), {}

    norms = []
    for backward in (
        lambda: client.forward_backward([datum()]),
        lambda: client.forward_backward_custom([datum()], negative_log_likelihood),
    ):
        backward()
        # A learning rate of zero reads the gradient and leaves the weights as they are.
        from fireworks.training.sdk.types import AdamParams

        adam = AdamParams(learning_rate=0.0, emit_grad_norm_metrics=True)
        norms.append(client.optim_step(adam).metrics["grad_norm"])
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)


def test_a_state_is_saved_listed_and_restored(client: ReconnectableClient) -> None:
    import tinker

    before = client.forward([datum()]).metrics["loss:sum"]
    assert client.save_state("before").path.endswith("before")
    client.forward_backward([datum()])
    client.optim_step(tinker.AdamParams(learning_rate=1e-2))
    assert client.forward([datum()]).metrics["loss:sum"] < before
    assert client.list_checkpoints() == ["before"]
    path = client.resolve_checkpoint_path("before", source_job_id=client.job_id)
    assert path == "cross_job://job/before"
    client.load_state_with_optimizer(path)
    assert client.forward([datum()]).metrics["loss:sum"] == before
    assert client.save_weights_for_sampler_ext("final", "base").snapshot_name.startswith("final-")


def test_failures_reach_the_caller_and_the_client_goes_on(client: ReconnectableClient) -> None:
    from fireworks.training.sdk import RequestFailedError

    with pytest.raises(RequestFailedError, match="no_such_loss"):
        client.forward_backward([datum()], "no_such_loss")
    with pytest.raises(CheckpointError, match=r"'cross_job://job/nothing' cannot be loaded: .*before") as caught:
        load_state(client, "cross_job://job/nothing", 60, with_optimizer=True)
    assert "request_id" not in str(caught.value)
    assert client.forward([datum()]).metrics["loss:sum"] > 0


def test_a_deadline_names_the_call_and_the_job(client: ReconnectableClient) -> None:
    def slow(data: Any, logprobs: Any) -> Any:
        time.sleep(0.5)
        return -logprobs[0].sum(), {}

    client.default_timeout, usual = 0.05, client.default_timeout  # type: ignore[assignment]
    try:
        with pytest.raises(TimeoutError, match=r"forward_backward_custom on trainer job gave no result in 0\.05 s"):
            client.forward_backward_custom([datum()], slow)
    finally:
        client.default_timeout = usual
