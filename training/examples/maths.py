r"""Word problems with one number as the answer. A reward that compares numbers, not spellings.

Rows hold `answer`: the number, or a solution that ends in it, as GSM8K (`#### 72`) and MATH (`\boxed{72}`) write it.
The same is read out of what the model says.
"""

import re
from fractions import Fraction
from typing import Any

FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}")
NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?(?:\s*/\s*\d+)?")
MARKED = re.compile(r"####\s*(.+)|\\boxed\{((?:[^{}]|\{[^{}]*\})*)\}")


def reward(completion: str, row: dict[str, Any]) -> float:
    """1.0 when the model's final number is the row's, else 0.0. Raises ValueError for a row without a number."""
    truth = final_number(str(row["answer"]))
    if truth is None:
        raise ValueError(f"'answer' holds no number: {row['answer']!r}")
    return float(final_number(completion) == truth)


def final_number(text: str) -> Fraction | None:
    """The last marked answer as a number, the last number of a text that marks none; None when there is none."""
    marked = [after or boxed for after, boxed in MARKED.findall(text)]
    plain = FRACTION.sub(r"\1/\2", marked[-1] if marked else text)
    numbers = NUMBER.findall(plain)
    try:
        return Fraction(numbers[-1].replace(",", "").replace(" ", "")) if numbers else None
    except ZeroDivisionError:
        return None
