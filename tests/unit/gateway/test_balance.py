"""The order in which replicas are asked."""

from __future__ import annotations

import contextlib
from collections import Counter

from firebox.gateway.balance import Balance
from firebox.wire.worker import WorkerAddress

REPLICAS = [WorkerAddress(f"/run/s-{number}.sock", "") for number in range(4)]
PREFIXES = [b"[%d, 7" % number for number in range(400)]


def test_a_prefix_stays_where_it_is() -> None:
    balance = Balance()
    for prefix in PREFIXES:
        assert balance.order(REPLICAS, prefix) == balance.order(REPLICAS[::-1], prefix)


def test_prefixes_are_spread() -> None:
    counts = Counter(Balance().order(REPLICAS, prefix)[0] for prefix in PREFIXES)
    assert min(counts.values()) > 60


def test_replica_that_goes_moves_only_its_own_prefixes() -> None:
    balance = Balance()
    for prefix in PREFIXES:
        first, *others = balance.order(REPLICAS, prefix)
        left = [replica for replica in REPLICAS if replica != REPLICAS[0]]
        assert balance.order(left, prefix)[0] == (others[0] if first == REPLICAS[0] else first)


def test_one_prompt_for_all_still_keeps_everybody_busy() -> None:
    """The worst case of stickiness: nobody gets more than a quarter above a fair share."""
    balance, counts = Balance(), Counter[WorkerAddress]()
    with contextlib.ExitStack() as stack:
        for _ in range(64):
            replica = balance.order(REPLICAS, b"[1, 2, 3]")[0]
            counts[replica] += 1
            stack.enter_context(balance.busy(replica))
        assert max(counts.values()) <= 20
        assert min(counts.values()) >= 4
    home = balance.order(REPLICAS, b"[1, 2, 3]")[0]
    assert counts[home] == max(counts.values()), "with nothing left to do, the prompt is back where it belongs"
