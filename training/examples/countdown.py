"""The countdown game: reach a target with each given number used exactly once. A reward that needs no model to judge.

Rows hold `ground_truth`, a JSON object (or its text) with `numbers` and `target`. The answer is the last
`<answer>` block.
"""

import ast
import json
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
FORMAT_REWARD = 0.1
LONGEST_ANSWER = 200


def reward(completion: str, row: dict[str, Any]) -> float:
    """1.0 for an equation that is right, 0.1 for an answer block that holds anything else, 0.0 without one."""
    truth = row["ground_truth"]
    truth = json.loads(truth) if isinstance(truth, str) else truth
    answers = ANSWER.findall(completion)
    if not answers:
        return 0.0
    numbers: list[int] = []
    try:
        if len(answers[-1]) > LONGEST_ANSWER:
            return FORMAT_REWARD
        value = _evaluate(ast.parse(answers[-1].strip(), mode="eval").body, numbers)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return FORMAT_REWARD
    right = value == truth["target"] and sorted(numbers) == sorted(truth["numbers"])
    return 1.0 if right else FORMAT_REWARD


def _evaluate(node: ast.expr, numbers: list[int]) -> Fraction:
    """The exact value of an arithmetic expression; collects the numbers it uses. ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_evaluate(node.left, numbers), _evaluate(node.right, numbers))
    raise ValueError("not plain arithmetic")
