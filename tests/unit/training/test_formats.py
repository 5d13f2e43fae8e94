"""Every format of a row, as its community writes it, and the conversation that comes out of each."""

from __future__ import annotations

from typing import Any

import pytest

from training.utils import formats

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = {"role": "assistant", "content": "4"}, {"role": "assistant", "content": "5"}
CALL = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]

CHATS: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("OpenAI messages", {"messages": [SYSTEM, USER, GOOD]}, [SYSTEM, USER, GOOD]),
    ("OpenAI messages", {"messages": [USER | {"content": [{"type": "text", "text": "2+2?"}]}, GOOD]}, [USER, GOOD]),
    (
        "OpenAI messages",
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": CALL}]},
        [USER, {"role": "assistant", "content": "", "tool_calls": CALL}],
    ),
    (
        "ShareGPT",
        {"system": "Be brief.", "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        [SYSTEM, USER, GOOD],
    ),
    ("Alpaca", {"instruction": "2+2?", "input": "", "output": "4"}, [USER, GOOD]),
    (
        "Alpaca",
        {"instruction": "Add.", "input": "2+2?", "output": "4", "system": "Be brief.", "history": [["Hi", "Ho"]]},
        [
            SYSTEM,
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Ho"},
            {"role": "user", "content": "Add.\n\n2+2?"},
            GOOD,
        ],
    ),
    ("TRL prompt and completion", {"prompt": "2+2?", "completion": "4"}, [USER, GOOD]),
    ("TRL prompt and completion", {"prompt": [SYSTEM, USER], "completion": [GOOD]}, [SYSTEM, USER, GOOD]),
    # A table read back from disk has every column in every row.
    ("Alpaca", {"messages": None, "instruction": "2+2?", "input": None, "output": "4"}, [USER, GOOD]),
]

PAIRS: list[tuple[str, dict[str, Any]]] = [
    (
        "Fireworks preferences",
        {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]},
    ),
    ("pairs of whole conversations", {"chosen": {"messages": [USER, GOOD]}, "rejected": {"messages": [USER, BAD]}}),
    ("pairs of whole conversations", {"chosen": [USER, GOOD], "rejected": [USER, BAD]}),
    ("TRL preferences", {"prompt": "2+2?", "chosen": "4", "rejected": "5"}),
    ("TRL preferences", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}),
    # UltraFeedback names the prompt and repeats it in both answers.
    ("TRL preferences", {"prompt": "2+2?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}),
    (
        "ShareGPT preferences",
        {
            "conversations": [{"from": "human", "value": "2+2?"}],
            "chosen": {"from": "gpt", "value": "4"},
            "rejected": {"from": "gpt", "value": "5"},
        },
    ),
    ("Alpaca preferences", {"instruction": "2+2?", "chosen": "4", "rejected": "5"}),
]


@pytest.mark.parametrize(("name", "row", "messages"), CHATS)
def test_chats(name: str, row: dict[str, Any], messages: list[dict[str, Any]]) -> None:
    found = formats.detect(formats.CHATS, row)
    assert found.name == name
    assert found.read(row) == messages


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("OpenAI messages", {"messages": [USER]}),
        ("ShareGPT", {"conversations": [{"from": "human", "value": "2+2?"}]}),
        ("Alpaca", {"instruction": "2+2?", "output": "4"}),
        ("TRL prompt", {"prompt": "2+2?"}),
        ("TRL prompt", {"prompt": [USER]}),
    ],
)
def test_prompts(name: str, row: dict[str, Any]) -> None:
    found = formats.detect(formats.PROMPTS, row)
    assert (found.name, found.read(row)) == (name, [USER])


@pytest.mark.parametrize(("name", "row"), PAIRS)
def test_preferences(name: str, row: dict[str, Any]) -> None:
    found = formats.detect(formats.PREFERENCES, row)
    assert (found.name, found.read(row)) == (name, ([USER, GOOD], [USER, BAD]))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "robot", "value": "x"}]}, r"conversations\[0\]: expected 'from' to be one of"),
        ({"conversations": []}, "conversations: expected a non-empty list"),
        ({"instruction": 3, "output": "4"}, "instruction: expected text, found int"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "history: expected pairs"),
        ({"messages": [USER | {"content": [{"type": "image_url"}]}]}, r"messages\[0\].content: expected text"),
        ({"messages": [{"role": "assistant", "content": None}]}, r"messages\[0\].content: expected text, found None"),
        ({"prompt": [], "completion": "x"}, "prompt: expected a non-empty list of messages, found an empty list"),
    ],
)
def test_what_is_off_is_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        formats.detect(formats.CHATS, row).read(row)


def test_tools_are_found_where_each_format_keeps_them() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    assert formats.tools_of({"tools": tools}) == tools
    assert formats.tools_of({"tools": '[{"type": "function", "function": {"name": "add"}}]'}) == tools
    assert formats.tools_of({"input": {"messages": [USER], "tools": tools}}) == tools
    assert formats.tools_of({"input": "text of an Alpaca row"}) is None
    with pytest.raises(ValueError, match="tools: expected a list, found dict"):
        formats.tools_of({"tools": {"name": "add"}})
