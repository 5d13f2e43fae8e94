"""Who was heard of when: what decides that a session is put away and a pool stopped."""

from __future__ import annotations

import asyncio
import time

from firebox.control.services.downloads import Downloads
from firebox.control.services.presence import Place, Presence
from firebox.wire.worker import WorkerAddress

OLD, NEW = WorkerAddress("/run/old.sock", "a"), WorkerAddress("/run/new.sock", "b")


def test_idle_is_what_was_not_touched() -> None:
    presence = Presence()
    assert presence.first_idle_in(1.0) is None
    presence.touch("first")
    time.sleep(0.03)
    presence.touch("second")
    assert presence.idle_names(0.02) == ["first"]
    left = presence.first_idle_in(60.0)
    assert left is not None
    assert 59.0 < left < 60.0
    presence.touch("first")
    assert presence.idle_names(0.02) == []
    presence.forget("first")
    assert not presence.knows("first")
    assert presence.knows("second")


def test_first_name_wakes_who_waits() -> None:
    async def scenario() -> None:
        presence = Presence()
        waiting = asyncio.create_task(presence.grown.wait())
        await asyncio.sleep(0)
        presence.touch("first")
        await asyncio.wait_for(waiting, 1)

    asyncio.run(scenario())


def test_runs_of_an_ended_process_do_not_keep_its_successor_alive() -> None:
    presence = Presence()
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
