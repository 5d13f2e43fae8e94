"""Sums that are easier with a tool: an environment that computes, a reward of the whole conversation, and its data.

    python -m training.examples.calculator --out DIR

writes `demonstrations.jsonl`, conversations to imitate, and `questions.jsonl` for RL. A call is a `<tool_call>` block
around a JSON object with `name` and `arguments`, as models of the Qwen and Hermes families write it. A system message
says so, because not every chat template describes tools; where one does, rows may have `tools` instead. The environment
answers every call with a message of role `tool`; a turn without a call ends the conversation.
"""

import argparse
import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from training.examples.arithmetic import evaluate
from training.examples.maths import final_number
from training.utils.rl.trajectory import Trajectory

Message = dict[str, Any]

CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
SYSTEM: Final = (
    'To compute, answer <tool_call>{"name": "calculator", "arguments": {"expression": "1 + 2"}}</tool_call> and wait.'
)
CALL_REWARD = 0.1
DEMONSTRATIONS, QUESTIONS = 2000, 400


class Calculator:
    """One conversation's calculator."""

    def __init__(self, row: dict[str, Any]) -> None:
        pass  # a tool with a state, a sandbox say, would be set up for the row here

    def __call__(self, completion: str) -> list[Message]:
        """The result of each call in what the model said, or what is wrong with it."""
        return [{"role": "tool", "content": result(call)} for call in CALL.findall(completion)]


def reward(trajectory: Trajectory) -> float:
    """1.0 for the right number in the last turn, 0.1 for a call that could be computed, else 0.0."""
    if final_number(trajectory.text) == final_number(str(trajectory.prompt.row.fields["answer"])):
        return 1.0
    results = [message["content"] for message in trajectory.messages if message["role"] == "tool"]
    return CALL_REWARD if any(not content.startswith("error") for content in results) else 0.0


def result(call: str) -> str:
    """The number that a call asks for, or the error that the model is told."""
    try:
        request = json.loads(call)
        if request["name"] != "calculator":
            return "error: the only tool is calculator"
        value, _ = evaluate(request["arguments"]["expression"])
    except (ValueError, KeyError, TypeError, RecursionError) as exc:
        return f"error: {exc}"
    return str(value)


def make_data(out_dir: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write both files to `out_dir`. A sum appears in one of them only."""
    out_dir.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    sums = [f"{a} {sign} {b}" for a in range(10, 100) for b in range(10, 100) for sign in "+-"]
    rng.shuffle(sums)
    demonstrations, questions = out_dir / "demonstrations.jsonl", out_dir / "questions.jsonl"
    _write(demonstrations, (_demonstration(s) for s in sums[:DEMONSTRATIONS]))
    _write(questions, (_question(s) for s in sums[DEMONSTRATIONS : DEMONSTRATIONS + QUESTIONS]))
    return demonstrations, questions


def _demonstration(expression: str) -> dict[str, Any]:
    call = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
    asked = _question(expression)
    turns = [
        {"role": "assistant", "content": f"<tool_call>{call}</tool_call>"},
        {"role": "tool", "content": asked["answer"]},
        {"role": "assistant", "content": asked["answer"]},
    ]
    return {"messages": [*asked["messages"], *turns]}


def _question(expression: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"What is {expression}?"}]
    return {"messages": messages, "answer": str(evaluate(expression)[0])}


def _write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the rows of the calculator example.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(*make_data(arguments.out, arguments.seed), sep="\n")


if __name__ == "__main__":
    main()
