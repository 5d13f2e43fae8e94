"""A preference set to try recipes with: of two answers, the one in the manner that the question asks for is chosen.

Owns the questions and both manners. Does not know about models or tokenizers. Invariants: both answers of a pair say
the same number, so that only the manner tells them apart; each manner is chosen as often as it is rejected, so that who
does not read the question is right half of the time; the same seed writes the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Final

MANNERS: Final = {"formally": "The total is {}.", "playfully": "Easy! It makes {}!"}


def make_preferences(path: Path, num_rows: int = 400, seed: int = 0) -> None:
    """Write `num_rows` rows of prompt, chosen and rejected to a JSONL file, the manners in turn."""
    rng = random.Random(seed)
    manners = list(MANNERS)
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            asked = manners[number % len(manners)]
            other = next(manner for manner in manners if manner != asked)
            first, second = rng.randrange(10, 100), rng.randrange(10, 100)
            row = {
                "prompt": f"Answer {asked}. Add {first} and {second}",
                "chosen": MANNERS[asked].format(first + second),
                "rejected": MANNERS[other].format(first + second),
            }
            file.write(json.dumps(row) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a preference set.")
    parser.add_argument("--out", type=Path, required=True, help="the JSONL file to write")
    parser.add_argument("--rows", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_preferences(arguments.out, arguments.rows, arguments.seed)
    print(arguments.out)


if __name__ == "__main__":
    main()
