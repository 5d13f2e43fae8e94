"""The genuine, unmodified Tinker SDK samples at the server's root: whose weights answer, and how the answers travel."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import tinker
from running import RunningServer
from tinker import types

ADAM = types.AdamParams(learning_rate=1e-2)
ONE = types.SamplingParams(max_tokens=1)
IDLE_S = 3.0

# The real composition root with another command behind the launcher: only the samplers' models are missing.
SERVER = """
import functools, sys
from pathlib import Path
from firebox.cli import up
from firebox.launch.local import LocalLauncher
up.LocalLauncher = functools.partial(LocalLauncher, command=[sys.executable, sys.argv[2]])
up.run(Path(sys.argv[1]), "127.0.0.1", 0, [], float(sys.argv[3]))
"""

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class StubbedServer(RunningServer):
    @property
    def command_line(self) -> list[str]:
        stub = Path(__file__).with_name("sampler_stub.py")
        return [sys.executable, "-c", SERVER, str(self.data), str(stub), str(IDLE_S)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    stubbed = StubbedServer(tmp_path_factory.mktemp("stubbed") / "data")
    stubbed.command("models", "make-tiny", "tiny")
    yield stubbed
    stubbed.end()


@pytest.fixture
def service(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[tinker.ServiceClient]:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with tinker.ServiceClient(base_url=server.url, api_key=f"tml-{server.key}") as client:
        yield client


def prompt(*tokens: int) -> types.ModelInput:
    return types.ModelInput.from_ints(list(tokens))


def step_of(client: tinker.SamplingClient) -> int:
    (sequence,) = client.sample(prompt(1, 2), 1, ONE).result().sequences
    return sequence.tokens[0]


def test_two_samplers_of_two_steps_answer_differently_for_ever(service):
    trainer = service.create_lora_training_client("tiny", rank=2).result()
    samplers = []
    for _ in range(2):
        trainer.optim_step(ADAM).result()
        samplers.append(trainer.save_weights_and_get_sampling_client().result())
    assert [step_of(sampler) for sampler in samplers] == [1, 2]

    trainer.optim_step(ADAM).result()
    named = trainer.save_weights_for_sampler("third").result().path
    third, base = (
        service.create_sampling_client(named).result(),
        service.create_sampling_client(base_model="tiny").result(),
    )
    assert [step_of(sampler) for sampler in (*samplers, third, base)] == [1, 2, 3, 0]


def test_everything_about_a_sample_arrives(service):
    client = service.create_sampling_client(base_model="tiny").result()
    answer = client.sample(prompt(5, 6, 7), 3, ONE, include_prompt_logprobs=True, topk_prompt_logprobs=1).result()
    assert [sequence.tokens for sequence in answer.sequences] == [[0]] * 3
    assert len({sequence.sequence_id for sequence in answer.sequences}) == 3
    assert answer.sequences[0].logprobs == [-0.5]
    assert answer.sequences[0].stop_reason == "stop"
    assert answer.prompt_logprobs == [None, -6.0, -7.0]
    assert answer.topk_prompt_logprobs == [None, [(6, -0.25)], [(7, -0.25)]]
    assert client.compute_logprobs(prompt(5, 6, 7)).result() == [None, -6.0, -7.0]


def test_older_clients_get_json(server, service):
    client = service.create_sampling_client(base_model="tiny").result()
    order = {
        "sampling_session_id": client._sampling_session_id,
        "seq_id": 77,
        "num_samples": 1,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [1]}]},
        "sampling_params": {},
    }
    promises = [server.ask("POST", "/api/v1/asample", json=order).json() for _ in range(2)]
    assert promises[0] == promises[1], "the same request again is the same request"
    answer = server.ask("POST", "/api/v1/retrieve_future", json=promises[0]).json()
    assert answer["sequences"] == [{"stop_reason": "stop", "tokens": [0], "logprobs": [-0.5]}]


def test_mistakes_are_told(server, service):
    trainer = service.create_lora_training_client("tiny", rank=2).result()
    state = trainer.save_state("state").result().path
    for path, told in (
        (state, "save_weights_for_sampler first"),
        (f"tinker://{trainer.model_id}/sampler_weights/none", "does not exist"),
        ("tinker://x/sampler_weights/y", "is not a checkpoint"),
    ):
        with pytest.raises(tinker.APIStatusError, match=told):
            service.create_sampling_client(path).result()
    with pytest.raises(tinker.APIStatusError, match="known names: tiny"):
        service.create_sampling_client(base_model="nobody/knows").result()
    client = service.create_sampling_client(base_model="tiny").result()
    with pytest.raises(tinker.RequestFailedError, match="9 is not my number"):
        client.sample(prompt(9), 1, ONE).result()
    assert step_of(client) == 0


def test_many_samples_at_once(service):
    client = service.create_sampling_client(base_model="tiny").result()
    asked = [client.sample(prompt(1, i), 2, ONE, include_prompt_logprobs=True) for i in range(200)]
    assert [future.result().prompt_logprobs[1] for future in asked] == [-float(i) for i in range(200)]


def test_sampler_is_known_by_what_it_stands_for(server, service):
    rest = tinker.RestClient(base_url=server.url, api_key=f"tml-{server.key}")
    trainer = service.create_lora_training_client("tiny", rank=2).result()
    path = trainer.save_weights_for_sampler("known").result().path
    client = service.create_sampling_client(path).result()
    shown = rest.get_sampler(client._sampling_session_id).result()
    assert (shown.base_model, shown.model_path) == ("tiny", path)
    session = rest.get_session(service.holder.get_session_id()).result()
    assert session.sampler_ids == [client._sampling_session_id]


def test_unused_sampler_is_stopped_and_comes_back(server, service):
    client = service.create_sampling_client(base_model="tiny").result()
    assert step_of(client) == 0
    deadline = time.monotonic() + 10 * IDLE_S
    while server.workers():
        assert time.monotonic() < deadline, "the idle sampler was not stopped"
        time.sleep(0.1)
    assert step_of(client) == 0
    deployments = server.ask("GET", "/v1/accounts/local/deployments").json()["deployments"]
    assert deployments == []


def test_wrong_key_is_refused(server):
    answer = httpx.post(f"{server.url}/api/v1/asample", headers={"X-API-Key": "tml-wrong"}, json={})
    assert answer.status_code == 401


def test_a_save_that_is_sent_again_is_the_same_although_the_sdk_counts_on(server, service):
    """The SDK takes the next number of a sampler when it sends an unnamed save again; its place stays the same."""
    trainer = service.create_lora_training_client("tiny", rank=2).result()
    order = {"model_id": trainer.model_id, "seq_id": 1, "type": "save_weights_for_sampler"}
    sent = [
        server.ask("POST", "/api/v1/save_weights_for_sampler", json=order | {"sampling_session_seq_id": number}).json()
        for number in (70, 71)
    ]
    assert sent[0] == sent[1]
    result = server.ask("POST", "/api/v1/retrieve_future", json=sent[1]).json()
    assert result["sampling_session_id"].endswith(":70")
