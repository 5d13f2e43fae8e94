"""Chat template to weights: exactly what the model would sample is trained, whichever way the template tells."""

from pathlib import Path
from typing import Any

import pytest

from training.utils import DataError
from training.utils.data import Pair, Row
from training.utils.datums import build_datum
from training.utils.render import Rendered, load_tokenizer, render_chat, render_pair, render_prompt

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


def row(messages: list[dict[str, Any]], **fields: Any) -> Row:
    return Row(messages, fields, "a.jsonl:1")


def render_one(tokenizer: Any, row: Row) -> Rendered:
    (rendered,) = render_chat(tokenizer, row)
    return rendered


@pytest.mark.parametrize("template", [None, PLAIN, TAGS_WITHOUT_STOP])
def test_only_replies_and_their_stop_tokens_are_trained(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template or tokenizer.chat_template
    rendered = render_one(tokenizer, row(TURNS))
    assert tokenizer.decode(rendered.trained_tokens) == "1<|im_end|>2 it is<|im_end|>"
    assert rendered.tokens == tokenizer.apply_chat_template(TURNS, return_dict=False)


def test_a_message_of_weight_zero_is_context(tokenizer: Any) -> None:
    messages = [*TURNS[:2], TURNS[2] | {"weight": 0}, *TURNS[3:]]
    assert tokenizer.decode(render_one(tokenizer, row(messages)).trained_tokens) == "2 it is<|im_end|>"
    with pytest.raises(DataError, match="no token to train on"):
        render_chat(tokenizer, row([*TURNS[:2], TURNS[2] | {"weight": 0}]))


def test_where_a_template_rewrites_history_each_reply_is_trained_as_it_was_sampled(tokenizer: Any) -> None:
    tokenizer.chat_template = REWRITES
    first, second = render_chat(tokenizer, row(TURNS))
    assert tokenizer.decode(first.trained_tokens) == "<think>\n\n</think>\n\n1<|im_end|>"
    assert tokenizer.decode(second.trained_tokens) == "<think>\n\n</think>\n\n2 it is<|im_end|>"
    assert second.tokens == tokenizer.apply_chat_template(TURNS, return_dict=False)
    # A reply that is only context may look different; what is trained is the last one.
    only_last = render_one(tokenizer, row([*TURNS[:2], TURNS[2] | {"weight": 0}, *TURNS[3:]]))
    assert only_last == second


def test_a_pair_shares_its_prompt_and_trains_both_answers(tokenizer: Any) -> None:
    context = [message | {"weight": 0} for message in TURNS[:4]]
    sides = [row([*context, {"role": "assistant", "content": text}]) for text in ("2 it is", "no idea")]
    for template in (None, REWRITES):
        tokenizer.chat_template = template or tokenizer.chat_template
        chosen, rejected = render_pair(tokenizer, Pair(*sides))
        start = chosen.weights.index(1.0)
        assert chosen.tokens[:start] == rejected.tokens[:start]
        assert tokenizer.decode(chosen.trained_tokens).endswith("2 it is<|im_end|>")
        assert tokenizer.decode(rejected.trained_tokens).endswith("no idea<|im_end|>")
    tokenizer.chat_template = REWRITES
    with pytest.raises(DataError, match=r"a.jsonl:1: .*differently than the model would sample it"):
        render_pair(tokenizer, Pair(row(TURNS), row(TURNS)))


def test_a_cut_conversation_keeps_its_beginning(tokenizer: Any) -> None:
    whole = render_one(tokenizer, row(TURNS))
    cut = whole.cut(len(whole.tokens) - 4)
    assert (cut.tokens, cut.weights) == (whole.tokens[:-4], whole.weights[:-4])
    assert whole.cut(10_000) == whole


def test_tools_that_the_template_would_drop_are_refused(tokenizer: Any) -> None:
    call = [{"type": "function", "function": {"name": "add", "arguments": "{}"}}]
    with pytest.raises(DataError, match="leaves out 'tool_calls'"):
        render_chat(tokenizer, row([TURNS[1], {"role": "assistant", "content": "", "tool_calls": call}]))
    with pytest.raises(DataError, match="leaves out 'tools'"):
        render_prompt(tokenizer, row([TURNS[1]], tools=call))
    tokenizer.chat_template = "{% for t in tools %}{{ t.function.name }} {% endfor %}" + PLAIN.replace(
        "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}<tool_call>{{ c.function.name }}{% endfor %}"
    )
    rendered = render_one(tokenizer, row([TURNS[1], TURNS[2] | {"tool_calls": call}], tools=call))
    assert tokenizer.decode(rendered.tokens).startswith("add <|im_start|>user")
    assert tokenizer.decode(rendered.trained_tokens) == "1<tool_call>add<|im_end|>"


def test_a_template_without_a_stop_token_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_STOP
    with pytest.raises(DataError, match="never learn to stop"):
        render_chat(tokenizer, row(TURNS))


def test_a_prompt_ends_where_the_assistant_begins(tokenizer: Any) -> None:
    prompt = render_prompt(tokenizer, row(TURNS[:2]))
    whole = render_one(tokenizer, row(TURNS[:3]))
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


THOUGHT = [*TURNS[:4], {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2 it is"}]


@pytest.mark.parametrize(
    ("family", "stop", "messages", "trained"),
    [
        ("qwen2_5", "<|im_end|>", TURNS, ["1<|im_end|>2 it is<|im_end|>"]),
        # Marks the line break behind the header, too, which is part of the generation prompt.
        ("qwen2_5_training", "<|im_end|>", TURNS, ["1<|im_end|>2 it is<|im_end|>"]),
        # Puts empty thoughts into the last reply only, so each reply is a row of its own.
        (
            "qwen3",
            "<|im_end|>",
            THOUGHT,
            ["<think>\n\n</think>\n\n1<|im_end|>", "<think>\nhm\n</think>\n\n2 it is<|im_end|>"],
        ),
        # Opens the thoughts in the generation prompt.
        ("qwen3_5_think", "<|im_end|>", THOUGHT, ["\n</think>\n\n1<|im_end|>", "hm\n</think>\n\n2 it is<|im_end|>"]),
        ("llama3_1", "<|eot_id|>", TURNS, ["1<|eot_id|>2 it is<|eot_id|>"]),
        ("gemma3", "<end_of_turn>", TURNS, ["1<end_of_turn>2 it is<end_of_turn>"]),
        # Ends a conversation, whatever its length, with one more token.
        ("phi3", "<|end|>", TURNS, ["1<|end|>", "2 it is<|end|>"]),
    ],
)
def test_templates_of_real_models(
    tokenizer: Any, family: str, stop: str, messages: list[dict[str, Any]], trained: list[str]
) -> None:
    """The templates lie in TRL's package."""
    trl = pytest.importorskip("trl")
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text()
    tokenizer.add_special_tokens({"eos_token": stop, "bos_token": "<s>"})
    rendered = render_chat(tokenizer, row(messages))
    assert [tokenizer.decode(one.trained_tokens) for one in rendered] == trained


def test_a_row_may_set_what_its_template_asks_for(tokenizer: Any) -> None:
    tokenizer.chat_template = PLAIN.replace(
        "assistant\n{% endif %}", "assistant\n{% if not quick %}<think>{% endif %}{% endif %}"
    )
    with pytest.raises(DataError, match="begins or ends in another way than behind the prompt alone"):
        render_chat(tokenizer, row(TURNS))
    quick = row(TURNS, chat_template_kwargs={"quick": True})
    assert tokenizer.decode(render_one(tokenizer, quick).trained_tokens) == "1<|im_end|>2 it is<|im_end|>"
    assert tokenizer.decode(render_prompt(tokenizer, quick)).endswith("<|im_start|>assistant\n")
    with pytest.raises(DataError, match=r"a\.jsonl:1: chat_template_kwargs: expected an object, found str"):
        render_prompt(tokenizer, row(TURNS[:2], chat_template_kwargs="quick"))
