"""What a run shows and leaves behind: `metrics.jsonl`, a progress bar or plain lines, curves.

Hands every row on to the trackers and to whoever supervises the run. Knows no trainer and no algorithm; a recipe says
which metrics matter. Invariant: one row per step in `metrics.jsonl`, in order, even after a resume.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from training.utils.bands import MismatchGuard
from training.utils.config import RecipeConfig
from training.utils.dry_run import settings
from training.utils.reports import Reports
from training.utils.trackers import Trackers

Row = dict[str, Any]
LINE_INTERVAL_S = 2.0


@dataclass(frozen=True)
class Curves:
    """One picture of the final PNG: a title and the metrics drawn in it."""

    title: str
    metrics: Sequence[str]


class RunLog:
    """The record of one run in its `log_path`. Use as a context manager, and call `begin` before the first step.

    `live` maps the names shown while training to metrics. `mismatch_stop_after` red steps in a row stop the run.
    """

    def __init__(
        self, config: RecipeConfig, *, live: Mapping[str, str], curves: Sequence[Curves], mismatch_stop_after: int = 0
    ) -> None:
        self.folder = Path(config.log_path).expanduser()
        self.path = self.folder / "metrics.jsonl"
        self._config, self._live, self._curves = config, live, curves
        self._console = Console(stderr=True)
        self._noted: set[str] = set()
        self._rows: list[Row] = []
        self._progress = _progress_bar(self._console)
        self._guard = MismatchGuard(mismatch_stop_after, self.note)
        self._reports = Reports()
        self._step, self._total = 0, 0
        self._trackers: Trackers | None = None
        self._file: TextIO | None = None
        self._printed = -math.inf

    def __enter__(self) -> RunLog:
        self._reports.status("starting")
        return self

    def begin(self, start_step: int, total_steps: int, **about: Any) -> None:
        """Open the record behind `start_step` finished steps; `about` names what the run uses, its job say.

        Later rows are left over from a run that was cut off and are dropped; the metrics of an earlier run that is not
        being resumed are moved aside.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._rows = self._kept_rows(start_step)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in self._rows), encoding="utf-8")
        self._file = self.path.open("a", encoding="utf-8")
        facts = {**about, "log_path": str(self.folder), "pid": os.getpid(), "settings": settings(self._config)}
        self._trackers = Trackers(self._config, facts["settings"], self.folder, self.note)
        self._reports.metadata(facts)
        self._step = self._first_step = start_step
        self._total, self._started = total_steps, time.monotonic()
        self._reports.status("running", start_step, total_steps)
        self._bar = self._progress.add_task("", total=total_steps, completed=start_step, live="")
        if self._console.is_terminal:
            self._progress.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Being told to stop unwinds as SystemExit or KeyboardInterrupt.
        state = "completed" if error is None else "failed" if isinstance(error, Exception) else "stopped"
        self._reports.status(state, self._step, self._total or None, "" if error is None else repr(error))
        if self._trackers is not None:
            self._trackers.finish()
        if self._file is None:
            return
        if self._console.is_terminal:
            self._progress.stop()
        self._file.close()
        if self._rows:
            self.note(f"curves: {draw(self._rows, self._curves, self.folder / 'curves.png')}")
        self.note(f"metrics: {self.path}")

    def note(self, text: str) -> None:
        """Say something once, above the progress bar."""
        if text not in self._noted:
            self._noted.add(text)
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def log(self, step: int, metrics: Mapping[str, float]) -> Row:
        """Record the metrics of one finished step and show the live ones. Returns the row.

        Raises MismatchError, the row recorded, when sampler and trainer have disagreed for too long.
        """
        row: Row = {"step": step, "time": round(time.time(), 3), **metrics}
        assert self._file is not None, "begin() comes before the first row"
        assert self._trackers is not None
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self._rows.append(row)
        self._step = step
        self._trackers.log(row)
        self._reports.metrics(row)
        self._reports.status("running", step, self._total)
        shown = "  ".join(f"{name} {row[key]:.4g}" for name, key in self._live.items() if key in row)
        if self._console.is_terminal:
            self._progress.update(self._bar, completed=step, live=shown)
        else:
            self._print_line(step, shown)
        self._guard.see(row)
        return row

    def _print_line(self, step: int, shown: str) -> None:
        """The progress bar's stand-in where output is not a terminal: a line every few seconds."""
        now = time.monotonic()
        if now - self._printed < LINE_INTERVAL_S and step < self._total:
            return
        self._printed = now
        pace = (now - self._started) / max(step - self._first_step, 1)
        eta = f"ETA {pace * max(self._total - step, 0):.0f} s"
        self._console.print(f"step {step}/{self._total}  {shown}  {eta}", highlight=False, soft_wrap=True)

    def result(self, **about: Any) -> dict[str, Any]:
        """What a recipe returns: facts about the run, the newest value of every metric, where the log is."""
        metrics = {key: value for row in self._rows for key, value in row.items()}
        result = {**about, "metrics": metrics, "log_path": str(self.folder)}
        self._reports.output(result)
        return result

    def _kept_rows(self, start_step: int) -> list[Row]:
        if not self.path.exists():
            return []
        if start_step == 0:
            self.path.rename(self.folder / f"metrics-before-{time.strftime('%Y%m%d-%H%M%S')}.jsonl")
            return []
        rows: list[Row] = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            with suppress(json.JSONDecodeError):  # the last line of a killed run may be half written
                rows.append(json.loads(line))
        return [row for row in rows if row["step"] <= start_step]


@dataclass
class Timer:
    """Seconds per phase of one step: `with timer("rollout"): ...` adds to `time/rollout`."""

    seconds: dict[str, float] = field(default_factory=dict)
    _open: tuple[str, float] = ("", 0.0)

    def __call__(self, phase: str) -> Timer:
        self._open = (f"time/{phase}_s", time.monotonic())
        return self

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        phase, started = self._open
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.monotonic() - started

    @property
    def total(self) -> float:
        return sum(self.seconds.values())


def draw(rows: Sequence[Mapping[str, Any]], curves: Sequence[Curves], path: Path) -> Path:
    """Draw metrics over steps, one picture below the other, into a PNG. Returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3 * len(curves)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, picture in zip(figure.subplots(len(curves), squeeze=False)[:, 0], curves, strict=True):
        for metric in picture.metrics:
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=metric, marker="." if len(points) < 30 else None)
        axes.set(title=picture.title, xlabel="optimizer step")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=120)
    return path


def _progress_bar(console: Console) -> Progress:
    columns = (BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[live]}"))
    return Progress(*columns, console=console)
