"""Forward passes that are kept for the backward pass which may follow on the same data.

A client with a loss of its own asks for log-probs, differentiates its loss by them and sends the derivative back with
the very same tokens. When the graph of the first pass is still there, the second one only has to run backward.

Owns which graphs are kept, for how long and within how much memory, and learns per model whether keeping them pays.
Does not know how a pass is computed.

Invariant: whatever is kept belongs to one model and was computed with the weights that this model has now.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from firebox.modeling.causal_lm import CausalLM
from firebox.trainer.batch import Example
from firebox.trainer.state import ModelState

_SHARE_OF_MEMORY: Final = 8
_MAX_REMEMBERED: Final = 1024
_CONTAINER_LIMITS: Final = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


class Kept(NamedTuple):
    """One micro-batch's log-probs with their graph; `indices` says which datums of the request, in packed order."""

    indices: list[int]
    logprobs: Tensor


class Retained:
    """The kept passes of the model that was active last, at most `budget` bytes of tensors."""

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._owner: ModelState | None = None
        self._habits: weakref.WeakKeyDictionary[ModelState, dict[bool, bool]] = weakref.WeakKeyDictionary()
        self._clear()

    def activate(self, state: ModelState | None) -> None:
        """From here on passes are those of `state`; what was kept of another model is dropped."""
        if state is not self._owner:
            self._owner = state
            self._clear()

    def weights_change(self, state: ModelState) -> None:
        """Drop what `state`'s weights, about to change, make wrong. Passes kept in vain are not kept again."""
        self.activate(state)
        for recording in self._kept.values():
            if recording.only_logprobs not in self._paid:
                self._habit[recording.only_logprobs] = False
        self._clear()

    def record(self, examples: Sequence[Example], lm: CausalLM) -> Recording | None:
        """How to watch a forward pass that shall be kept, or None when nobody is expected to come back for it.

        Clients that will come back send weights of zero, since they only want the log-probs; of other passes it must
        have been seen before.
        """
        only_logprobs = all("weights" in example.inputs and not example.inputs["weights"].any() for example in examples)
        key = _key(examples)
        room = self._budget - sum(recording.num_bytes for recording in self._kept.values())
        if room > 0 and self._habit.get(only_logprobs, only_logprobs):
            return Recording(key, only_logprobs, room, lm)
        if len(self._passed_by) < _MAX_REMEMBERED:
            self._passed_by[key] = only_logprobs
        return None

    def keep(self, recording: Recording) -> None:
        """Keep a watched pass, unless it has outgrown the budget."""
        if recording.passes:
            self._kept[recording.key] = recording

    def take(self, examples: Sequence[Example]) -> list[Kept]:
        """The kept pass over these very tokens and targets, which is then gone; empty when there is none."""
        key = _key(examples)
        recording = self._kept.pop(key, None)
        if recording is not None:
            self._paid.add(recording.only_logprobs)
            return recording.passes
        if key in self._passed_by:
            self._habit[self._passed_by.pop(key)] = True
        return []

    @property
    def _habit(self) -> dict[bool, bool]:
        return self._habits.setdefault(self._owner, {}) if self._owner else {}

    def _clear(self) -> None:
        self._kept: dict[bytes, Recording] = {}
        self._passed_by: dict[bytes, bool] = {}
        self._paid: set[bool] = set()


class Recording:
    """One forward pass being watched: its micro-batches, and the bytes that they hold beside the weights."""

    def __init__(self, key: bytes, only_logprobs: bool, budget: int, lm: CausalLM) -> None:
        self.key = key
        self.only_logprobs = only_logprobs
        self.num_bytes = 0
        self.passes: list[Kept] = []
        self._budget = budget
        self._storages = {p.untyped_storage().data_ptr() for p in lm.model.parameters()}

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Inside this block a graph is built and its size is measured, while there is room for it."""
        if self.num_bytes > self._budget:
            with torch.no_grad():
                yield
        else:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._measure, lambda saved: saved):
                yield

    def add(self, indices: list[int], logprobs: Tensor) -> None:
        """Keep one micro-batch; once the budget is exceeded all of them are given up, since half a pass is no use."""
        self.passes.append(Kept(indices, logprobs))
        if self.num_bytes > self._budget:
            self.passes.clear()

    def _measure(self, saved: Tensor) -> Tensor:
        storage = saved.untyped_storage()
        if storage.data_ptr() not in self._storages:
            self._storages.add(storage.data_ptr())
            self.num_bytes += storage.nbytes()
        return saved


def memory_budget(device: torch.device) -> int:
    """How many bytes kept passes may hold: an eighth of the memory that the device, or this container, has."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // _SHARE_OF_MEMORY
    limits = [path.read_text().strip() for path in _CONTAINER_LIMITS if path.exists()]
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *(int(limit) for limit in limits if limit.isdigit())]) // _SHARE_OF_MEMORY


def _key(examples: Sequence[Example]) -> bytes:
    """Equal for requests that are packed alike and ask for the same log-probs."""
    digest = hashlib.blake2b(digest_size=16)
    for example in examples:
        digest.update(repr((example.targets.shape, sorted(example.inputs))).encode())
        digest.update(example.tokens.tobytes())
        digest.update(example.targets.tobytes())
    return digest.digest()
