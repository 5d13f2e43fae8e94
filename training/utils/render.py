"""Conversations to tokens, through the tokenizer's chat template, with a weight per token.

Knows nothing of files, datums or trainers. Invariant: a token has weight 1 exactly when the model itself would have to
sample it: the assistant's text and the stop token that ends its turn, never the scaffolding around them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from training.utils.data import Pair, Row
from training.utils.errors import DataError

Message = dict[str, Any]
Span = tuple[int, int]
GENERATION_TAG = re.compile(r"{%-?\s*generation\b")


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

    def cut(self, limit: int) -> Rendered:
        """The first `limit` tokens. Behind the cut lies the stop token, so a model never learns from it to stop."""
        return Rendered(self.tokens[:limit], self.weights[:limit])


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a local directory or a hub name, from this machine's files before the network.

    Raises DataError when it is missing, has no chat template or no token that ends a turn.
    """
    from transformers import AutoTokenizer

    place = str(Path(name).expanduser()) if name.startswith("~") else name
    try:
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True)
        except OSError:
            tokenizer = AutoTokenizer.from_pretrained(place)
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


def render_chat(tokenizer: Any, row: Row) -> list[Rendered]:
    """Token ids and weights of a whole conversation, all of its replies in one.

    Some templates render a reply differently once others follow, as thinking models drop earlier thoughts. What was
    sampled then is no part of the whole, and each reply is rendered with what came before it alone. Raises DataError
    when nothing could be trained.
    """
    rendered = _render(tokenizer, row)
    if rendered is not None:
        return [rendered]
    replies = [_up_to_reply(row, index) for index in _trained_replies(row)]
    return [_render_whole(tokenizer, reply) for reply in replies]


def render_pair(tokenizer: Any, pair: Pair) -> tuple[Rendered, Rendered]:
    """(chosen, rejected). Raises DataError when a side cannot be rendered as one."""
    return _render_whole(tokenizer, pair.chosen), _render_whole(tokenizer, pair.rejected)


def _render_whole(tokenizer: Any, row: Row) -> Rendered:
    rendered = _render(tokenizer, row)
    if rendered is None:
        raise DataError(
            f"{row.origin}: the chat template renders a reply differently than the model would sample it: it begins or "
            "ends in another way than behind the prompt alone; let one message be trained, set chat_template_kwargs in "
            "the row (enable_thinking, say), or use a template with {% generation %} tags"
        )
    return rendered


def _render(tokenizer: Any, row: Row) -> Rendered | None:
    """The whole conversation, or None where the replies to train are not what the model would have sampled."""
    tokens = _template(tokenizer, row.messages, row)
    tagged = GENERATION_TAG.search(_source(tokenizer, row))
    spans = _tagged_spans(tokenizer, row, tokens) if tagged else _prefix_spans(tokenizer, row, tokens)
    if spans is None:
        return None
    weights = [0.0] * len(tokens)
    for start, end in spans:
        end = _with_stop_token(tokenizer, tokens, start, end, row)
        weights[start:end] = [1.0] * (end - start)
    if not any(weights):
        raise DataError(f"{row.origin}: no token to train on; give at least one assistant message weight 1")
    return Rendered(tokens, weights)


def _replies(row: Row) -> list[int]:
    return [index for index, message in enumerate(row.messages) if message["role"] == "assistant"]


def _trained_replies(row: Row) -> list[int]:
    return [index for index in _replies(row) if row.messages[index].get("weight", 1)]


def _up_to_reply(row: Row, index: int) -> Row:
    """The conversation as it stood when this reply was given, with this reply alone to train."""
    context = [message | {"weight": 0} for message in row.messages[:index]]
    return replace(row, messages=[*context, row.messages[index]])


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


def _tagged_spans(tokenizer: Any, row: Row, whole: list[int]) -> list[Span]:
    """Spans of the replies to train, which the template itself marks as generated.

    Some templates also mark what they put in front of a reply when the model is to speak; nobody samples that.
    """
    encoded = _apply(tokenizer, row.messages, row, return_dict=True, return_assistant_tokens_mask=True)
    mask = [0, *encoded["assistant_masks"], 0]
    starts = [i for i in range(len(mask) - 1) if mask[i + 1] and not mask[i]]
    ends = [i for i in range(len(mask) - 1) if mask[i] and not mask[i + 1]]
    replies, trained = _replies(row), _trained_replies(row)
    if len(starts) != len(replies):
        raise DataError(
            f"{row.origin}: the chat template marks {len(starts)} generated spans for {len(replies)} replies; "
            "an empty reply or a template that merges turns cannot be trained"
        )
    spans = []
    for index, start, end in zip(replies, starts, ends, strict=True):
        if index in trained:
            before = _template(tokenizer, row.messages[:index], row, add_generation_prompt=True)
            given = len(before) if whole[: len(before)] == before else 0
            spans.append((max(start, given), end))
    return spans


def _prefix_spans(tokenizer: Any, row: Row, whole: list[int]) -> list[Span] | None:
    """Spans of the replies to train, from rendering up to each and past it. None unless both begin the whole."""
    spans = []
    for index in _trained_replies(row):
        before = _template(tokenizer, row.messages[:index], row, add_generation_prompt=True)
        after = _template(tokenizer, row.messages[: index + 1], row)
        if whole[: len(before)] != before or whole[: len(after)] != after:
            return None
        spans.append((len(before), len(after)))
    return spans


def _source(tokenizer: Any, row: Row) -> str:
    source: str = tokenizer.get_chat_template(tools=row.fields.get("tools"))
    return source


def _template(tokenizer: Any, messages: list[Message], row: Row, add_generation_prompt: bool = False) -> list[int]:
    from jinja2 import TemplateError

    uses = {"tools": bool(row.fields.get("tools")), "tool_calls": any("tool_calls" in message for message in messages)}
    lost = [name for name, used in uses.items() if used and name not in _source(tokenizer, row)]
    if lost:
        raise DataError(
            f"{row.origin}: the chat template leaves out {lost[0]!r}; use a tokenizer whose template has it"
        )
    try:
        tokens: list[int] = _apply(
            tokenizer, messages, row, return_dict=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as exc:
        raise DataError(f"{row.origin}: the chat template refuses these messages: {exc}") from exc
    return tokens


def _apply(tokenizer: Any, messages: list[Message], row: Row, **options: bool) -> Any:
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in messages]
    settings = row.fields.get("chat_template_kwargs") or {}
    if not isinstance(settings, dict):
        raise DataError(f"{row.origin}: chat_template_kwargs: expected an object, found {type(settings).__name__}")
    return tokenizer.apply_chat_template(plain, tools=row.fields.get("tools"), **settings, **options)
