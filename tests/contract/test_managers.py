"""The contract table: every public method of the Fireworks SDK's managers works against this server."""

from __future__ import annotations

import itertools

import pytest
from endpoints import verdicts
from managers import NOT_HERE, dedicated, jobs_and_deployments, managed, public_methods, root_session
from proofs import FULL, Record
from rich.console import Console
from rich.table import Table
from running import RunningServer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.prove
@pytest.mark.skipif(not FULL, reason="most of these calls are made every day by the tests of every endpoint")
def test_every_public_method_of_the_managers_works(
    server: RunningServer, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    monkeypatch.setenv("FIREWORKS_API_KEY", server.key)
    monkeypatch.setenv("FIREWORKS_BASE_URL", server.url)
    session, close = root_session(server.url, server.key)
    tokenizer = str(server.data / "models" / "local" / "tiny")
    told = verdicts(jobs_and_deployments(server.url, server.key, session))
    told |= verdicts(itertools.chain(dedicated(server.url, server.key), managed(server.url, server.key, tokenizer)))
    close()
    table = Table("method", "verdict")
    for call, verdict in sorted((NOT_HERE | told).items()):
        table.add_row(call, verdict)
    Console(width=160).print(table)
    record("methods", len(told))
    assert {call: verdict for call, verdict in told.items() if verdict != "ok"} == {}
    assert public_methods() - set(told) - set(NOT_HERE) == set()
