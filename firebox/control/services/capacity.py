"""Who holds which device of this machine, and who waits for one. In memory; names in, wake-ups out.

Memory of the host and whole accelerators are reserved, cores are shared. Knows no resource but its name, and stores
nothing: a new server learns from its workers what they hold.

Invariant: a device never holds more than it has, and nobody overtakes who waits for the same kind of device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from firebox.launch.machine import HOST, Device, Machine

_GIB = 2**30


@dataclass(frozen=True)
class Need:
    """`count` devices whose kind begins with `kind`, and `memory` bytes on each; alone there unless `shared`."""

    kind: str
    count: int
    memory: int
    shared: bool


@dataclass(frozen=True)
class Claim:
    need: Need
    devices: tuple[Device, ...]


class Capacity:
    """A holder is a resource name, with `#` and a number behind it where a resource holds more than once.

    `granted` is called with the resource name when a wait is over.
    """

    def __init__(self, machine: Machine, granted: Callable[[str], None]) -> None:
        self._machine = machine
        self._granted = granted
        self._held: dict[str, Claim] = {}
        self._line: dict[str, Need] = {}

    def claim(self, holder: str, need: Need) -> Sequence[Device] | None:
        """The devices of `holder`, from now until `release`; None while it waits in line."""
        if holder not in self._held and holder not in self._line:
            self._line[holder] = need
            self._advance()
        return self._held[holder].devices if holder in self._held else None

    def restore(self, holder: str, need: Need, ordinals: Sequence[str]) -> None:
        """Record what a worker of an earlier server holds: the accelerators `ordinals`, or none."""
        devices = [d for d in self._machine.devices if (d.ordinal in ordinals if ordinals else d.kind == HOST)]
        self._held[holder] = Claim(need, tuple(devices))

    def release(self, holder: str) -> None:
        """Give back what `holder` has, or its place in line."""
        if self._held.pop(holder, None) or self._line.pop(holder, None):
            for name in self._advance():
                self._granted(_resource(name))

    def why_waiting(self, name: str) -> str:
        """The place in line of a resource and what is missing, for people; empty for one that does not wait."""
        waiting = [(place, need) for place, (h, need) in enumerate(self._line.items(), 1) if _resource(h) == name]
        if not waiting:
            return ""
        place, need = waiting[0]
        have = [device for device in self._machine.devices if device.kind.startswith(need.kind)]
        if need.kind == HOST:
            free = max(0, self._room(have[0], need))
            missing = f"{_gib(need.memory)} of memory, and {_gib(free)} of {_gib(have[0].memory)} are free"
        else:
            free = sum(self._room(device, need) >= need.memory for device in have)
            missing = f"{need.count} {need.kind}, and {free} of {len(have)} are free"
        return f"waiting for capacity, number {place} in line: it needs {missing}"

    def misfit(self, need: Need) -> str:
        """Why this machine could not even run it alone; empty when it could."""
        have = [device for device in self._machine.devices if device.kind.startswith(need.kind)]
        if len(have) < max(1, need.count):
            return f"needs {need.count or 'some'} {need.kind}, which this server cannot use"
        if sum(device.memory >= need.memory for device in have) < need.count:
            return f"needs {_gib(need.memory)} of memory, and this server may use {_gib(max(d.memory for d in have))}"
        return ""

    def count(self, kind: str) -> int:
        """Devices of this machine whose kind begins with `kind`."""
        return sum(device.kind.startswith(kind) for device in self._machine.devices)

    def threads(self, wanted: int | Literal["share", "all"]) -> int:
        """Threads for a worker that has its claim. A share is at most half: a trainer gets a sampler beside it."""
        if wanted == "share":
            return max(1, self._machine.cores // max(2, len(self._held)))
        return self._machine.cores if wanted == "all" else wanted

    def _advance(self) -> list[str]:
        """Grant what fits, in order; returns who got something."""
        granted: list[str] = []
        blocked: list[str] = []
        for holder, need in list(self._line.items()):
            devices = self._place(need)
            if devices is None or any(need.kind.startswith(k) or k.startswith(need.kind) for k in blocked):
                blocked.append(need.kind)
            else:
                del self._line[holder]
                self._held[holder] = Claim(need, devices)
                granted.append(holder)
        return granted

    def _place(self, need: Need) -> tuple[Device, ...] | None:
        fits = [d for d in self._machine.devices if d.kind.startswith(need.kind) and self._room(d, need) >= need.memory]
        return tuple(fits[: need.count]) if len(fits) >= need.count else None

    def _room(self, device: Device, need: Need) -> int:
        """Bytes that `device` has left for `need`; less than none while somebody has it alone, or `need` wants to."""
        there = [claim.need for claim in self._held.values() if device in claim.devices]
        if there and not (need.shared and all(other.shared for other in there)):
            return -1
        return device.memory - sum(other.memory for other in there)


def _resource(holder: str) -> str:
    return holder.partition("#")[0]


def _gib(number: int) -> str:
    return f"{number / _GIB:.1f} GiB"
