"""Where metrics are shown besides the log: Weights & Biases, trackio, tensorboard. Knows rows, not what they mean.

Invariant: trouble with one of them is said once, switches that one off, and never stops training or the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from training.utils.config import RecipeConfig

Row = Mapping[str, Any]
LOGIN_TIMEOUT_S = 30


class Tracker(Protocol):
    """One place that shows rows. Any method may raise."""

    def log(self, row: Row) -> None: ...

    def finish(self) -> None: ...


class Trackers:
    """All that a run's configuration asks for. Each is an optional package, imported here and only then."""

    def __init__(
        self, config: RecipeConfig, settings: Mapping[str, Any], folder: Path, note: Callable[[str], None]
    ) -> None:
        self._note = note
        self._running: dict[str, Tracker] = {}
        wandb = config.wandb
        if wandb.entity or wandb.project or wandb.run_name:
            self._start("Weights & Biases", lambda: _WeightsAndBiases(config, settings))
        if project := config.run.trackio:
            self._start("trackio", lambda: _Trackio(project, folder.name, settings))
        if config.run.tensorboard:
            self._start("tensorboard", lambda: _Tensorboard(folder / "tensorboard"))

    def log(self, row: Row) -> None:
        for name, tracker in list(self._running.items()):
            self._attempt(name, lambda tracker=tracker: tracker.log(row))  # type: ignore[misc]

    def finish(self) -> None:
        for name, tracker in list(self._running.items()):
            self._attempt(name, tracker.finish)

    def _start(self, name: str, make: Callable[[], Tracker]) -> None:
        def start() -> None:
            self._running[name] = make()

        self._attempt(name, start)

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        try:
            action()
        except ImportError as exc:
            self._running.pop(name, None)
            self._note(f"{name} is off for this run: pip install {exc.name}")
        except Exception as exc:  # noqa: BLE001 - a tracker is a foreign service, and training must outlive it
            self._running.pop(name, None)
            self._note(f"{name} is off for this run: {exc}")


class _WeightsAndBiases:
    def __init__(self, config: RecipeConfig, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            entity=config.wandb.entity,
            project=config.wandb.project,
            name=config.wandb.run_name,
            config=dict(settings),
            settings=wandb.Settings(login_timeout=LOGIN_TIMEOUT_S),
        )

    def log(self, row: Row) -> None:
        self._run.log(dict(row), step=row["step"])

    def finish(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, project: str, name: str, settings: Mapping[str, Any]) -> None:
        import trackio

        self._trackio = trackio
        trackio.init(project=project, name=name, config=dict(settings), resume="allow")

    def log(self, row: Row) -> None:
        self._trackio.log(
            {name: value for name, value in row.items() if name not in ("step", "time")}, step=row["step"]
        )

    def finish(self) -> None:
        self._trackio.finish()


class _Tensorboard:
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def log(self, row: Row) -> None:
        for name, value in row.items():
            if isinstance(value, int | float) and name != "step":
                self._writer.add_scalar(name, value, row["step"])

    def finish(self) -> None:
        self._writer.close()
