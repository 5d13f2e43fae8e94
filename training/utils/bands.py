"""When sampler and trainer disagree too much: the bands of the `mismatch/*` metrics, and the stop.

Knows metrics, not how they are measured. Invariant: a band is judged per step; the run stops only after several red
steps in a row, and never in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from training.utils.errors import MismatchError

GREEN, AMBER, RED = "green", "amber", "red"


class Band(NamedTuple):
    """From `amber` on a metric is worth a look, from `red` on the samples are not the policy's any more."""

    metric: str
    amber: float
    red: float


# Log-probs in bf16 differ by rounding alone; these are the widths that published runs which learn stay within.
BANDS = (
    Band("mismatch/abs_mean", 0.01, 0.05),
    Band("mismatch/k3", 0.001, 0.01),
    Band("mismatch/exp_abs_mean", 1.05, float("inf")),
)
PEARSON = Band("mismatch/pearson", 0.999, 0.99)  # here less is worse
STALENESS = "rollout/staleness"


def judge(row: Mapping[str, Any]) -> str | None:
    """The worst band of a step's metrics; None without any. Samples of older weights may differ from the trainer."""
    if row.get(STALENESS, 0) > 0:
        return None
    found = [_band(row[band.metric], band) for band in BANDS if band.metric in row]
    if PEARSON.metric in row:
        found.append(_band(-row[PEARSON.metric], Band(PEARSON.metric, -PEARSON.amber, -PEARSON.red)))
    return max(found, key=(GREEN, AMBER, RED).index, default=None)


def _band(value: float, band: Band) -> str:
    # A value that is not a number fits no band and is the worst sign of all.
    return GREEN if value < band.amber else AMBER if value < band.red else RED


class MismatchGuard:
    """Watches the steps of one run. `stop_after` red ones in a row stop it, 0 never does."""

    def __init__(self, stop_after: int, note: Callable[[str], None]) -> None:
        self._stop_after, self._note = stop_after, note
        self._red_in_a_row = 0

    def see(self, row: Mapping[str, Any]) -> None:
        """Judge one step; says so the first time it is amber or red. Raises MismatchError when the run must stop."""
        band = judge(row)
        if band is None:
            return
        self._red_in_a_row = self._red_in_a_row + 1 if band == RED else 0
        if band != GREEN:
            self._note(f"sampler and trainer disagree, band {band}: watch mismatch/* in metrics.jsonl")
        if 0 < self._stop_after <= self._red_in_a_row:
            measured = ", ".join(f"{name} {value:.3g}" for name, value in row.items() if name.startswith("mismatch/"))
            raise MismatchError(
                f"step {row['step']}: sampler and trainer disagreed for {self._red_in_a_row} steps in a row "
                f"({measured}). Check that the deployment serves this trainer's weights in its precision, then resume; "
                "--rollout.mismatch-stop-after 0 goes on regardless"
            )
