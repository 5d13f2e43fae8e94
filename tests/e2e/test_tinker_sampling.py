"""The Tinker SDK trains and samples on one server: each handle answers with its own weights, for ever."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import tinker
from proofs import Record, count
from running import RunningServer
from tinker import types

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def datum(tokens: list[int]) -> types.Datum:
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={
            "target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[len(tokens) - 1]),
            "weights": types.TensorData(data=[1.0] * (len(tokens) - 1), dtype="float32", shape=[len(tokens) - 1]),
        },
    )


@pytest.mark.prove
def test_two_handles_of_two_steps_answer_differently_and_for_ever(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    """Sampled log-probs and prompt log-probs of each handle equal the trainer's of that step to 1e-5."""
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        service = tinker.ServiceClient(base_url=server.url, api_key=f"tml-{server.key}")
    client = service.create_lora_training_client("tiny", rank=8, seed=0).result()
    base = service.create_sampling_client(base_model="tiny")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 1000, rng.integers(2, 40)).tolist() for _ in range(count(4, 50))]
    params = types.SamplingParams(max_tokens=12, temperature=0.8, seed=1)

    def ask(handle: tinker.SamplingClient, prompt: list[int]) -> types.SampleResponse:
        asked = types.ModelInput.from_ints(prompt)
        return handle.sample(asked, 1, params, include_prompt_logprobs=True).result()

    handles, answers, worst = [base], [[ask(base, prompt) for prompt in prompts]], 0.0
    for step in range(2):
        client.forward_backward([datum(rng.integers(0, 1000, 30).tolist())], "cross_entropy").result()
        client.optim_step(types.AdamParams(learning_rate=1e-2)).result()
        handles.append(client.save_weights_and_get_sampling_client(f"step-{step}"))
        answers.append([ask(handles[-1], prompt) for prompt in prompts])
        rows = [p + a.sequences[0].tokens for p, a in zip(prompts, answers[-1], strict=True)]
        outputs = client.forward([datum(row) for row in rows], "cross_entropy").result().loss_fn_outputs
        for prompt, answer, output in zip(prompts, answers[-1], outputs, strict=True):
            trained = np.asarray(output["logprobs"].data)
            sampled = [*answer.prompt_logprobs[1:], *answer.sequences[0].logprobs]
            assert len(trained) == len(sampled) == len(prompt) + len(answer.sequences[0].tokens) - 1
            worst = max(worst, float(np.abs(trained - np.asarray(sampled)).max()))
    record("sequences", 2 * len(prompts))
    record("largest difference between sampler and trainer, nats", worst)
    assert worst <= 1e-5

    for handle, before in zip(handles, answers, strict=True):
        after = [ask(handle, prompt) for prompt in prompts]
        assert [a.sequences[0].tokens for a in after] == [b.sequences[0].tokens for b in before]
        scored = handle.compute_logprobs(types.ModelInput.from_ints(prompts[0])).result()
        assert scored[1:] == pytest.approx(before[0].prompt_logprobs[1:], abs=1e-5)
    drawn = [[a.sequences[0].logprobs for a in of_handle] for of_handle in answers]
    assert drawn[0] != drawn[1] != drawn[2]
    service.close("success").result()
