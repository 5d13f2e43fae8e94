"""The countdown reward: exact arithmetic, every number once, nothing executed."""

import pytest

from training.examples.countdown import reward

ROW = {"ground_truth": '{"numbers": [45, 14, 39], "target": 20}'}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("<think>hm</think><answer>45 + 14 - 39</answer>", 1.0),
        ("<answer>1+1</answer> no, <answer>14-(39-45)</answer>", 1.0),
        ("<answer>45 + 14</answer>", 0.1),
        ("<answer>20</answer>", 0.1),
        ("<answer>45 + 14 - 39 + 14 - 14</answer>", 0.1),
        ("<answer>45 / 0</answer>", 0.1),
        ("<answer>__import__('os').getcwd()</answer>", 0.1),
        ("<answer>9**9**9**9</answer>", 0.1),
        ("<answer>" + "(" * 500 + "</answer>", 0.1),
        ("45 + 14 - 39", 0.0),
        ("", 0.0),
    ],
)
def test_reward(completion: str, expected: float) -> None:
    assert reward(completion, ROW) == expected
