"""Rows of a data set: conversations for SFT, prompts for RL, pairs for preferences, and the order of a run's visits.

Knows neither tokenizers nor trainers. Invariant: the order depends on the seed and the position alone, so that the
number of rows consumed is all a run needs to continue where it stopped.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar

from training.utils import formats
from training.utils.errors import DataError

HUB = "hf://"


class HasKind(Protocol):
    @property
    def kind(self) -> str: ...


R = TypeVar("R")
Source = str | Path
"""A JSONL file, a folder that Hugging Face `datasets` saved, or `hf://<owner>/<name>[:<split>]` on the hub."""


@dataclass(frozen=True)
class Row:
    """One row: its conversation, all its fields for a reward function, where it came from, the format it was in."""

    messages: list[dict[str, Any]]
    fields: dict[str, Any]
    origin: str
    kind: str = formats.CHATS[0].name


@dataclass(frozen=True)
class Pair:
    """Two conversations that share a beginning; only what differs may be trained, so all before it has weight 0."""

    chosen: Row
    rejected: Row

    @property
    def kind(self) -> str:
        return self.chosen.kind


def load_chats(source: Source) -> list[Row]:
    """Rows to imitate, in any format of `formats.CHATS`.

    Raises DataError with file:line for a row that fits none, or has nothing to imitate.
    """
    rows = _rows(source, formats.CHATS)
    for row in rows:
        if not any(message["role"] == "assistant" for message in row.messages):
            raise DataError(f"{row.origin}: no assistant message to learn from; add one")
    return rows


def load_prompts(source: Source) -> list[Row]:
    """Rows to answer, in any format of `formats.PROMPTS`, with whatever fields the reward reads.

    Raises DataError with file:line for a row that fits none, or is answered already.
    """
    rows = _rows(source, formats.PROMPTS)
    for row in rows:
        if row.messages[-1]["role"] == "assistant":
            raise DataError(f"{row.origin}: the last message is the assistant's; the model has nothing left to answer")
    return rows


def load_preferences(source: Source) -> list[Pair]:
    """Pairs of a better and a worse answer, in any format of `formats.PREFERENCES`. Raises DataError with file:line."""
    pairs = []
    for origin, fields in _records(source):
        try:
            found = formats.detect(formats.PREFERENCES, fields)
            sides = _without_shared(*found.read(fields))
            pairs.append(Pair(*(_row(side, fields, origin, found.name) for side in sides)))
        except ValueError as exc:
            raise DataError(f"{origin}: {exc}") from exc
    return _some(pairs, source)


def load_any(source: Source) -> list[Row] | list[Pair]:
    """Pairs if the first row is one, else conversations, whether answered or not. Raises DataError with file:line."""
    _, first = next(_records(source), ("", {}))
    is_pair = any(known.matches(first) for known in formats.PREFERENCES)
    return load_preferences(source) if is_pair else _rows(source, formats.CHATS + formats.PROMPTS)


def describe(rows: Sequence[HasKind], source: Source) -> str:
    """How many rows of which format were found, as a line to print."""
    kinds = Counter(row.kind for row in rows)
    return f"{source}: " + ", ".join(f"{count} rows of {kind}" for kind, count in kinds.most_common())


def split(rows: list[R], held_out_fraction: float, seed: int) -> tuple[list[R], list[R]]:
    """(rows to train on, rows held out), chosen by the seed. Raises DataError when a side would be empty."""
    num_held_out = round(len(rows) * held_out_fraction)
    if held_out_fraction > 0 and not 0 < num_held_out < len(rows):
        raise DataError(f"eval_fraction {held_out_fraction} of {len(rows)} rows leaves one side empty; change it")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    held_out = set(order[:num_held_out])
    return [r for i, r in enumerate(rows) if i not in held_out], [r for i, r in enumerate(rows) if i in held_out]


def batch_at(num_rows: int, consumed: int, size: int, seed: int) -> list[int]:
    """Indices of the next `size` rows after `consumed`, in an endless stream that is reshuffled every epoch."""
    positions = range(consumed, consumed + size)
    return [_order(num_rows, position // num_rows, seed)[position % num_rows] for position in positions]


@lru_cache(maxsize=2)
def _order(num_rows: int, epoch: int, seed: int) -> list[int]:
    order = list(range(num_rows))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def _rows(source: Source, known: tuple[formats.Format, ...]) -> list[Row]:
    rows = []
    for origin, fields in _records(source):
        try:
            found = formats.detect(known, fields)
            rows.append(_row(found.read(fields), fields, origin, found.name))
        except ValueError as exc:
            raise DataError(f"{origin}: {exc}") from exc
    return _some(rows, source)


def _row(messages: list[formats.Message], fields: dict[str, Any], origin: str, kind: str) -> Row:
    return Row(messages, fields | {"messages": messages, "tools": formats.tools_of(fields)}, origin, kind)


def _without_shared(
    chosen: list[formats.Message], rejected: list[formats.Message]
) -> tuple[list[formats.Message], list[formats.Message]]:
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if shared is None:
        fix = "each needs an answer of its own behind the shared prompt"
        raise ValueError(f"chosen and rejected say the same, or one is the beginning of the other: {fix}")
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[shared]["role"] != "assistant":
            role = side[shared]["role"]
            raise ValueError(f"{name}: messages[{shared}] is where the two part, and it is the {role}'s, not an answer")
    context = [message | {"weight": 0} for message in chosen[:shared]]
    return [*context, *chosen[shared:]], [*context, *rejected[shared:]]


def _records(source: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    if str(source).startswith(HUB) or Path(source).expanduser().is_dir():
        return _dataset_rows(str(source))
    return _json_lines(source)


def _json_lines(path: Source) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except OSError as exc:
        raise DataError(f"cannot read the data file {str(path)!r}: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise DataError(f"{path}: not UTF-8 text at byte {exc.start}; save the file as UTF-8 JSON lines") from exc
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        origin = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as exc:
            raise DataError(f"{origin}: not JSON ({exc.msg} at column {exc.colno}); one object per line") from exc
        if not isinstance(fields, dict):
            raise DataError(f"{origin}: expected a JSON object, found {type(fields).__name__}")
        yield origin, fields


def _dataset_rows(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        from datasets import Dataset, load_dataset, load_from_disk
    except ImportError as exc:
        raise DataError(f"{source}: reading it needs the package 'datasets': pip install 'firebox[datasets]'") from exc
    name, _, part = source.removeprefix(HUB).partition(":")
    try:
        if source.startswith(HUB):
            rows = load_dataset(name, split=part or "train")
        else:
            rows = load_from_disk(str(Path(source).expanduser()))
    except (OSError, ValueError) as exc:
        raise DataError(f"{source} cannot be read as a Hugging Face data set: {exc}") from exc
    if not isinstance(rows, Dataset):
        raise DataError(f"{source}: holds the splits {', '.join(rows)}; give the folder of one of them")
    for number, fields in enumerate(rows):
        yield f"{source}:{number}", dict(fields)


def _some(rows: list[R], source: Source) -> list[R]:
    if not rows:
        raise DataError(f"{source}: no rows; expected one JSON object per line")
    return rows
