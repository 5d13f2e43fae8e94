"""Rows from JSONL files: conversations for SFT, prompts for RL, and the order in which a run visits them.

Knows neither tokenizers nor trainers. Invariant: the order depends on the seed and the position alone, so that the
number of rows consumed is all a run needs to continue where it stopped.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.utils.errors import DataError

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Row:
    """One line of a data file: its conversation, all its fields for a reward function, and where it came from."""

    messages: list[dict[str, Any]]
    fields: dict[str, Any]
    origin: str


def load_chats(path: str | Path) -> list[Row]:
    """Rows to imitate: `{"messages": [...]}` ending in the assistant, or `{"prompt", "completion"}` as one exchange.

    Raises DataError with file:line for a row that holds neither or has nothing to imitate.
    """
    rows = []
    for origin, fields in _read(path):
        if "messages" not in fields and {"prompt", "completion"} <= fields.keys():
            fields["messages"] = [
                {"role": "user", "content": fields["prompt"]},
                {"role": "assistant", "content": fields["completion"]},
            ]
        messages = _messages(origin, fields)
        if not any(message["role"] == "assistant" for message in messages):
            raise DataError(f"{origin}: no assistant message to learn from; add one")
        rows.append(Row(messages, fields, origin))
    return _some(rows, path)


def load_prompts(path: str | Path) -> list[Row]:
    """Rows to answer: `{"messages": [...]}` ending before the assistant, or `{"prompt": text}`, plus whatever fields
    the reward reads. Raises DataError with file:line."""
    rows = []
    for origin, fields in _read(path):
        if "messages" not in fields and "prompt" in fields:
            fields["messages"] = [{"role": "user", "content": fields["prompt"]}]
        messages = _messages(origin, fields)
        if messages[-1]["role"] == "assistant":
            raise DataError(f"{origin}: the last message is the assistant's; the model has nothing left to answer")
        rows.append(Row(messages, fields, origin))
    return _some(rows, path)


def split(rows: list[Row], held_out_fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
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
    order: dict[int, list[int]] = {}
    for epoch in {position // num_rows for position in range(consumed, consumed + size)}:
        order[epoch] = list(range(num_rows))
        random.Random(f"{seed}/{epoch}").shuffle(order[epoch])
    return [order[position // num_rows][position % num_rows] for position in range(consumed, consumed + size)]


def _read(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _messages(origin: str, fields: dict[str, Any]) -> list[dict[str, Any]]:
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        found = ", ".join(sorted(fields)) or "nothing"
        raise DataError(f"{origin}: expected a non-empty list 'messages' (or 'prompt' text); the row has: {found}")
    for index, message in enumerate(messages):
        where = f"{origin}: messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise DataError(f"{where}: expected an object whose 'role' is one of {', '.join(ROLES)}; found {message!r}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{where}.content: expected text, found {type(message.get('content')).__name__}")
        if message.get("weight", 1) not in (0, 1):
            raise DataError(f"{where}.weight: expected 0 or 1, found {message['weight']!r}")
    return messages


def _some(rows: list[Row], path: str | Path) -> list[Row]:
    if not rows:
        raise DataError(f"{path}: no rows; expected one JSON object per line")
    return rows
