"""The inference plane over a socket, with the genuine sampler client and by hand."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
import torch
from fireworks.training.sdk.sampling import DeploymentSampler
from transformers import AutoModelForCausalLM, AutoTokenizer

from firebox.modeling.attention import PackedCausal
from firebox.modeling.causal_lm import logprobs_of, packed_positions

from .conftest import make_spec, serving

PROMPT = [11, 22, 33, 44, 55]


def complete(client: httpx.Client, **fields: object) -> dict:
    body = {"prompt": PROMPT, "max_tokens": 12, "raw_output": True, "logprobs": True} | fields
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids_of(choice: dict) -> list[int]:
    return choice["raw_output"]["completion_token_ids"]


def rows_of(choice: dict, field: str = "logprob") -> list[float]:
    return [row[field] for row in choice["logprobs"]["content"]]


def reference(lm, prompt: list[int], completion: list[int]) -> torch.Tensor:
    tokens = torch.tensor(prompt + completion)
    with torch.inference_mode():
        hidden = lm.hidden(tokens, packed_positions([len(tokens)]), PackedCausal([len(tokens)]))
        return logprobs_of(lm.logits(hidden[:-1]), tokens[1:])


def sampler(client: httpx.Client, tokenizer=None) -> DeploymentSampler:
    url = str(client.base_url)
    return DeploymentSampler(inference_url=url, model="accounts/local/deployments/d", api_key="x", tokenizer=tokenizer)


def test_logprobs_equal_a_full_forward_in_ragged_company(client, lm):
    """More sequences than slots, all lengths different, joining and leaving at different steps."""
    prompts = [[(7 * i + j) % 1000 for j in range(3 + 5 * i)] for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        jobs = [
            pool.submit(complete, client, prompt=p, max_tokens=3 + 4 * i, ignore_eos=True, n=1 + i % 3)
            for i, p in enumerate(prompts)
        ]
        answers = [job.result() for job in jobs]
    for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        assert len(answer["choices"]) == 1 + i % 3
        for choice in answer["choices"]:
            assert len(ids_of(choice)) == 3 + 4 * i
            full = reference(lm, prompt, ids_of(choice))[len(prompt) - 1 :]
            assert (full - torch.tensor(rows_of(choice))).abs().max() <= 1e-5


def test_logprobs_equal_plain_transformers(client, model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    choice = complete(client, max_tokens=40, ignore_eos=True, echo=True)["choices"][0]
    tokens = torch.tensor([ids_of(choice)])
    with torch.inference_mode():
        plain = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    assert (plain - torch.tensor(rows_of(choice)[1:])).abs().max() <= 1e-5


def test_greedy_equals_plain_generate(client, model_dir):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    want = model.generate(torch.tensor([PROMPT]), max_new_tokens=30, do_sample=False, eos_token_id=None)
    choice = complete(client, temperature=0, max_tokens=30, ignore_eos=True)["choices"][0]
    assert ids_of(choice) == want[0, len(PROMPT) :].tolist()
    assert set(rows_of(choice, "sampling_logprob")) == {0.0}


def test_a_seed_gives_the_same_tokens_alone_and_in_company(client):
    alone = complete(client, seed=7, n=3, max_tokens=20)
    others = [{"prompt": [i + 1] * (i + 2), "max_tokens": 5 * i + 5} for i in range(5)]
    with ThreadPoolExecutor(6) as pool:
        noise = [pool.submit(complete, client, **other) for other in others]
        again = complete(client, seed=7, n=3, max_tokens=20)
        for job in noise:
            job.result()
    assert [ids_of(c) for c in alone["choices"]] == [ids_of(c) for c in again["choices"]]
    assert len({tuple(ids_of(c)) for c in alone["choices"]}) == 3
    assert ids_of(complete(client, seed=8, max_tokens=20)["choices"][0]) != ids_of(alone["choices"][0])


def test_stop_id_stays_in_the_ids_and_leaves_the_text(client):
    free = complete(client, seed=3, ignore_eos=True)["choices"][0]
    stop = ids_of(free)[4]
    end = ids_of(free).index(stop) + 1
    choice = complete(client, seed=3, stop_token_ids=[stop], ignore_eos=True)["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert ids_of(choice) == ids_of(free)[:end]
    assert len(rows_of(choice)) == end
    assert free["text"].startswith(choice["text"])


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_ends_at_its_token_and_is_cut_from_the_text(client, stream):
    free = complete(client, seed=5, max_tokens=40, ignore_eos=True)["choices"][0]
    stop = free["text"][10:13]
    assert "�" not in stop, "pick another seed: this text has no whole characters there"
    want = free["text"][: free["text"].index(stop)]
    body = {"prompt": PROMPT, "max_tokens": 40, "seed": 5, "ignore_eos": True, "stop": [stop], "raw_output": True}
    if stream:
        chunks = stream_chunks(client, body)
        text, last = "".join(c["choices"][0]["text"] for c in chunks), chunks[-1]["choices"][0]
    else:
        last = complete(client, **body)["choices"][0]
        text = last["text"]
    assert text == want
    assert last["finish_reason"] == "stop"
    assert ids_of(last) == ids_of(free)[: len(ids_of(last))]


def stream_chunks(client: httpx.Client, body: dict, path: str = "/v1/completions") -> list[dict]:
    response = client.post(path, json=body | {"stream": True})
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_a_stream_adds_up_to_the_whole_answer(client):
    body = {"seed": 11, "n": 2, "max_tokens": 50, "ignore_eos": True, "logprobs": True, "raw_output": True}
    whole = complete(client, **body, echo=True)
    chunks = stream_chunks(client, {"prompt": PROMPT, "echo": True} | body)
    assert len(chunks) > 4
    for index, choice in enumerate(whole["choices"]):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        rows = [row for part in parts for row in part["logprobs"]["content"]]
        assert [row["token_id"] for row in rows] == ids_of(choice) == ids_of(parts[-1])
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert chunks[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize("echo_last", [0, 2, 99])
def test_echo_last_puts_the_end_of_the_prompt_in_front(client, echo_last):
    choice = complete(client, echo_last=echo_last, max_tokens=4, ignore_eos=True)["choices"][0]
    count = min(echo_last, len(PROMPT))
    assert ids_of(choice)[:count] == PROMPT[len(PROMPT) - count :]
    assert len(rows_of(choice)) == count + 4


def test_echo_without_new_tokens_scores_the_prompt(client, lm):
    choice = complete(client, echo=True, max_tokens=0, top_logprobs=3)["choices"][0]
    assert ids_of(choice) == PROMPT
    assert rows_of(choice)[0] == 0.0
    assert (reference(lm, PROMPT, []) - torch.tensor(rows_of(choice)[1:])).abs().max() <= 1e-5
    assert [len(row["top_logprobs"]) for row in choice["logprobs"]["content"]] == [1, 3, 3, 3, 3]


def test_genuine_client_samples_with_tokens_and_logprobs(client, lm, model_dir):
    tokenizer = AutoTokenizer.from_pretrained(model_dir)

    async def run():
        async with asyncio.timeout(60):
            return await sampler(client, tokenizer).sample_with_tokens(
                messages=[{"role": "user", "content": "reverse abc"}],
                n=4, max_tokens=16, temperature=0.7, top_p=0.9, top_k=50, logprobs=True, top_logprobs=2, echo=True,
            )  # fmt: skip

    completions = asyncio.run(run())
    assert len(completions) == 4
    for c in completions:
        assert c.completion_len <= 16
        assert c.finish_reason in ("stop", "length")
        full = reference(lm, c.full_tokens[: c.prompt_len], c.full_tokens[c.prompt_len :])
        assert c.logprobs_echoed
        assert (full - torch.tensor(c.inference_logprobs)).abs().max() <= 1e-5
        assert c.sampling_logprobs[: c.prompt_len - 1] == [None] * (c.prompt_len - 1)
        # A colder and cut distribution only raises the probability of what it draws.
        drawn = zip(c.sampling_logprobs[c.prompt_len - 1 :], c.inference_logprobs[c.prompt_len - 1 :], strict=True)
        assert all(sampling > plain for sampling, plain in drawn)
        assert {len(ids) for ids in c.inference_topk_token_ids} == {2}


def test_genuine_client_gets_metrics_and_its_request_id(client):
    async def run():
        async with asyncio.timeout(60):
            return await sampler(client).sample_with_prompt_tokens_result(
                PROMPT, max_tokens=8, logprobs=True, logical_request_id="abc123"
            )

    result = asyncio.run(run())
    metrics = result.server_metrics
    assert metrics.response_request_id == "abc123"
    assert metrics.prefill_queue_duration >= 0
    assert metrics.num_concurrent_requests >= 1
    assert metrics.completion_tokens == result.completions[0].completion_len


def test_chat_answers_in_openai_shape(client, model_dir):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 6, "seed": 1, "ignore_eos": True}
    answer = client.post("/v1/chat/completions", json=body).json()
    assert answer["object"] == "chat.completion"
    message = answer["choices"][0]["message"]
    assert message["role"] == "assistant"
    chunks = stream_chunks(client, body, "/v1/chat/completions")
    assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == message["content"]
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    prompt = AutoTokenizer.from_pretrained(model_dir).apply_chat_template(
        body["messages"], add_generation_prompt=True, return_dict=False
    )
    assert answer["usage"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": []}, "prompt: []"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, 99999]}, "prompt: 99999"),
        ({"prompt": [-1]}, "prompt: -1"),
        ({"prompt": [[1, 2]]}, "prompt: [[1, 2]]"),
        ({"prompt": [1] * 300}, "prompt: 300 tokens"),
        ({"max_tokens": 252}, "max_tokens: 252"),
        ({"max_tokens": -1}, "max_tokens: -1"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"max_tokens": "5"}, "max_tokens: '5'"),
        ({"temperature": -0.1}, "temperature: -0.1"),
        ({"temperature": 1e-9}, "temperature: 1e-09"),
        ({"top_p": 0}, "top_p: 0"),
        ({"top_p": 1.5}, "top_p: 1.5"),
        ({"top_k": -2}, "top_k: -2"),
        ({"n": 0}, "n: 0"),
        ({"n": 9}, "n: 9"),
        ({"stop": [""]}, "stop: ''"),
        ({"stop_token_ids": [5000]}, "stop: 5000"),
        ({"presence_penalty": 0.5}, "Extra inputs are not permitted, field: 'presence_penalty'"),
        ({"sampling_mask": "parquet_v1"}, "Extra inputs are not permitted, field: 'sampling_mask'"),
    ],
)
def test_bad_values_are_named(client, fields, named):
    response = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4} | fields)
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"prompt":[1],"temperature":NaN}', b"\xff", b'{"prompt":"\\ud800"}']
)
def test_a_malformed_body_is_refused(client, body):
    response = client.post("/v1/completions", content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_the_refusal_of_routing_is_the_one_the_client_falls_back_on(client):
    response = client.post("/v1/completions", json={"prompt": PROMPT, "routing_matrix_format": "parquet_v1"})
    assert DeploymentSampler._unsupported_routing_format(response)


def test_a_client_that_leaves_frees_its_place(client, model_dir):
    with serving(make_spec(model_dir, max_context_length=4096, max_batch=1)) as own:
        body = {"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True}
        for stream in (False, True):
            with pytest.raises(httpx.ReadTimeout):
                own.post("/v1/completions", json=body | {"stream": stream}, timeout=0.3 if not stream else 0.001)
            started = time.monotonic()
            assert ids_of(complete(own, max_tokens=2)["choices"][0])
            assert time.monotonic() - started < 10
        assert own.get("/worker/status").json()["in_flight"] == 0


def test_a_request_past_its_deadline_ends_with_a_reason(model_dir):
    with serving(make_spec(model_dir, max_context_length=4096), deadline_s=0.3) as own:
        response = own.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 4000, "ignore_eos": True})
        assert response.status_code == 503
        assert "0.3 s" in response.json()["error"]["message"]


def test_stopping_answers_what_is_unfinished(model_dir):
    answers = []
    with serving(make_spec(model_dir, max_context_length=4096)) as own:
        url = str(own.base_url)
        body = {"prompt": PROMPT, "max_tokens": 400, "ignore_eos": True}
        thread = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))
        )
        thread.start()
        time.sleep(0.2)
    thread.join(timeout=30)
    assert answers[0].status_code == 200  # a graceful stop lets requests in flight end
