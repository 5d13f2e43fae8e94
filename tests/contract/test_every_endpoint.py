"""Every endpoint, through each genuine SDK: plain, and over a network that cuts one read in twenty."""

from __future__ import annotations

import pytest
from chaos_proxy import chaos
from endpoints import SDKS, verdicts
from proofs import FULL, Record
from rich.console import Console
from rich.table import Table
from running import RunningServer

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@pytest.mark.prove
@pytest.mark.parametrize("cut_rate", [0.0, 0.05] if FULL else [0.0], ids=["plain", "cut"][: 1 + FULL])
@pytest.mark.parametrize("sdk", sorted(SDKS))
def test_every_endpoint_answers(
    server: RunningServer, sdk: str, cut_rate: float, monkeypatch: pytest.MonkeyPatch, record: Record
) -> None:
    monkeypatch.setenv("TINKER_TELEMETRY", "0")
    with chaos(server.url, cut_rate=cut_rate, delay_s=0.01 if cut_rate else 0.0, seed=1) as (url, proxy):
        told = verdicts(SDKS[sdk](url, server.key))
    table = Table(f"{sdk}, {proxy.num_cut} reads cut", "verdict")
    for call, verdict in told.items():
        table.add_row(call, verdict)
    Console(width=160).print(table)
    record("calls", len(told))
    record("reads cut", proxy.num_cut)
    assert {call: verdict for call, verdict in told.items() if verdict != "ok"} == {}
