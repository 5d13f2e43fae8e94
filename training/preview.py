"""Show what a data file teaches: its tokens as a model reads them, those it is trained on in colour.

    python -m training.preview chats.jsonl --tokenizer-model ./tiny

Every row is rendered and so checked; the first few are shown. Prompts of RL are shown as far as the model reads on.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import tyro
from rich.console import Console
from rich.text import Text

from training.utils import cli, data
from training.utils.config import Checked, Positive
from training.utils.render import Rendered, load_tokenizer, render_chat, render_pair, render_prompt

TRAINED, CONTEXT = "bold green", "dim"
LEFT, RIGHT = "⟦", "⟧"
"""Around trained tokens where there is no colour."""


@dataclass
class Config(Checked):
    """What to show."""

    dataset: tyro.conf.Positional[str]  # JSONL, a folder of Hugging Face datasets, or hf://<owner>/<name>[:<split>]
    tokenizer_model: str  # Hugging Face name or local directory
    rows: Positive = 3  # how many rows to show


def main(config: Config) -> None:
    """Print how many tokens the data set has and trains, then its first rows. Raises DataError for a bad row."""
    console, tokenizer = Console(), load_tokenizer(config.tokenizer_model)
    rows = data.load_any(config.dataset)
    console.print(data.describe(rows, config.dataset), highlight=False, soft_wrap=True)
    shown = [(title, one) for row in rows for title, one in rendered(tokenizer, row)]
    console.print(summary([one for _, one in shown]), highlight=False, soft_wrap=True)
    for title, one in shown[: config.rows]:
        heading = f"\n--- {title}: {one.num_trained} of {len(one.tokens)} tokens trained"
        console.print(heading, style="bold", highlight=False, soft_wrap=True)
        console.print(coloured(tokenizer, one, marks=console.color_system is None), soft_wrap=True)


def rendered(tokenizer: Any, row: data.Row | data.Pair) -> Iterator[tuple[str, Rendered]]:
    """What a recipe would make of one row, each under a title."""
    if isinstance(row, data.Pair):
        for name, answer in zip(("chosen", "rejected"), render_pair(tokenizer, row), strict=True):
            yield f"{row.chosen.origin} {name}", answer
    elif row.messages[-1]["role"] == "assistant":
        yield from ((row.origin, one) for one in render_chat(tokenizer, row))
    else:
        tokens = render_prompt(tokenizer, row)
        yield row.origin, Rendered(tokens, [0.0] * len(tokens))


def summary(rows: Sequence[Rendered]) -> str:
    """Lengths, and the share of tokens that is trained."""
    lengths = [len(row.tokens) for row in rows]
    trained = sum(row.num_trained for row in rows)
    middle = statistics.median_low(lengths)
    return f"{sum(lengths)} tokens, {trained} of them trained; a row has {middle} (median), at most {max(lengths)}"


def coloured(tokenizer: Any, row: Rendered, *, marks: bool) -> Text:
    """The text of a row, trained parts in green, or between brackets where `marks` says so."""
    text = Text()
    for trained, part in groupby(zip(row.tokens, row.weights, strict=True), key=lambda pair: pair[1] > 0):
        said = tokenizer.decode([token for token, _ in part])
        text.append(f"{LEFT}{said}{RIGHT}" if trained and marks else said, style=TRAINED if trained else CONTEXT)
    return text


if __name__ == "__main__":
    cli.run(Config, main)
