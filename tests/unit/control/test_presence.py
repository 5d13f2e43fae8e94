"""Who was heard of when: what decides that a session is put away and a pool stopped."""

from __future__ import annotations

import asyncio
import time

from firebox.control.services.downloads import Downloads
from firebox.control.services.presence import Place, Presence
from firebox.wire.worker import WorkerAddress

OLD, NEW = WorkerAddress("/run/old.sock", "a"), WorkerAddress("/run/new.sock", "b")


def test_idle_is_what_was_not_touched() -> None:
    presence = Presence(0.02)
    assert presence.first_idle_in() is None
    presence.touch("first")
    time.sleep(0.03)
    presence.touch("second")
    assert presence.idle_names() == ["first"]
    presence.renew("first")
    assert presence.idle_names() == []
    presence.forget("first")
    assert not presence.knows("first")
    assert presence.knows("second")


def test_each_name_may_be_silent_for_as_long_as_it_was_given() -> None:
    presence = Presence(60.0)
    presence.touch("usual")
    presence.touch("patient", 600.0)
    time.sleep(0.02)
    left = presence.first_idle_in()
    assert left is not None
    assert 59.0 < left < 60.0
    presence.forget("usual")
    left = presence.first_idle_in()
    assert left is not None
    assert 599.0 < left < 600.0
    presence.renew("stranger")
    assert not presence.knows("stranger")


def test_first_name_wakes_who_waits() -> None:
    async def scenario() -> None:
        presence = Presence(60.0)
        waiting = asyncio.create_task(presence.grown.wait())
        await asyncio.sleep(0)
        presence.touch("first")
        await asyncio.wait_for(waiting, 1)

    asyncio.run(scenario())


def test_runs_of_an_ended_process_do_not_keep_its_successor_alive() -> None:
    presence = Presence(60.0)
    presence.load("lost", Place("pool", "accounts/local/rlorTrainerJobs/pool", "t-1", OLD))
    assert presence.loaded_in(OLD) == ["lost"]
    assert presence.loaded_in(NEW) == []
    presence.load("lost", Place("pool", "accounts/local/rlorTrainerJobs/pool", "t-2", NEW))
    assert presence.loaded_in(OLD) == []
    presence.unload("lost")
    presence.unload("lost")
    assert presence.place("lost") is None


def test_ticket_opens_the_files_it_was_made_for(tmp_path) -> None:
    downloads = Downloads()
    offer = downloads.offer("local", tmp_path, ["a"])
    assert downloads.account_of(offer.ticket) == "local"
    assert downloads.account_of("another") is None
    assert downloads.file(offer.ticket, "a") == tmp_path / "a"
