"""The countdown game: reach a target with each given number used exactly once. A reward that needs no model to judge.

Rows hold `ground_truth`, a JSON object (or its text) with `numbers` and `target`. The answer is the last
`<answer>` block.
"""

import json
import re
from typing import Any

from training.examples.arithmetic import evaluate

ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
FORMAT_REWARD = 0.1


def reward(completion: str, row: dict[str, Any]) -> float:
    """1.0 for an equation that is right, 0.1 for an answer block that holds anything else, 0.0 without one."""
    truth = row["ground_truth"]
    truth = json.loads(truth) if isinstance(truth, str) else truth
    answers = ANSWER.findall(completion)
    if not answers:
        return 0.0
    try:
        value, numbers = evaluate(answers[-1])
    except ValueError:
        return FORMAT_REWARD
    right = value == truth["target"] and sorted(numbers) == sorted(truth["numbers"])
    return 1.0 if right else FORMAT_REWARD
