"""The shapes a row of a data file may have, and what each says: a conversation, a prompt, or two answers to compare.

Knows neither files nor tokenizers. Invariant: a row fits by the names of its fields alone, the first format in the
list wins, and whatever it held is turned into messages of `role` and `content`. ValueError says what was expected.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Message = dict[str, Any]
Fields = Mapping[str, Any]

ROLES: Final = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES: Final = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}


@dataclass(frozen=True)
class Format:
    """A kind of row: the fields that give it away, and one conversation or (chosen, rejected) read out of them."""

    name: str
    fields: frozenset[str]
    read: Callable[[Fields], Any]

    def matches(self, row: Fields) -> bool:
        """Whether the row has all the fields. A table has every column in every row; None means there is no value."""
        return all(row.get(name) is not None for name in self.fields)


def detect(formats: tuple[Format, ...], row: Fields) -> Format:
    """The format of this row. Raises ValueError naming all that are known and what the row has instead."""
    found = next((known for known in formats if known.matches(row)), None)
    if found is None:
        expected = "; ".join(f"{known.name} ({', '.join(sorted(known.fields))})" for known in formats)
        raise ValueError(f"expected the fields of one of: {expected}; the row has: {', '.join(sorted(row)) or 'none'}")
    return found


def tools_of(row: Fields) -> list[Any] | None:
    """The tools offered in a row, which some files hold as JSON text. None when there are none."""
    tools = row.get("tools") or _part(row, "input").get("tools") or _part(row, "chosen").get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as exc:
            raise ValueError(f"tools: expected a list or its JSON text ({exc.msg})") from exc
    if tools is not None and not isinstance(tools, list):
        raise ValueError(f"tools: expected a list, found {type(tools).__name__}")
    return tools or None


def checked(messages: Any, where: str) -> list[Message]:
    """Messages of a row after a look at each; text in parts is joined. Raises ValueError naming the one that is off."""
    if not isinstance(messages, list) or not messages:
        found = "an empty list" if messages == [] else type(messages).__name__
        raise ValueError(f"{where}: expected a non-empty list of messages, found {found}")
    return [_checked(message, f"{where}[{index}]") for index, message in enumerate(messages)]


def _checked(message: Any, where: str) -> Message:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise ValueError(f"{where}: expected an object whose 'role' is one of {', '.join(ROLES)}; found {message!r}")
    message = {name: value for name, value in message.items() if value is not None}  # columns of a table without value
    if message.get("weight", 1) not in (0, 1):
        raise ValueError(f"{where}.weight: expected 0 or 1, found {message['weight']!r}")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        content = ""
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"{where}.content: expected text, found {type(content).__name__}")
    return {**message, "content": content}


def _text(row: Fields, name: str, default: str | None = None) -> str:
    value = row.get(name, default)
    if value is None and default is not None:
        return default
    if not isinstance(value, str):
        raise ValueError(f"{name}: expected text, found {type(value).__name__}")
    return value


def _part(row: Fields, name: str) -> Fields:
    value = row.get(name)
    return value if isinstance(value, Mapping) else {}


def _said(role: str, row: Fields, name: str) -> list[Message]:
    """A field that is either what `role` said or a list of messages."""
    if isinstance(row.get(name), str):
        return [{"role": role, "content": row[name]}]
    return checked(row.get(name), name)


def _openai(row: Fields) -> list[Message]:
    return checked(row["messages"], "messages")


def _completion(row: Fields) -> list[Message]:
    return [*_said("user", row, "prompt"), *_said("assistant", row, "completion")]


def _prompt(row: Fields) -> list[Message]:
    return _said("user", row, "prompt")


def _sharegpt_turn(turn: Any, where: str) -> Message:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if speaker not in SHAREGPT_ROLES:
        raise ValueError(f"{where}: expected 'from' to be one of {', '.join(SHAREGPT_ROLES)}; found {turn!r}")
    weight = {"weight": turn["weight"]} if "weight" in turn else {}
    return _checked({"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")} | weight, where)


def _sharegpt(row: Fields) -> list[Message]:
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError("conversations: expected a non-empty list of turns")
    messages = [_sharegpt_turn(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    system = _text(row, "system", "")
    return [{"role": "system", "content": system}, *messages] if system else messages


def _alpaca_prompt(row: Fields) -> list[Message]:
    system, extra = _text(row, "system", ""), _text(row, "input", "")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for turn in row.get("history") or []:
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise ValueError(f"history: expected pairs of instruction and output, found {turn!r}")
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    instruction = _text(row, "instruction")
    return [*messages, {"role": "user", "content": f"{instruction}\n\n{extra}" if extra else instruction}]


def _alpaca(row: Fields) -> list[Message]:
    return [*_alpaca_prompt(row), {"role": "assistant", "content": _text(row, "output")}]


def _answers(prompt: list[Message], row: Fields, *names: str) -> tuple[list[Message], list[Message]]:
    chosen, rejected = (_said("assistant", row, name) for name in names or ("chosen", "rejected"))
    if chosen[0]["role"] != "assistant":
        return chosen, rejected  # some files repeat the prompt in front of each answer
    return [*prompt, *chosen], [*prompt, *rejected]


def _fireworks_pair(row: Fields) -> tuple[list[Message], list[Message]]:
    prompt = checked(_part(row, "input").get("messages"), "input.messages")
    return _answers(prompt, row, "preferred_output", "non_preferred_output")


def _whole_pair(row: Fields) -> tuple[list[Message], list[Message]]:
    sides = []
    for name in ("chosen", "rejected"):
        if isinstance(row[name], str):
            raise ValueError(f"{name}: text alone does not say where the answer starts; add a field 'prompt'")
        held = row[name]["messages"] if "messages" in _part(row, name) else row[name]
        sides.append(checked(held, name))
    return sides[0], sides[1]


def _sharegpt_pair(row: Fields) -> tuple[list[Message], list[Message]]:
    prompt = _sharegpt(row)
    return [*prompt, _sharegpt_turn(row["chosen"], "chosen")], [*prompt, _sharegpt_turn(row["rejected"], "rejected")]


PREFERRED: Final = frozenset({"chosen", "rejected"})
CHATS: Final = (
    Format("OpenAI messages", frozenset({"messages"}), _openai),
    Format("ShareGPT", frozenset({"conversations"}), _sharegpt),
    Format("Alpaca", frozenset({"instruction", "output"}), _alpaca),
    Format("TRL prompt and completion", frozenset({"prompt", "completion"}), _completion),
)
PROMPTS: Final = (
    Format("OpenAI messages", frozenset({"messages"}), _openai),
    Format("ShareGPT", frozenset({"conversations"}), _sharegpt),
    Format("Alpaca", frozenset({"instruction"}), _alpaca_prompt),
    Format("TRL prompt", frozenset({"prompt"}), _prompt),
)
PREFERENCES: Final = (
    Format("Fireworks preferences", frozenset({"input", "preferred_output", "non_preferred_output"}), _fireworks_pair),
    Format("ShareGPT preferences", PREFERRED | {"conversations"}, _sharegpt_pair),
    Format("Alpaca preferences", PREFERRED | {"instruction"}, lambda row: _answers(_alpaca_prompt(row), row)),
    Format("TRL preferences", PREFERRED | {"prompt"}, lambda row: _answers(_prompt(row), row)),
    Format("pairs of whole conversations", PREFERRED, _whole_pair),
)
