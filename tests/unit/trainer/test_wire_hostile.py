"""Hostile requests: every one is answered soon and by the caller's fault, and the next good one is answered right."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from hostile_requests import Maker
from proofs import Record, count
from trainer_harness import serving, trainer_spec

COUNT = count(300, 10_000)
MAX_ANSWER_S = 5.0
MAX_GROWTH = 64 * 2**20
"""Failed futures stay readable for minutes and hold their message: a few KiB each."""


class Plane:
    """Raw calls to one LoRA trainer with a model for hostile requests and one for good ones."""

    def __init__(self, url: str, process: psutil.Process) -> None:
        self.process = process
        self.http = httpx.Client(base_url=f"{url}/api/v1/", timeout=40)
        self.session_id = self.post("create_session", {"tags": []})["session_id"]
        self.victim, self.good = self.create(0), self.create(10)
        self.slowest = 0.0

    def create(self, number: int) -> str:
        lora = {"rank": 2, "seed": 1}
        body = {"session_id": self.session_id, "model_seq_id": number, "base_model": "tiny", "lora_config": lora}
        return self.result(self.post("create_model", body))["model_id"]

    def post(self, path: str, body: dict) -> dict:
        answer = self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def result(self, accepted: dict) -> dict:
        return self.post("retrieve_future", {"request_id": accepted["request_id"]})

    def forward(self, seq_id: int) -> dict:
        datum = {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
            "loss_fn_inputs": {"target_tokens": {"data": [6, 7, 8], "dtype": "int64"}},
        }
        body = {"model_id": self.good, "seq_id": seq_id, "forward_input": {"data": [datum], "loss_fn": "cross_entropy"}}
        return self.result(self.post("forward", body))

    def timed(self, method: str, path: str, **request: object) -> httpx.Response:
        start = time.perf_counter()
        answer = self.http.request(method, path, **request)
        self.slowest = max(self.slowest, time.perf_counter() - start)
        return answer


@pytest.fixture
def plane(tiny_dir: Path, tmp_path: Path) -> Iterator[Plane]:
    others = psutil.Process().children()
    with serving(trainer_spec(tiny_dir, tmp_path, lora_rank=2)) as url:
        [process] = [child for child in psutil.Process().children() if child not in others]
        yield Plane(url, process)


@pytest.mark.prove
def test_hostile_requests_are_answered_soon_and_change_nothing(plane: Plane, record: Record) -> None:
    maker = Maker(plane.victim, plane.session_id, seed=COUNT)
    before, seq_id, statuses = plane.forward(1), 1, Counter[int]()
    memory = 0
    for i in range(COUNT):
        if i == COUNT // 5:
            memory = plane.process.memory_info().rss
        hostile = maker.make(seq_id)
        answer = plane.timed(hostile.method, hostile.path, headers=hostile.headers, content=hostile.body)
        told = f"{hostile.method} {hostile.path[:60]} {hostile.body[:300]!r}: {answer.status_code} {answer.text[:300]}"
        statuses[answer.status_code] += 1
        assert answer.status_code < 500, told
        if answer.status_code >= 400:
            assert answer.json()["error"]["message"], told
        elif hostile.in_order:
            seq_id += 1
            result = plane.timed("POST", "retrieve_future", json=answer.json()).json()
            assert result.get("category") in (None, "user"), f"{told} {result}"
    grown = plane.process.memory_info().rss - memory
    record("requests", COUNT)
    record("answers by status", {str(status): number for status, number in sorted(statuses.items())})
    record("slowest answer, s", plane.slowest)
    record("memory grown by, MiB", grown / 2**20)
    assert plane.slowest < MAX_ANSWER_S
    assert grown < MAX_GROWTH
    assert statuses[200] > COUNT // 5 < statuses[400] + statuses[404] + statuses[413]
    assert plane.forward(2) == before


def test_a_body_above_the_limit_is_refused_before_it_is_held(plane: Plane) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(2**11):
            yield bytes(2**16)

    for content in (bytes(65 * 2**20), endless()):
        answer = plane.http.post("forward", content=content)
        assert answer.status_code == 413
        assert str(64 * 2**20) in answer.json()["error"]["message"]
    assert plane.http.post("tokenizer/encode", json={"text": "a" * (2**20 + 1)}).status_code == 400
    assert "metrics" in plane.forward(1)
