"""Exact plain arithmetic from text: integers, + - * / and brackets. Nothing is executed.

Invariant: whatever the text is, the answer is a fraction or a ValueError, and it comes at once.
"""

import ast
import operator
from collections.abc import Callable
from fractions import Fraction

OPERATORS: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
LONGEST = 200


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The value of an expression, and the numbers in it. Raises ValueError for anything that is not one."""
    if len(text) > LONGEST:
        raise ValueError(f"longer than {LONGEST} characters")
    numbers: list[int] = []
    try:
        value = _value(ast.parse(text.strip(), mode="eval").body, numbers)
    except (SyntaxError, RecursionError, MemoryError) as exc:
        raise ValueError("not plain arithmetic") from exc
    except ZeroDivisionError as exc:
        raise ValueError("division by zero") from exc
    return value, numbers


def _value(node: ast.expr, numbers: list[int]) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        numbers.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, numbers), _value(node.right, numbers))
    raise ValueError("not plain arithmetic")
