"""The demo's rows: reproducible, splits that share no digit string, annotators in the documented shares."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from training.examples.demo_data import CAREFUL_SHARE, HELDOUT_ROWS, PHRASINGS, DemoData, make_demo_data, reward


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def question(row: dict[str, Any]) -> tuple[str, str]:
    """(phrasing, digits) of the row's user message."""
    phrasing, digits = row["messages"][0]["content"].rsplit(" ", 1)
    return phrasing, digits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DemoData:
    return make_demo_data(tmp_path_factory.mktemp("demo"))


def test_same_seed_same_bytes_and_another_seed_other_rows(data: DemoData, tmp_path: Path) -> None:
    again, other = make_demo_data(tmp_path / "again"), make_demo_data(tmp_path / "other", seed=1)
    for name in ("sft", "rl", "heldout"):
        assert getattr(again, name).read_bytes() == getattr(data, name).read_bytes()
        assert getattr(other, name).read_bytes() != getattr(data, name).read_bytes()


def test_no_digit_string_is_in_two_splits(data: DemoData) -> None:
    sft, rl, heldout = ({question(row)[1] for row in read(path)} for path in (data.sft, data.rl, data.heldout))
    assert not sft & rl
    assert not (sft | rl) & heldout
    assert len(heldout) == HELDOUT_ROWS >= 200


def test_no_demonstration_is_repeated(data: DemoData) -> None:
    assert max(Counter(question(row) for row in read(data.sft)).values()) == 1


def test_annotators_wrote_their_documented_shares(data: DemoData) -> None:
    careful: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for row in read(data.sft):
        (phrasing, digits), answer = question(row), row["messages"][1]["content"]
        assert answer in (digits, digits[::-1])
        total[phrasing] += 1
        careful[phrasing] += answer == digits[::-1]
    assert {phrasing: careful[phrasing] / total[phrasing] for phrasing in total} == pytest.approx(CAREFUL_SHARE)


@pytest.mark.parametrize("split", ["rl", "heldout"])
def test_every_phrasing_is_asked_equally_often(data: DemoData, split: str) -> None:
    asked = Counter(question(row)[0] for row in read(getattr(data, split)))
    assert set(asked) == set(PHRASINGS)
    assert len(set(asked.values())) == 1


def test_reward_pays_the_reversed_digits_and_never_a_copy(data: DemoData) -> None:
    for row in read(data.rl) + read(data.heldout):
        digits = question(row)[1]
        assert reward(f" {digits[::-1]}\n", row) == 1.0
        assert reward(digits, row) == 0.0


@pytest.mark.parametrize("completion", ["", "170", "17040", "1 7 0 4", "1704 1704", "the answer is 1704"])
def test_reward_wants_the_exact_answer(completion: str) -> None:
    assert reward(completion, {"answer": "1704"}) == 0.0


def test_command_line_writes_the_same_rows(data: DemoData, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "training.examples.demo_data", "--out", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.split()
    assert [Path(line).read_bytes() for line in printed] == [
        path.read_bytes() for path in (data.sft, data.rl, data.heldout)
    ]
