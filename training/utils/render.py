"""Conversations to tokens, through the tokenizer's chat template, with a weight per token.

Knows nothing of files, datums or trainers. Invariant: a token has weight 1 exactly when the model itself would have to
sample it: the assistant's text and the stop token that ends its turn, never the scaffolding around them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.utils.data import Row
from training.utils.errors import DataError

Message = dict[str, Any]


@dataclass(frozen=True)
class Rendered:
    """Token ids [T] of one conversation and the 0/1 weight of each [T]."""

    tokens: list[int]
    weights: list[float]

    @property
    def num_trained(self) -> int:
        return sum(weight > 0 for weight in self.weights)

    @property
    def trained_tokens(self) -> list[int]:
        return [token for token, weight in zip(self.tokens, self.weights, strict=True) if weight > 0]


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local directory or a hub name. Raises DataError when it is missing or has no chat template."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(Path(name).expanduser()) if name.startswith("~") else name)
    except (OSError, ValueError) as exc:
        fix = "give a local directory that holds tokenizer.json, or a hub name this machine can download"
        raise DataError(f"tokenizer_model {name!r} cannot be loaded: {fix} ({str(exc).splitlines()[0]})") from exc
    if not tokenizer.chat_template:
        raise DataError(
            f"tokenizer_model {name!r} has no chat template: add chat_template.jinja to the model directory"
        )
    if tokenizer.eos_token_id is None:
        raise DataError(f"tokenizer_model {name!r} names no eos_token: set the token that ends an assistant's turn")
    return tokenizer


def render_prompt(tokenizer: Any, row: Row) -> list[int]:
    """Token ids of a conversation up to where the assistant starts to speak."""
    return _template(tokenizer, row.messages, row, add_generation_prompt=True)


def render_chat(tokenizer: Any, row: Row) -> Rendered:
    """Token ids and weights of a whole conversation. Raises DataError when nothing of it could be trained."""
    spans = (
        _tagged_spans(tokenizer, row) if "{% generation" in tokenizer.chat_template else _prefix_spans(tokenizer, row)
    )
    tokens = _template(tokenizer, row.messages, row)
    weights = [0.0] * len(tokens)
    replies = [message for message in row.messages if message["role"] == "assistant"]
    for message, (start, end) in zip(replies, spans, strict=True):
        end = _with_stop_token(tokenizer, tokens, start, end, row)
        weights[start:end] = [float(message.get("weight", 1))] * (end - start)
    rendered = Rendered(tokens, weights)
    if rendered.num_trained == 0:
        raise DataError(f"{row.origin}: no token to train on; give at least one assistant message weight 1")
    return rendered


def _with_stop_token(tokenizer: Any, tokens: list[int], start: int, end: int, row: Row) -> int:
    """End of the span just behind the turn's stop token, which templates put before, at or behind their own end."""
    eos = tokenizer.eos_token_id
    for position in range(start, min(end + 1, len(tokens))):
        if tokens[position] == eos:
            return position + 1
    raise DataError(
        f"{row.origin}: the chat template ends an assistant's turn without {tokenizer.eos_token!r}, "
        "so the model would never learn to stop; set eos_token to the token that ends a turn"
    )


def _tagged_spans(tokenizer: Any, row: Row) -> list[tuple[int, int]]:
    """Spans that the template itself marks as generated, one per assistant message."""
    encoded = tokenizer.apply_chat_template(
        _plain(row.messages), tools=row.fields.get("tools"), return_dict=True, return_assistant_tokens_mask=True
    )
    mask = [0, *encoded["assistant_masks"], 0]
    starts = [i for i in range(len(mask) - 1) if mask[i + 1] and not mask[i]]
    ends = [i for i in range(len(mask) - 1) if mask[i] and not mask[i + 1]]
    num_replies = sum(message["role"] == "assistant" for message in row.messages)
    if len(starts) != num_replies:
        raise DataError(
            f"{row.origin}: the chat template marks {len(starts)} generated spans for {num_replies} replies; "
            "an empty reply or a template that merges turns cannot be trained"
        )
    return list(zip(starts, ends, strict=True))


def _prefix_spans(tokenizer: Any, row: Row) -> list[tuple[int, int]]:
    """Spans found by rendering up to each reply and past it, proven to be prefixes of the whole conversation."""
    whole, spans = _template(tokenizer, row.messages, row), []
    for index, message in enumerate(row.messages):
        if message["role"] != "assistant":
            continue
        before = _template(tokenizer, row.messages[:index], row, add_generation_prompt=True)
        after = _template(tokenizer, row.messages[: index + 1], row)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            raise DataError(
                f"{row.origin}: messages[{index}]: the chat template renders this turn differently once others follow, "
                "so what the model would sample is unknown; keep one assistant message per row, "
                "or use a template with {% generation %} tags"
            )
        spans.append((len(before), len(after)))
    return spans


def _template(tokenizer: Any, messages: list[Message], row: Row, add_generation_prompt: bool = False) -> list[int]:
    from jinja2 import TemplateError

    try:
        tokens: list[int] = tokenizer.apply_chat_template(
            _plain(messages),
            tools=row.fields.get("tools"),
            add_generation_prompt=add_generation_prompt,
            return_dict=False,
        )
    except TemplateError as exc:
        raise DataError(f"{row.origin}: the chat template refuses these messages: {exc}") from exc
    return tokens


def _plain(messages: list[Message]) -> list[Message]:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]
