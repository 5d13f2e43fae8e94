"""Requests made from the server's own OpenAPI document, fitting and unfitting ones: none may break it."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import requests
import schemathesis
from control_harness import Server  # type: ignore[import-not-found]
from hypothesis import HealthCheck, Phase, given, seed, settings
from proofs import Record, count
from schemathesis import GenerationMode

KNOWN = {"account": "local", "model": "tiny", "job": "fuzzed", "deployment": "fuzzed", "shape": "tiny-cpu"}
SLOW_S = 5.0
SETTINGS: Any = {
    "deadline": None,
    "database": None,
    "phases": [Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
_ROUNDS = 20


@pytest.mark.prove
@pytest.mark.timeout(600)
def test_no_request_made_from_the_document_breaks_the_server(server: Server, record: Record) -> None:
    headers = {"X-Api-Key": server.key, "Prefer": "wait=0"}
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=headers)
    operations = [found.ok() for found in schema.get_all_operations()]
    wanted = count(400, 10_000)
    told: dict[int, int] = {}
    broken, slowest, rng = [], 0.0, random.Random(0)
    server.create_job("fuzzed")
    server.create_deployment("fuzzed")
    session = requests.Session()

    def send(case: Any) -> None:
        nonlocal slowest
        for name in case.path_parameters or {}:
            if name in KNOWN and rng.random() < 0.7:  # a random account is refused before anything else is looked at
                case.path_parameters[name] = KNOWN[name]
        begun = time.monotonic()
        answer = case.call(base_url=server.url, headers=headers, session=session, timeout=60)
        slowest = max(slowest, time.monotonic() - begun)
        told[answer.status_code] = told.get(answer.status_code, 0) + 1
        if answer.status_code >= 500:
            broken.append(f"{case.as_curl_command()}: {answer.status_code} {answer.text[:300]}")

    for number in range(_ROUNDS):
        for operation in operations:
            # Only a path of texts cannot be asked wrongly.
            modes = list(GenerationMode) if operation.body or operation.query else [GenerationMode.POSITIVE]
            for mode in modes:
                run = given(case=operation.as_strategy(generation_mode=mode))(send)
                seed(number)(settings(max_examples=count(5, 50), **SETTINGS)(run))()
        if sum(told.values()) >= wanted:
            break
    record("requests", sum(told.values()))
    record("by status", {str(status): told[status] for status in sorted(told)})
    record("slowest, s", slowest)
    assert not broken, "\n".join(broken)
    assert sum(told.values()) >= wanted
    assert slowest < SLOW_S
    assert server.ask("GET", "/v1/accounts").status_code == 200
