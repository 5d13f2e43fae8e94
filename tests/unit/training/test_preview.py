"""The preview of a data file: what is trained is marked, whichever kind of row, and a bad row is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from training import preview
from training.utils import DataError
from training.utils.render import Rendered, load_tokenizer

USER, GOOD, BAD = (
    {"role": role, "content": text} for role, text in (("user", "2+2?"), ("assistant", "4"), ("assistant", "5"))
)


@pytest.mark.parametrize(
    ("row", "shown"),
    [
        ({"messages": [USER, GOOD]}, ["1 rows of OpenAI messages", "<|im_start|>assistant\n⟦4<|im_end|>⟧"]),
        ({"prompt": "2+2?", "completion": "4"}, ["TRL prompt and completion", "⟦4<|im_end|>⟧"]),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, [":1 chosen: 2 of", "⟦4<|im_end|>⟧", "⟦5<|im_end|>⟧"]),
        ({"messages": [USER], "answer": "4"}, [":1: 0 of", "<|im_end|>\n<|im_start|>assistant\n"]),
        ({"instruction": "2+2?"}, ["1 rows of Alpaca", "<|im_start|>user\n2+2?<|im_end|>"]),
    ],
)
def test_every_kind_of_row_is_shown(
    row: dict[str, Any], shown: list[str], tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    preview.main(preview.Config(str(tmp_path / "a.jsonl"), str(tiny_dir)))
    printed = capsys.readouterr().out
    assert [text for text in shown if text not in printed] == []


def test_only_the_first_rows_are_shown_and_all_are_checked(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(4 * (json.dumps({"messages": [USER, GOOD]}) + "\n"))
    preview.main(preview.Config(str(path), str(tiny_dir), rows=2))
    printed = capsys.readouterr().out
    assert ":2: 2 of" in printed
    assert ":3: 2 of" not in printed
    with path.open("a") as file:
        file.write(json.dumps({"messages": [USER, GOOD | {"weight": 0}]}) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:5: no token to train on"):
        preview.main(preview.Config(str(path), str(tiny_dir), rows=1))


def test_trained_tokens_are_green_on_a_terminal(tiny_dir: Path) -> None:
    tokenizer = load_tokenizer(str(tiny_dir))
    row = Rendered(tokenizer.encode("one two"), [0.0] * (len(tokenizer.encode("one two")) - 1) + [1.0])
    text = preview.coloured(tokenizer, row, marks=False)
    assert text.plain == "one two"
    assert [str(span.style) for span in text.spans] == ["dim", "bold green"]
