"""What a frozen reference thinks of preference pairs: asking it once, and remembering the answers.

Knows neither losses nor where a reference runs. Invariant: a run keeps the reference it began with; a resumed one reads
what was said then, because the weights that said it may be gone, and refuses answers about other pairs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from training.utils.config import InfraConfig
from training.utils.errors import CheckpointError
from training.utils.pairs import Forward, RenderedPair, answer_logprobs, score

if TYPE_CHECKING:
    from torch import Tensor

FILE_NAME = "logprobs.json"
FIRST_WEIGHTS = "the weights this run began with"


@dataclass(frozen=True)
class Reference:
    """Log-probs of (chosen, rejected) answers under the weights of `who`, by pair."""

    who: str
    logprobs: dict[str, tuple[float, float]]

    def of(self, pairs: Sequence[RenderedPair]) -> tuple[Tensor, Tensor]:
        """(chosen [B], rejected [B]) of these pairs."""
        import torch

        said = torch.tensor([self.logprobs[_key(pair)] for pair in pairs], dtype=torch.float64)
        return said[:, 0], said[:, 1]

    def save(self, folder: Path) -> None:
        """Write it to this folder, whole or not at all."""
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{FILE_NAME}.part"
        with part.open("w", encoding="utf-8") as file:
            json.dump({"who": self.who, "logprobs": self.logprobs}, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / FILE_NAME)


def who_is_reference(base_model: str, lora_rank: int, infra: InfraConfig) -> str:
    """Whose opinion counts: the base model's where it can be asked, else that of the run's own first weights."""
    return base_model if infra.ref_training_shape_id or lora_rank else FIRST_WEIGHTS


def ask(forward: Forward, who: str, pairs: Sequence[RenderedPair], batch_size: int) -> Reference:
    """The log-probs of all these pairs, `batch_size` pairs at a time."""
    chosen, rejected = answer_logprobs(score(forward, pairs, batch_size), pairs)
    said = zip(chosen.tolist(), rejected.tolist(), strict=True)
    return Reference(who, dict(zip(map(_key, pairs), said, strict=True)))


def recall(folder: Path, who: str, pairs: Sequence[RenderedPair]) -> Reference | None:
    """What `save` wrote when the run began; None when it is not there and `who` can be asked again.

    Raises CheckpointError when it is lost for good, or about something else.
    """
    path, fix = folder / FILE_NAME, "choose another log_path to begin anew"
    if not path.exists():
        if who == FIRST_WEIGHTS:
            raise CheckpointError(f"{path} is missing, and {who} are gone: set infra.ref_training_shape_id, or {fix}")
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        reference = Reference(held["who"], {key: (said[0], said[1]) for key, said in held["logprobs"].items()})
    except (ValueError, KeyError, TypeError, IndexError) as exc:
        raise CheckpointError(f"{path} does not hold a reference's log-probs ({exc!r}): {fix}") from exc
    if reference.who != who:
        raise CheckpointError(f"{path} holds log-probs of {reference.who}, not of {who}: {fix}")
    missing = sum(_key(pair) not in reference.logprobs for pair in pairs)
    if missing:
        raise CheckpointError(f"{path} lacks {missing} of {len(pairs)} pairs, so the data or its length changed: {fix}")
    return reference


def _key(pair: RenderedPair) -> str:
    """A name that two pairs share only when tokens and weights are the same."""
    return hashlib.sha256(json.dumps([[side.tokens, side.weights] for side in pair]).encode()).hexdigest()[:32]
