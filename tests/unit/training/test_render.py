"""Chat template to weights: exactly what the model would sample is trained, whichever way the template tells."""

from pathlib import Path
from typing import Any

import pytest

from training.utils import DataError
from training.utils.data import Row
from training.utils.datums import build_datum
from training.utils.render import load_tokenizer, render_chat, render_prompt

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "one?"},
    {"role": "assistant", "content": "1"},
    {"role": "user", "content": "two?"},
    {"role": "assistant", "content": "2 it is"},
]
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TAGS_WITHOUT_STOP = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Thinking models drop earlier thoughts: what a turn looked like when it was sampled is gone once others follow.
REWRITES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_STOP = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture
def tokenizer(tiny_dir: Path) -> Any:
    return load_tokenizer(str(tiny_dir))


def row(messages: list[dict[str, Any]]) -> Row:
    return Row(messages, {}, "a.jsonl:1")


@pytest.mark.parametrize("template", [None, PLAIN, TAGS_WITHOUT_STOP])
def test_only_replies_and_their_stop_tokens_are_trained(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    rendered = render_chat(tokenizer, row(TURNS))
    assert tokenizer.decode(rendered.trained_tokens) == "1<|im_end|>2 it is<|im_end|>"
    assert rendered.tokens == tokenizer.apply_chat_template(TURNS, return_dict=False)


def test_a_message_of_weight_zero_is_context(tokenizer: Any) -> None:
    messages = [*TURNS[:2], TURNS[2] | {"weight": 0}, *TURNS[3:]]
    assert tokenizer.decode(render_chat(tokenizer, row(messages)).trained_tokens) == "2 it is<|im_end|>"
    with pytest.raises(DataError, match="no token to train on"):
        render_chat(tokenizer, row([*TURNS[:2], TURNS[2] | {"weight": 0}]))


def test_a_template_that_rewrites_history_is_refused_only_where_it_does(tokenizer: Any) -> None:
    tokenizer.chat_template = REWRITES
    single = render_chat(tokenizer, row(TURNS[:3]))
    assert tokenizer.decode(single.trained_tokens) == "<think>\n\n</think>\n\n1<|im_end|>"
    with pytest.raises(DataError, match=r"a.jsonl:1: messages\[2\]: .*differently once others follow"):
        render_chat(tokenizer, row(TURNS))


def test_a_template_without_a_stop_token_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_STOP
    with pytest.raises(DataError, match="never learn to stop"):
        render_chat(tokenizer, row(TURNS))


def test_a_prompt_ends_where_the_assistant_begins(tokenizer: Any) -> None:
    prompt = render_prompt(tokenizer, row(TURNS[:2]))
    whole = render_chat(tokenizer, row(TURNS[:3]))
    assert whole.tokens[: len(prompt)] == prompt
    assert whole.weights.index(1.0) == len(prompt)


def test_a_tokenizer_that_is_not_there_is_explained(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be loaded: give a local directory"):
        load_tokenizer(str(tmp_path))


def test_datums_score_each_token_where_the_one_before_is_read() -> None:
    datum = build_datum([5, 6, 7], weights=[0.0, 0.0, 1.0])
    assert datum.model_input.to_ints() == [5, 6]
    assert datum.loss_fn_inputs["target_tokens"].data == [6, 7]
    assert datum.loss_fn_inputs["weights"].data == [0.0, 1.0]
    with pytest.raises(ValueError, match="2 values for 3 tokens"):
        build_datum([5, 6, 7], weights=[0.0, 1.0])
