"""Requests that name their own weights: whose turn it is, and that each gets what it named."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from firebox.sampler.turns import Turns
from firebox.weights.manifest import Probe
from firebox.wire.errors import FailedPrecondition, Unavailable
from firebox.wire.worker import SnapshotRef

from .conftest import make_spec, serving
from .test_completions import PROMPT
from .test_hotload import commit, make_adapter

A, B = SnapshotRef(dir="/a", identity="a"), SnapshotRef(dir="/b", identity="b")


def order(snapshot: SnapshotRef | None, **fields: object) -> dict:
    params = {"max_tokens": 6, "temperature": 1.0, "seed": 3, "stop": []} | fields.pop("sampling_params", {})
    prompt = {"chunks": [{"type": "encoded_text", "tokens": PROMPT}]}
    ref = None if snapshot is None else {"dir": snapshot.dir, "identity": snapshot.identity}
    return {"snapshot": ref, "request": {"prompt": prompt, "sampling_params": params, **fields}}


def test_turns_run_together_apart_and_in_order():
    async def scenario() -> None:
        live, log, running = [None], [], []

        async def change(snapshot: SnapshotRef | None) -> None:
            assert running == [], "weights are changed under nobody's hands"
            log.append(snapshot)
            await asyncio.sleep(0)
            live[0] = snapshot

        turns = Turns(change, lambda snapshot: live[0] == snapshot)

        async def use(snapshot: SnapshotRef | None) -> None:
            async with turns.using(snapshot, 5):
                running.append(snapshot)
                for _ in range(3):
                    assert live[0] == snapshot
                    await asyncio.sleep(0)
                running.remove(snapshot)

        wanted = [None, A, A, B, None, A, B]
        await asyncio.gather(*(use(snapshot) for snapshot in wanted))
        assert log == [A, B, None], "the base model's first, then one turn of each"

    asyncio.run(scenario())


def test_a_turn_that_cannot_be_fails_its_own_requests_only():
    async def scenario() -> None:
        live: list[SnapshotRef | None] = [None]

        async def change(snapshot: SnapshotRef | None) -> None:
            if snapshot == A:
                raise FailedPrecondition("a is damaged")
            live[0] = snapshot

        turns = Turns(change, lambda snapshot: live[0] == snapshot)

        async def use(snapshot: SnapshotRef) -> str:
            async with turns.using(snapshot, 5):
                return snapshot.identity

        results = await asyncio.gather(use(A), use(B), use(A), return_exceptions=True)
        assert [str(result) for result in results] == ["a is damaged", "b", "a is damaged"]
        async with turns.using(B, 5):
            with pytest.raises(Unavailable, match="retry"):
                async with turns.using(A, 0.05):
                    pass
        assert await use(B) == "b"

    asyncio.run(scenario())


def test_who_stops_waiting_in_the_moment_of_admission_holds_nothing():
    async def scenario() -> None:
        live: list[SnapshotRef | None] = [None]

        async def change(snapshot: SnapshotRef | None) -> None:
            live[0] = snapshot

        turns = Turns(change, lambda snapshot: live[0] == snapshot)

        async def use(snapshot: SnapshotRef | None) -> str:
            async with turns.using(snapshot, 5):
                return "used"

        for steps in range(6):  # one of these finds the task admitted, and not yet running again
            task = asyncio.create_task(use(A if steps % 2 else B))
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        async with asyncio.timeout(5):
            assert [await use(snapshot) for snapshot in (A, B, None)] == ["used"] * 3

    asyncio.run(scenario())


def test_weights_that_broke_in_the_swap_are_replaced_before_anybody_uses_them(model_dir, tmp_path):
    """A snapshot that contradicts its probe has overwritten what was live: whoever is next must get whole weights."""
    good = commit(tmp_path, "good", lambda d: make_adapter(model_dir, d, ["q_proj"], 1), kind="adapter")
    probe = Probe(tokens=[1, 2, 3], logprobs=[-0.1, -0.1])
    bad = commit(tmp_path, "bad", lambda d: make_adapter(model_dir, d, ["q_proj"], 2), kind="adapter", probe=probe)
    refs = [SnapshotRef(dir=str(path), identity=path.name) for path in (good, bad)]
    with serving(make_spec(model_dir)) as client:
        for ref in (refs[0], None):
            before = client.post("/worker/sample", json=order(ref)).json()["sequences"]
            refused = client.post("/worker/sample", json=order(refs[1]))
            assert refused.status_code == 400
            assert "differ from the trainer's" in refused.json()["error"]["message"]
            after = client.post("/worker/sample", json=order(ref)).json()["sequences"]
            assert after[0]["tokens"] == before[0]["tokens"]
            assert after[0]["logprobs"] == pytest.approx(before[0]["logprobs"], abs=1e-5)


def test_each_request_gets_the_weights_it_names(model_dir, tmp_path):
    """Two adapters and the base model, asked for at once and in any order; log-probs equal plain peft's to 1e-5."""
    refs: list[SnapshotRef | None] = [None]
    models = [AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()]
    for name, targets in (("one", ["q_proj", "lm_head"]), ("two", ["down_proj"])):
        path = commit(
            tmp_path, name, lambda d, t=targets: models.append(make_adapter(model_dir, d, t, 1)), kind="adapter"
        )
        refs.append(SnapshotRef(dir=str(path), identity=name))
    assert isinstance(models[1], PeftModel)
    with serving(make_spec(model_dir)) as client, ThreadPoolExecutor(6) as pool:
        asked = [0, 1, 2, 1, 0, 2]
        send = lambda i: client.post("/worker/sample", json=order(refs[i], num_samples=2, prompt_logprobs=True))  # noqa: E731
        answers = [answer.json() for answer in pool.map(send, asked)]
        again = send(1).json()
    drawn = [[sequence["tokens"] for sequence in answer["sequences"]] for answer in (again, answers[1], answers[3])]
    assert drawn[0] == drawn[1] == drawn[2], "a handle answers the same for ever"
    for i, answer in zip(asked, answers, strict=True):
        for sequence in answer["sequences"]:
            tokens = torch.tensor([PROMPT + sequence["tokens"]])
            with torch.inference_mode():
                logits = models[i](tokens).logits[0, :-1]
            expected = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].tolist()
            scored = len(PROMPT) - 1
            assert answer["prompt_logprobs"][0] is None
            assert answer["prompt_logprobs"][1:] == pytest.approx(expected[:scored], abs=1e-5)
            assert sequence["logprobs"] == pytest.approx(expected[scored:], abs=1e-5)
            assert sequence["stop_reason"] == "length"


def test_alternatives_and_limits_of_what_is_scored(client):
    answer = client.post(
        "/worker/sample",
        json=order(
            None, topk_prompt_logprobs=2, topk_sample_logprobs=3, prompt_logprobs=True, prompt_logprobs_last_n=1
        ),
    ).json()
    assert [len(row) for row in answer["sequences"][0]["topk_logprobs"]] == [3] * 6
    assert answer["prompt_logprobs"][:-1] == [None] * (len(PROMPT) - 1)
    assert isinstance(answer["prompt_logprobs"][-1], float)
    assert [None if row is None else len(row) for row in answer["topk_prompt_logprobs"]] == [None] * (
        len(PROMPT) - 1
    ) + [2]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"num_samples": 0}, "num_samples"),
        ({"prompt_alt_tokens_k": 2}, "prompt_alt_tokens_k"),
        ({"target_prompt_logprobs": {"data": [1]}}, "target_prompt_logprobs"),
        ({"prompt_logprobs_last_n": 2}, "prompt_logprobs_last_n"),
        ({"sampling_params": {"temperature": -1.0}}, "temperature"),
        ({"sampling_params": {"top_p": 0.0}}, "top_p"),
        ({"sampling_params": {"stop": [""]}}, "stop"),
        ({"sampling_params": {"max_tokens": 100_000}}, "max_tokens"),
    ],
)
def test_what_cannot_be_is_refused_by_name(client, fields, named):
    answer = client.post("/worker/sample", json=order(None, **fields))
    assert answer.status_code == 400, answer.text
    assert named in answer.json()["error"]["message"]


def test_a_snapshot_that_is_not_there_fails_its_request_only(client, tmp_path):
    missing = client.post("/worker/sample", json=order(SnapshotRef(dir=str(tmp_path / "no"), identity="no")))
    assert missing.status_code == 400
    assert "no committed snapshot" in missing.json()["error"]["message"]
    assert client.post("/worker/sample", json=order(None)).status_code == 200
