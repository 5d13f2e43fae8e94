"""Faults inside the engine: the batch pays, the thread lives."""

from __future__ import annotations

import torch

from firebox.sampler.scheduler import Generation, Params, Scheduler

from .conftest import make_spec, serving
from .test_completions import PROMPT, complete, ids_of


def test_a_failing_turn_fails_its_requests_only(model_dir, monkeypatch):
    from firebox.sampler.engine import Engine

    decode = Engine._decode
    with serving(make_spec(model_dir)) as client:
        monkeypatch.setattr(Engine, "_decode", lambda self, live: (_ for _ in ()).throw(RuntimeError("out of memory")))
        response = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 5})
        assert response.status_code == 500
        assert "out of memory" in response.json()["error"]["message"]
        monkeypatch.setattr(Engine, "_decode", decode)
        assert len(ids_of(complete(client, max_tokens=5, ignore_eos=True)["choices"][0])) == 5


def test_logits_that_are_not_finite_are_reported(model_dir, monkeypatch):
    from firebox.modeling.causal_lm import CausalLM

    logits = CausalLM.logits
    with serving(make_spec(model_dir)) as client:
        monkeypatch.setattr(CausalLM, "logits", lambda self, hidden: torch.full_like(logits(self, hidden), torch.nan))
        response = client.post("/v1/completions", json={"prompt": PROMPT, "max_tokens": 5})
        assert response.status_code == 500
        assert "not finite" in response.json()["error"]["message"]
        monkeypatch.setattr(CausalLM, "logits", logits)
        assert complete(client, max_tokens=2)


def test_live_sequences_stay_in_the_first_slots_in_any_order_of_leaving():
    scheduler = Scheduler(max_batch=6, prefill_budget=100)
    for _ in range(6):
        scheduler.submit(Generation(prompt=(1, 2), params=Params(max_tokens=4)))
    slots = list(scheduler.admit())
    for leaving in ((0, 5), (1,), (0, 1, 2)):
        for slot in leaving:
            scheduler.live[slot].finish = "stop"
        survivors = {id(s) for s in scheduler.live if s.finish is None}
        for source, target in scheduler.retire():
            slots[target] = slots[source]
        assert {id(s) for s in scheduler.live} == survivors
        assert all(slots[i] is s for i, s in enumerate(scheduler.live))
    assert scheduler.idle


def test_a_group_waits_until_it_fits():
    scheduler = Scheduler(max_batch=4, prefill_budget=100)
    first, group = (Generation(prompt=(1,), params=Params(max_tokens=4), n=n) for n in (2, 3))
    scheduler.submit(first)
    scheduler.submit(group)
    assert scheduler.admit() == first.sequences
    assert scheduler.admit() == []
    for sequence in first.sequences:
        sequence.finish = "length"
    scheduler.retire()
    assert scheduler.admit() == group.sequences


def test_the_prefill_budget_spreads_newcomers_over_turns():
    scheduler = Scheduler(max_batch=8, prefill_budget=10)
    for _ in range(3):
        scheduler.submit(Generation(prompt=(1,) * 8, params=Params(max_tokens=4)))
    assert [len(scheduler.admit()) for _ in range(4)] == [1, 1, 1, 0]
