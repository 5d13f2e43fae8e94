"""`checkpoints.jsonl`: what a run has saved, and how it goes on from there.

Knows the trainer's client, not the recipe. Invariants: a row is written only after the trainer has finished saving; a
resume that cannot load is an error, never a fresh start.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from training.utils.client import ReconnectableClient
from training.utils.config import WeightSyncConfig
from training.utils.errors import CheckpointError

FILE_NAME = "checkpoints.jsonl"


@dataclass(frozen=True)
class Checkpoint:
    """One row. `state_path` loads into any job of the same model, `sampler_path` can be promoted; either may be None.

    `data_consumed` counts rows of the data stream, `step` finished optimizer steps.
    """

    name: str
    step: int
    data_consumed: int
    source_job_id: str
    state_path: str | None
    sampler_path: str | None
    base_model: str
    training_shape: str


class CheckpointLog:
    """The rows of one `log_path`, oldest first."""

    def __init__(self, log_path: str | Path) -> None:
        self.path = Path(log_path).expanduser() / FILE_NAME

    def rows(self) -> list[Checkpoint]:
        """All rows. Raises CheckpointError with the line of one that cannot be read."""
        if not self.path.exists():
            return []
        known, rows = {field.name for field in fields(Checkpoint)}, []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                rows.append(Checkpoint(**{key: value for key, value in json.loads(line).items() if key in known}))
            except (ValueError, TypeError, AttributeError) as exc:
                fix = "mend or remove that line"
                raise CheckpointError(f"{self.path}:{number}: not a checkpoint row ({exc}); {fix}") from exc
        return rows

    def latest(self) -> Checkpoint | None:
        """The newest row that can be resumed from."""
        return next((row for row in reversed(self.rows()) if row.state_path), None)

    def to_resume(self, base_model: str, training_shape: str, sync: WeightSyncConfig) -> Checkpoint | None:
        """The row that a run with these settings goes on from, None for a fresh start. Touches no trainer.

        Raises CheckpointError when there is a row that does not fit.
        """
        row = self.latest()
        if row is None:
            return None
        for what, mine, saved in (
            ("base_model", base_model, row.base_model),
            ("training_shape", training_shape, row.training_shape),
        ):
            if mine != saved:
                fix = "resume with that one, or choose another log_path"
                raise CheckpointError(f"{self.path} was written with {what} {saved}, not {mine}: {fix}")
        if sync.dcp_save_interval == 0:
            fix = "set weight_sync.dcp_save_interval above 0 to resume from it, or choose another log_path"
            raise CheckpointError(f"{self.path} holds a checkpoint of step {row.step}: {fix}")
        return row

    def names(self) -> list[str]:
        """Where each checkpoint can be loaded or promoted from, oldest first."""
        return [str(row.state_path or row.sampler_path) for row in self.rows()]

    def append(self, row: Checkpoint) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class Checkpointer:
    """Saves the states of one run under `step-<n>` and finds the one to go on from."""

    client: ReconnectableClient
    log: CheckpointLog
    base_model: str
    training_shape: str
    sync: WeightSyncConfig

    @property
    def interval(self) -> int:
        """Steps between two states, 0 for none."""
        return self.sync.dcp_save_interval

    @property
    def timeout(self) -> int:
        """Seconds that one save or load may take."""
        return self.sync.dcp_timeout

    def start(
        self, resume_from: Checkpoint | None, init_from: str | None, note: Callable[[str], None]
    ) -> tuple[int, int]:
        """Load what the run goes on from and say so: (finished steps, consumed rows).

        `resume_from` (see `CheckpointLog.to_resume`) comes before the weights of `init_from`, and that before a fresh
        start. Raises CheckpointError when it does not load.
        """
        if self.interval == 0:
            note("no checkpoints: weight_sync.dcp_save_interval is 0, so this run cannot be resumed")
        if resume_from is not None:
            load_state(self.client, str(resume_from.state_path), self.timeout, with_optimizer=True)
            step, consumed = resume_from.step, resume_from.data_consumed
            note(f"resumed at step {step}, row {consumed}, from {resume_from.state_path}")
            return step, consumed
        if init_from is not None:
            load_state(self.client, init_from, self.timeout, with_optimizer=False)
            note(f"starting at step 0, row 0, with the weights of {init_from}")
        return 0, 0

    def due(self, step: int) -> bool:
        """Whether a state belongs behind this many finished steps."""
        return self.interval > 0 and step % self.interval == 0

    def save(self, step: int, data_consumed: int) -> Checkpoint:
        """Save the state behind `step` and record it; the same step is not saved twice."""
        latest = self.log.latest()
        if latest is not None and latest.step == step:
            return latest
        name = self.client.save_state(f"step-{step}", timeout=self.timeout).path.rsplit("/", 1)[-1]
        state_path = self.client.resolve_checkpoint_path(name, source_job_id=self.client.job_id)
        return self._record(name, step, data_consumed, state_path=state_path)

    def finish(self, step: int, data_consumed: int) -> None:
        """Save the state behind the last step, unless saving is off."""
        if self.interval > 0:
            self.save(step, data_consumed)

    def save_promotable(self, step: int, data_consumed: int) -> str:
        """Save full sampler weights behind `step`, record them, return the snapshot's name for promotion."""
        saved = self.client.save_weights_for_sampler_ext(f"final-{step}", checkpoint_type="base", timeout=self.timeout)
        self._record(f"final-{step}", step, data_consumed, sampler_path=saved.snapshot_name)
        return str(saved.snapshot_name)

    def _record(self, name: str, step: int, data_consumed: int, **paths: Any) -> Checkpoint:
        paths = {"state_path": None, "sampler_path": None, **paths}
        row = Checkpoint(
            name,
            step,
            data_consumed,
            self.client.job_id,
            base_model=self.base_model,
            training_shape=self.training_shape,
            **paths,
        )
        self.log.append(row)
        return row


def load_state(client: ReconnectableClient, path: str, timeout: int, *, with_optimizer: bool) -> None:
    """Load a checkpoint reference, or its weights alone. Raises CheckpointError naming it when that fails."""
    from fireworks.training.sdk import RequestFailedError

    try:
        if with_optimizer:
            client.load_state_with_optimizer(path, timeout=timeout)
        else:
            client.inner.load_state(path).result(timeout=timeout)
    except (RequestFailedError, ValueError, TimeoutError) as exc:
        # The SDK appends its own bookkeeping to the server's answer.
        reason = str(exc).partition(" for self.request_id=")[0]
        raise CheckpointError(f"checkpoint {path!r} cannot be loaded: {reason}") from exc
