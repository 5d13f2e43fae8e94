"""How far ahead rollouts are sampled, and what a chat template makes of an environment's words."""

import re
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from training.recipes.rl_loop import Prompts, Run
from training.utils import RolloutConfig
from training.utils.data import Row
from training.utils.errors import DataError
from training.utils.render import load_tokenizer, render_prompt
from training.utils.rl.rollout import reply_tokens
from training.utils.rl.trajectory import Prompt
from training.utils.steps import Plan

PROMPTS = [Prompt(Row([], {}, f"rows.jsonl:{number}"), [number]) for number in range(5)]


class Begun:
    """Stands in for `Rollouts`: notes what is begun, and with how many hot-loads behind it."""

    def __init__(self) -> None:
        self.version = 0
        self.versions: dict[int, int] = {}
        self.prompts: dict[int, list[int]] = {}

    def begin(self, prompts: list[Prompt], step: int) -> Future[Any]:
        self.versions[step] = self.version
        self.prompts[step] = [prompt.tokens[0] for prompt in prompts]
        return Future()


def sampled(staleness: int, *, max_steps: int = 7, start: int = 0, consumed: int = 0) -> tuple[Begun, list[int]]:
    """Go through all steps with a hot-load behind each, and say how old the weights of each step's rollouts are."""
    config = SimpleNamespace(rollout=RolloutConfig(prompts_per_step=2, max_head_offpolicy_versions=staleness))
    rollouts, blank = Begun(), SimpleNamespace()
    run = Run(config, blank, None, rollouts, blank, blank, blank, Prompts(PROMPTS, []))  # type: ignore[arg-type]
    ages = []
    for step, _ in run.sampled_ahead(Plan(len(PROMPTS), 2, 1, max_steps, 0, start, consumed)):
        ages.append(rollouts.version - rollouts.versions[step.number])
        rollouts.version += 1
    return rollouts, ages


@pytest.mark.parametrize(
    ("staleness", "expected"),
    [(0, [0] * 7), (1, [0, 1, 1, 1, 1, 1, 1]), (2, [0, 1, 2, 2, 2, 2, 2]), (50, [0, 1, 2, 3, 4, 5, 6])],
)
def test_rollouts_are_never_older_than_asked(staleness: int, expected: list[int]) -> None:
    assert sampled(staleness)[1] == expected


def test_sampling_ahead_and_resuming_change_nothing_about_which_prompts_a_step_sees() -> None:
    straight = sampled(0)[0].prompts
    assert sampled(2)[0].prompts == straight
    resumed = sampled(2, start=3, consumed=6)[0].prompts
    assert resumed == {step: straight[step] for step in (4, 5, 6, 7)}


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Any:
    return load_tokenizer(str(tiny_dir))


def test_an_environments_words_are_rendered_as_in_the_whole_conversation(tokenizer: Any) -> None:
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 3 + 4?"}]
    called = {"role": "assistant", "content": "<tool_call>3 + 4</tool_call>"}
    replies = [{"role": "tool", "content": "7"}, {"role": "user", "content": "Go on."}]
    row = Row(asked, {}, "rows.jsonl:1")
    said = tokenizer.encode(called["content"] + "<|im_end|>")
    whole = render_prompt(tokenizer, Row([*asked, called, *replies], {}, "rows.jsonl:1"))
    assert render_prompt(tokenizer, row) + said + reply_tokens(tokenizer, replies, row) == whole


@pytest.mark.parametrize(
    ("family", "stop", "role", "expected"),
    [
        (
            "qwen2_5",
            "<|im_end|>",
            "tool",
            "\n<|im_start|>user\n<tool_response>\n7\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
        ),
        # Drops thoughts of earlier turns; what was sampled stays, and only what follows is asked for.
        ("qwen3_5_think", "<|im_end|>", "user", "\n<|im_start|>user\n7<|im_end|>\n<|im_start|>assistant\n<think>\n"),
        ("llama3_1", "<|eot_id|>", "user", "{start}user{end}\n\n7<|eot_id|>{start}assistant{end}\n\n"),
        ("gemma3", "<end_of_turn>", "user", "\n<start_of_turn>user\n7<end_of_turn>\n<start_of_turn>model\n"),
        ("phi3", "<|end|>", "user", "\n<|user|>\n7<|end|>\n<|assistant|>\n"),
    ],
)
def test_templates_of_real_models(tiny_dir: Path, family: str, stop: str, role: str, expected: str) -> None:
    found = reply_in(family, stop, role, tiny_dir)
    assert found == expected.format(start="<|start_header_id|>", end="<|end_header_id|>")


@pytest.mark.parametrize(
    ("family", "stop", "role", "reason"),
    [
        ("phi3", "<|end|>", "tool", "leaves out messages of role 'tool'; let the environment answer in another role"),
        ("smolvlm", "<end_of_utterance>", "user", "leaves out messages of role 'assistant'"),
        ("gptoss", "<|return|>", "user", "does not end a turn before 'user' with '<|return|>', as the model does"),
    ],
)
def test_templates_that_cannot_go_on_are_refused(
    tiny_dir: Path, family: str, stop: str, role: str, reason: str
) -> None:
    with pytest.raises(DataError, match=re.escape(f"rows.jsonl:1: the chat template {reason}")):
        reply_in(family, stop, role, tiny_dir)


def reply_in(family: str, stop: str, role: str, tiny_dir: Path) -> str:
    """A reply as a real model's template writes it; the templates lie in TRL's package."""
    trl, tokenizer = pytest.importorskip("trl"), load_tokenizer(str(tiny_dir))
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{family}.jinja").read_text()
    tokenizer.add_special_tokens({"eos_token": stop, "bos_token": "<s>"})
    row = Row([{"role": "user", "content": "What is 3 + 4?"}], {}, "rows.jsonl:1")
    return str(tokenizer.decode(reply_tokens(tokenizer, [{"role": role, "content": "7"}], row)))
