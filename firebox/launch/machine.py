"""What this machine has to run workers on: cores, and devices with memory. Knows no worker."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

HOST: Final = "CPU"

_CONTAINER_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


@dataclass(frozen=True)
class Device:
    """The host itself or one accelerator: its kind and its memory in bytes. `ordinal` is what CUDA calls it."""

    kind: str
    memory: int
    ordinal: str = ""


@dataclass(frozen=True)
class Machine:
    cores: int
    devices: tuple[Device, ...]

    @classmethod
    def here(cls, memory: int | None = None) -> Machine:
        """This machine, whose workers may have `memory` bytes together, by default all there are.

        It offers no accelerator, because samplers cannot drive one yet.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return cls(cores, (Device(HOST, memory or _memory()),))


def _memory() -> int:
    """Bytes of memory that this machine, or the container around this process, has."""
    limits = [path.read_text().strip() for path in _CONTAINER_LIMITS if path.exists()]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())])
