"""`checkpoints.jsonl`: what a run has saved, and how it goes on from there.

Knows the trainer's client, not the recipe. Invariants: where the data stands is recorded before the trainer begins to
save, so every state on the server has its row; a resume that cannot load is an error, never a fresh start; an old state
goes only after a newer one is safe.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from training.utils.client import ReconnectableClient
from training.utils.config import RecipeConfig
from training.utils.errors import CheckpointError

FILE_NAME = "checkpoints.jsonl"
# A row number means nothing, or another row, when one of these has changed; `dataset` by its content.
FIXED = ("base_model", "lora_rank", "dataset", "seed", "max_seq_len", "eval_fraction")
Note = Callable[[str], None]


@dataclass(frozen=True)
class Checkpoint:
    """One row. `state_path` loads into any job of the same model, `sampler_path` can be promoted.

    A row with neither was written when a save began, and ends there when the run was cut off meanwhile. `step` counts
    finished optimizer steps, `data_consumed` rows of the data stream, `seconds` is what the save took. `fixed` has what
    a row number depends on, the seed included: every draw of a recipe follows from seed, step and row, so that these
    three are its whole random state.
    """

    name: str
    step: int
    data_consumed: int
    source_job_id: str
    fixed: dict[str, Any]
    state_path: str | None = None
    sampler_path: str | None = None
    seconds: float | None = None


class CheckpointLog:
    """The rows of one `log_path`, oldest first."""

    def __init__(self, log_path: str | Path) -> None:
        self.path = Path(log_path).expanduser() / FILE_NAME

    def rows(self) -> list[Checkpoint]:
        """The last word on each checkpoint, in the order of writing.

        Raises CheckpointError with the line of one that cannot be read.
        """
        known = {field.name for field in fields(Checkpoint)}
        rows: dict[tuple[str, str], Checkpoint] = {}
        for number, line in enumerate(self._whole_lines(), start=1):
            try:
                row = Checkpoint(**{key: value for key, value in json.loads(line).items() if key in known})
            except (ValueError, TypeError, AttributeError) as exc:
                fix = "mend or remove that line"
                raise CheckpointError(f"{self.path}:{number}: not a checkpoint row ({exc}); {fix}") from exc
            rows.pop((row.source_job_id, row.name), None)
            rows[row.source_job_id, row.name] = row
        return list(rows.values())

    def latest(self) -> Checkpoint | None:
        """The newest row that can be resumed from, as far as this file knows."""
        return next((row for row in reversed(self.rows()) if row.state_path), None)

    def to_resume(self, config: RecipeConfig, states: Callable[[str], Collection[str]]) -> Checkpoint | None:
        """The row that a run with this configuration goes on from, None for a fresh start. Touches no trainer.

        The one that `run.resume_from` names, or else the newest that the server has; `states` lists the names of a
        job's states there. Raises CheckpointError when there is a row that does not fit, or the newest is lost.
        """
        if config.run.resume_from:
            row: Checkpoint | None = self._named(config.run.resume_from)
        else:
            row = self._newest(states)
        if row is None:
            return None
        for name, mine in fixed(config).items():
            saved = row.fixed.get(name, mine)
            if mine != saved:
                fix = "go on with that, or choose another log_path"
                raise CheckpointError(f"{self.path}: {row.name} was saved with {name} {saved}, not {mine}: {fix}")
        if config.weight_sync.dcp_save_interval == 0 and not config.run.resume_from:
            fix = "set weight_sync.dcp_save_interval above 0 to resume from it, or choose another log_path"
            raise CheckpointError(f"{self.path} holds a checkpoint of step {row.step}: {fix}")
        return row

    def names(self) -> list[str]:
        """Where each checkpoint can be loaded or promoted from, oldest first."""
        return [path for row in self.rows() if (path := row.state_path or row.sampler_path)]

    def append(self, row: Checkpoint) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write([*self._whole_lines(), json.dumps(asdict(row)) + "\n"])

    def drop(self, rows: Iterable[Checkpoint]) -> None:
        """Forget rows."""
        dropped = list(rows)
        self._write([json.dumps(asdict(row)) + "\n" for row in self.rows() if row not in dropped])

    def _whole_lines(self) -> list[str]:
        """A last line without an end is the rest of a write that a crash cut; it says nothing."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    def _write(self, lines: Iterable[str]) -> None:
        """Replace the file in one step: a reader sees it before or after."""
        whole = self.path.with_suffix(".new")
        with whole.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())
        whole.replace(self.path)

    def _named(self, wanted: str) -> Checkpoint:
        rows = [row for row in self.rows() if row.state_path]
        found = [row for row in rows if wanted in (row.name, row.state_path)]
        if not found:
            known = ", ".join(row.name for row in rows) or "none"
            fix = "run.init_from starts a new run with the weights of any checkpoint"
            raise CheckpointError(f"run.resume_from {wanted!r} is not in {self.path} (states there: {known}); {fix}")
        return found[-1]

    def _newest(self, states: Callable[[str], Collection[str]]) -> Checkpoint | None:
        for row in reversed(self.rows()):
            begun = row.state_path is None and row.sampler_path is None
            if not (row.state_path or begun):
                continue
            name = row.name if begun else str(row.state_path).rpartition("/")[2]
            if name in states(row.source_job_id):
                return replace(row, state_path=row.state_path or f"cross_job://{row.source_job_id}/{name}")
            if not begun:
                fix = "name another in run.resume_from, or choose another log_path"
                raise CheckpointError(f"{self.path}: the server does not have {row.state_path} any more: {fix}")
        return None


@dataclass(frozen=True)
class Checkpointer:
    """Saves the states of one run under `step-<n>` and finds the one to go on from.

    `delete` removes a job's state from the server and says whether the server can.
    """

    client: ReconnectableClient
    log: CheckpointLog
    config: RecipeConfig
    delete: Callable[[str, str], bool]

    @property
    def interval(self) -> int:
        """Steps between two states, 0 for none."""
        return self.config.weight_sync.dcp_save_interval

    @property
    def timeout(self) -> int:
        """Seconds that one save or load may take."""
        return self.config.weight_sync.dcp_timeout

    def start(self, resume_from: Checkpoint | None, note: Note) -> tuple[int, int]:
        """Load what the run goes on from and say so: (finished steps, consumed rows).

        `resume_from` (see `CheckpointLog.to_resume`) comes before the weights of `run.init_from`, and that before a
        fresh start. Raises CheckpointError when it does not load.
        """
        if self.interval == 0:
            note("no checkpoints: weight_sync.dcp_save_interval is 0, so this run cannot be resumed")
        if resume_from is not None:
            load_state(self.client, str(resume_from.state_path), self.timeout, with_optimizer=True)
            self.log.append(resume_from)  # from here on it is the newest, also where later ones are passed over
            step, consumed = resume_from.step, resume_from.data_consumed
            note(f"resumed at step {step}, row {consumed}, from {resume_from.state_path}")
            return step, consumed
        if (init_from := self.config.run.init_from) is not None:
            load_weights(self.client, init_from, self.timeout)
            note(f"starting at step 0, row 0, with the weights of {init_from}")
        return 0, 0

    def due(self, step: int) -> bool:
        """Whether a state belongs behind this many finished steps."""
        return self.interval > 0 and step % self.interval == 0

    def save(self, step: int, data_consumed: int) -> Checkpoint:
        """Save a state to resume from and record it; the same step is not saved twice. Old ones may go, see
        `run.keep_checkpoints`.
        """
        latest = self.log.latest()
        if latest is not None and latest.step == step:
            return latest
        begun = self._row(f"step-{step}", step, data_consumed)
        self.log.append(begun)
        started = time.monotonic()
        name = self.client.save_state(begun.name, timeout=self.timeout).path.rsplit("/", 1)[-1]
        path = self.client.resolve_checkpoint_path(name, source_job_id=self.client.job_id)
        saved = replace(begun, state_path=path, seconds=round(time.monotonic() - started, 3))
        self.log.append(saved)
        self._prune()
        return saved

    def finish(self, step: int, data_consumed: int) -> None:
        """Save the state behind the last step, unless saving is off."""
        if self.interval > 0:
            self.save(step, data_consumed)

    def save_promotable(self, step: int, data_consumed: int) -> str:
        """Save full sampler weights behind `step`, record them, return the snapshot's name for promotion."""
        saved = self.client.save_weights_for_sampler_ext(f"final-{step}", checkpoint_type="base", timeout=self.timeout)
        self.log.append(replace(self._row(f"final-{step}", step, data_consumed), sampler_path=saved.snapshot_name))
        return str(saved.snapshot_name)

    def _row(self, name: str, step: int, data_consumed: int) -> Checkpoint:
        return Checkpoint(name, step, data_consumed, self.client.job_id, self._fixed)

    @cached_property
    def _fixed(self) -> dict[str, Any]:
        return fixed(self.config)

    def _prune(self) -> None:
        """Delete what `run.keep_checkpoints` does not keep, states of earlier jobs of this run included."""
        if keep := self.config.run.keep_checkpoints:
            old = [row for row in self.log.rows() if row.state_path][:-keep]
            self.log.drop(row for row in old if self.delete(row.source_job_id, str(row.state_path).rpartition("/")[2]))


def fixed(config: RecipeConfig) -> dict[str, Any]:
    """The settings that must not change between a save and the resume, as far as this recipe has them."""
    found = {name: getattr(config, name) for name in FIXED if hasattr(config, name)}
    if (file := Path(config.dataset).expanduser()).is_file():
        found["dataset"] = "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest()[:16]
    return found


def load_weights(client: ReconnectableClient, path: str, timeout: int) -> None:
    """Load weights alone: a checkpoint's, or those of an adapter that is registered as a model.

    Raises CheckpointError naming it when that fails.
    """
    if path.startswith("accounts/"):
        _loaded(path, lambda: client.inner.load_adapter(path).result(timeout=timeout))
    else:
        load_state(client, path, timeout, with_optimizer=False)


def load_state(client: ReconnectableClient, path: str, timeout: int, *, with_optimizer: bool) -> None:
    """Load a checkpoint reference, or its weights alone. Raises CheckpointError naming it when that fails."""
    if with_optimizer:
        _loaded(path, lambda: client.load_state_with_optimizer(path, timeout=timeout))
    else:
        _loaded(path, lambda: client.inner.load_state(path).result(timeout=timeout))


def _loaded(path: str, load: Callable[[], Any]) -> None:
    from fireworks.training.sdk import RequestFailedError

    try:
        load()
    except (RequestFailedError, ValueError, TimeoutError) as exc:
        # The SDK appends its own bookkeeping to the server's answer.
        reason = str(exc).partition(" for self.request_id=")[0]
        raise CheckpointError(f"checkpoint {path!r} cannot be loaded: {reason}") from exc
