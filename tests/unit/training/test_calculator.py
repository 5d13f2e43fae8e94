"""The tool-use example: calls are computed or answered with what is wrong, the whole conversation is rewarded."""

import json
from pathlib import Path

import numpy as np
import pytest

from training.examples.calculator import Calculator, make_data, result, reward
from training.utils.data import Row, load_chats, load_prompts
from training.utils.render import load_tokenizer, render_chat
from training.utils.rl.trajectory import Message, Prompt, Trajectory

ROW = Row([{"role": "user", "content": "What is 37 + 46?"}], {"answer": "83"}, "rows.jsonl:1")


def call(expression: object) -> str:
    return f"<tool_call>{json.dumps({'name': 'calculator', 'arguments': {'expression': expression}})}</tool_call>"


def talked(*turns: str) -> Trajectory:
    """The conversation in which the model says `turns` and the calculator answers."""
    calculator, messages = Calculator({}), list(ROW.messages)
    for text in turns:
        replies: list[Message] = calculator(text)
        messages += [{"role": "assistant", "content": text}, *replies]
    return Trajectory(Prompt(ROW, [1]), [2], np.zeros(1), np.array([True]), messages, turns[-1], len(turns), False, 0)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (json.dumps({"name": "calculator", "arguments": {"expression": "(37 + 46) / 4"}}), "83/4"),
        (json.dumps({"name": "search", "arguments": {}}), "error: the only tool is calculator"),
        (json.dumps({"name": "calculator", "arguments": {"expression": "1/0"}}), "error: division by zero"),
        (json.dumps({"name": "calculator", "arguments": {"expression": "exit()"}}), "error: not plain arithmetic"),
        (json.dumps({"name": "calculator", "arguments": {"expression": 5}}), "error: "),
        (json.dumps({"name": "calculator"}), "error: 'arguments'"),
        ("[" * 100_000, "error: "),
        ("37 + 46", "error: "),
    ],
)
def test_a_call_is_computed_or_answered_with_what_is_wrong(asked: str, expected: str) -> None:
    assert result(asked).startswith(expected)


def test_every_call_of_a_turn_is_answered_and_a_turn_without_one_ends() -> None:
    calculator = Calculator({})
    assert [message["content"] for message in calculator(call("1 + 1") + " and " + call("2 * 3"))] == ["2", "6"]
    assert calculator("It is 83.") == []


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ((call("37 + 46"), "83"), 1.0),
        (("It is 83.",), 1.0),
        ((call("37 + 64"), "101"), 0.1),
        ((call("37 +"), "82"), 0.0),
        (("82",), 0.0),
    ],
)
def test_the_reward_is_of_the_whole_conversation(turns: tuple[str, ...], expected: float) -> None:
    assert reward(talked(*turns)) == expected


def test_the_data_loads_in_the_recipes_and_keeps_its_halves_apart(tmp_path: Path, tiny_dir: Path) -> None:
    demonstrations, questions = make_data(tmp_path, seed=3)
    chats, prompts, tokenizer = load_chats(demonstrations), load_prompts(questions), load_tokenizer(str(tiny_dir))
    asked = {row.messages[1]["content"] for row in chats}
    assert not asked & {row.messages[1]["content"] for row in prompts}
    text = tokenizer.decode([t for one in render_chat(tokenizer, chats[0]) for t in one.trained_tokens])
    assert text.count("<|im_end|>") == 2
    assert "<tool_call>" in text
    assert reward(talked(*[m["content"] for m in chats[0].messages if m["role"] == "assistant"])) in (0.1, 1.0)
