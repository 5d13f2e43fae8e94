"""Loading rows, splitting them, and the order in which they are visited."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from training.utils import DataError, data


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


USER, ASSISTANT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def test_chat_and_prompt_completion_rows_become_the_same_exchange(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [USER, ASSISTANT]}, "", {"prompt": "2+2?", "completion": "4"})
    first, second = data.load_chats(path)
    assert first.messages == second.messages == [USER, ASSISTANT]
    assert second.origin == f"{path}:3"


def test_prompt_rows_keep_what_the_reward_reads(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [USER], "answer": "4"}, {"prompt": "2+2?", "answer": "4"})
    assert [row.fields["answer"] for row in data.load_prompts(path)] == ["4", "4"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "a.jsonl:2: not JSON"),
        ("[1]", "a.jsonl:2: expected a JSON object, found list"),
        ({"text": "x"}, r"a.jsonl:2: expected the fields of one of: OpenAI messages \(messages\); .*the row has: text"),
        ({"messages": []}, "a.jsonl:2: messages: expected a non-empty list of messages, found an empty list"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"a.jsonl:2: messages\[0\]: .*'role' is one of"),
        ({"messages": [{"role": "user", "content": 3}]}, r"messages\[0\].content: expected text, found int"),
        ({"messages": [USER, ASSISTANT | {"weight": 2}]}, r"messages\[1\].weight: expected 0 or 1, found 2"),
        ({"messages": [USER]}, "a.jsonl:2: no assistant message"),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path: Path, row: Any, message: str) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [USER, ASSISTANT]}, row)
    with pytest.raises(DataError, match=message):
        data.load_chats(path)


def test_prompts_that_are_answered_already_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"messages": [USER, ASSISTANT]})
    with pytest.raises(DataError, match="nothing left to answer"):
        data.load_prompts(path)


def test_a_pair_trains_only_what_lies_behind_its_shared_beginning(tmp_path: Path) -> None:
    again = {"role": "user", "content": "sure?"}
    sides = {name: {"messages": [USER, ASSISTANT, again, _said(name)]} for name in ("chosen", "rejected")}
    (pair,) = data.load_preferences(write(tmp_path / "a.jsonl", sides))
    context = [message | {"weight": 0} for message in (USER, ASSISTANT, again)]
    assert pair.chosen.messages == [*context, _said("chosen")]
    assert pair.rejected.messages == [*context, _said("rejected")]
    assert pair.chosen.origin == f"{tmp_path / 'a.jsonl'}:1"


def _said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [USER, ASSISTANT]}, "a.jsonl:1: expected the fields of one of: Fireworks preferences"),
        ({"prompt": "2+2?", "chosen": "4", "rejected": "4"}, "say the same"),
        ({"chosen": [USER, ASSISTANT], "rejected": [USER]}, "one is the beginning of the other"),
        (
            {"chosen": [USER, ASSISTANT], "rejected": [USER | {"content": "3+3?"}, ASSISTANT]},
            r"chosen: messages\[0\] is where the two part, and it is the user's",
        ),
        ({"chosen": "4", "rejected": "5"}, "chosen: text alone .* add a field 'prompt'"),
        ({"prompt": "2+2?", "chosen": 4, "rejected": "5"}, "chosen: expected a non-empty list of messages, found int"),
    ],
)
def test_a_pair_that_cannot_be_compared_is_refused(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        data.load_preferences(write(tmp_path / "a.jsonl", row))


def test_the_formats_found_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *[{"messages": [USER, ASSISTANT]}] * 2, {"prompt": "2+2?", "completion": "4"})
    found = data.describe(data.load_chats(path), path)
    assert found == f"{path}: 2 rows of OpenAI messages, 1 rows of TRL prompt and completion"


def test_a_saved_hugging_face_data_set_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    # A table has every column in every row; what a row lacks is None.
    rows = [{"messages": [USER, ASSISTANT | {"weight": 1}]}, {"messages": [USER, ASSISTANT]}]
    table = datasets.Dataset.from_list(rows)
    table.save_to_disk(str(tmp_path / "one"))
    loaded = data.load_chats(tmp_path / "one")
    assert [row.messages for row in loaded] == [row["messages"] for row in rows]
    assert loaded[1].origin == f"{tmp_path / 'one'}:1"
    datasets.DatasetDict({"train": table}).save_to_disk(str(tmp_path / "two"))
    with pytest.raises(DataError, match="holds the splits train; give the folder of one of them"):
        data.load_chats(tmp_path / "two")
    with pytest.raises(DataError, match="cannot be read as a Hugging Face data set"):
        data.load_chats(tmp_path)


@pytest.mark.parametrize("content", [None, "", b"\xff\xfe"])
def test_a_missing_empty_or_binary_file_is_refused(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "a.jsonl"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=r"a\.jsonl"):
        data.load_chats(path)


def rows(count: int) -> list[data.Row]:
    return [data.Row([USER], {}, str(i)) for i in range(count)]


def test_split_is_exact_disjoint_and_fixed_by_the_seed() -> None:
    train, held_out = data.split(rows(100), 0.2, seed=3)
    assert (len(train), len(held_out)) == (80, 20)
    assert {r.origin for r in train} | {r.origin for r in held_out} == {str(i) for i in range(100)}
    assert data.split(rows(100), 0.2, seed=3) == (train, held_out)
    assert data.split(rows(100), 0.2, seed=4) != (train, held_out)
    assert data.split(rows(3), 0.0, seed=0)[1] == []
    with pytest.raises(DataError, match="leaves one side empty"):
        data.split(rows(3), 0.1, seed=0)


def test_every_epoch_visits_every_row_once_in_an_order_of_its_own() -> None:
    stream = data.batch_at(7, 0, 21, seed=1)
    epochs = [stream[start : start + 7] for start in (0, 7, 14)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_the_position_alone_decides_what_comes_next() -> None:
    whole = data.batch_at(7, 0, 30, seed=1)
    for cut in range(30):
        assert data.batch_at(7, cut, 30 - cut, seed=1) == whole[cut:]


@pytest.mark.skipif("FIREBOX_TEST_DATA" not in os.environ, reason="FIREBOX_TEST_DATA is not set")
def test_real_files_load() -> None:
    folder = Path(os.environ["FIREBOX_TEST_DATA"])
    assert len(data.load_chats(folder / "text2sql_sft.jsonl")) == 100
    assert all("ground_truth" in row.fields for row in data.load_prompts(folder / "countdown_rl.jsonl"))
    assert len(data.load_preferences(folder / "ifeval_preference.jsonl")) == 40
