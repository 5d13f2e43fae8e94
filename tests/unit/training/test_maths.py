"""The maths reward: numbers are compared, however they are written and wherever they stand."""

from fractions import Fraction

import pytest

from training.examples.maths import final_number, reward


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("She pays 3 * 24 = 72 dollars.\n#### 72", 72),
        ("#### 1,234,567", 1234567),
        ("#### $18.50 a week", Fraction("18.5")),
        (r"so \boxed{42} it is, of 100", 42),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"first \boxed{1}, then \boxed{-2}", -2),
        ("He has 3 apples and 4 pears, so 7", 7),
        ("3 / 4", Fraction(3, 4)),
        ("1/0", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_final_number(text: str, expected: Fraction | int | None) -> None:
    assert final_number(text) == expected


def test_equal_numbers_earn_however_they_are_spelled() -> None:
    row = {"answer": "Half of it is 0.5.\n#### 0.5"}
    assert reward(r"That makes \boxed{\frac{1}{2}}.", row) == 1.0
    assert reward("#### 0.50", row) == 1.0
    assert reward("0.5 is half of 1", row) == 0.0
    assert reward("", row) == 0.0


def test_a_row_without_a_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="'answer' holds no number: 'many'"):
        reward("7", {"answer": "many"})
