"""Rows and reward of the demo: reverse four digits, taught by annotators who disagree.

Owns the task, its three splits and the exact-match reward. Does not know about models, tokenizers or servers.

The demonstrations are written by two annotators. The careful one reverses the digits, the careless one copies them.
Which of them wrote most depends on the phrasing of the request: for three phrasings of ten the careful one, for the
other seven the careless one. A model that imitates these rows faithfully therefore answers greedily right on three
phrasings of ten, however long it is trained, yet it samples the right answer now and then on all of them. That is
what reinforcement with a verifiable reward needs to find it everywhere.

Invariants: a digit string appears in one split only; its digits are distinct, so a copy is never right; the same seed
writes the same bytes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

MOSTLY_CAREFUL: Final = ("Reverse", "Turn around", "Play back")
MOSTLY_CARELESS: Final = ("Flip", "Mirror", "Invert", "Swap around", "Read back", "Spell back", "Write back")
PHRASINGS: Final = MOSTLY_CAREFUL + MOSTLY_CARELESS
CAREFUL_SHARE: Final = dict.fromkeys(MOSTLY_CAREFUL, 0.85) | dict.fromkeys(MOSTLY_CARELESS, 0.2)

SFT_ROWS: Final = 6000
RL_ROWS: Final = 480
HELDOUT_ROWS: Final = 250
_NUM_DIGITS: Final = 4

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class DemoData:
    """Where the rows were written: `sft` has answered chats, `rl` and `heldout` have a question and its `answer`."""

    sft: Path
    rl: Path
    heldout: Path


def make_demo_data(out_dir: Path, seed: int = 0) -> DemoData:
    """Write sft.jsonl, rl.jsonl and heldout.jsonl to `out_dir`, which is made when it is missing."""
    rng = random.Random(seed)
    strings = ["".join(digits) for digits in itertools.permutations("0123456789", _NUM_DIGITS)]
    rng.shuffle(strings)
    heldout, rl = strings[:HELDOUT_ROWS], strings[HELDOUT_ROWS : HELDOUT_ROWS + RL_ROWS]
    demonstrated = strings[HELDOUT_ROWS + RL_ROWS :]

    out_dir.mkdir(parents=True, exist_ok=True)
    data = DemoData(sft=out_dir / "sft.jsonl", rl=out_dir / "rl.jsonl", heldout=out_dir / "heldout.jsonl")
    _write(data.sft, _demonstrations(demonstrated, rng))
    _write(data.rl, _questions(rl))
    _write(data.heldout, _questions(heldout))
    return data


def reward(completion: str, row: Mapping[str, Any]) -> float:
    """1.0 when `completion`, stripped of surrounding white space, is exactly the row's `answer`, else 0.0."""
    return float(completion.strip() == row["answer"])


def _demonstrations(strings: Sequence[str], rng: random.Random) -> list[Row]:
    """Answered chats in random order: every phrasing equally often, each with its exact share of careful answers."""
    rows: list[Row] = []
    per_phrasing = SFT_ROWS // len(PHRASINGS)
    for phrasing in PHRASINGS:
        num_careful = round(CAREFUL_SHARE[phrasing] * per_phrasing)
        for index, digits in enumerate(rng.sample(strings, per_phrasing)):
            answer = digits[::-1] if index < num_careful else digits
            rows.append({"messages": [_ask(phrasing, digits), {"role": "assistant", "content": answer}]})
    rng.shuffle(rows)
    return rows


def _questions(strings: Sequence[str]) -> list[Row]:
    """One question per string, the phrasings in turn, so that each is asked equally often."""
    return [
        {"messages": [_ask(phrasing, digits)], "answer": digits[::-1]}
        for phrasing, digits in zip(itertools.cycle(PHRASINGS), strings, strict=False)
    ]


def _ask(phrasing: str, digits: str) -> Row:
    return {"role": "user", "content": f"{phrasing} {digits}"}


def _write(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the rows of the demo.")
    parser.add_argument("--out", type=Path, required=True, help="directory for sft.jsonl, rl.jsonl and heldout.jsonl")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    data = make_demo_data(arguments.out, arguments.seed)
    print(*(data.sft, data.rl, data.heldout), sep="\n")


if __name__ == "__main__":
    main()
