"""How far ahead rollouts are sampled, and what a chat template makes of an environment's words."""

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


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer: Any) -> None:
    class Rewriting:
        eos_token_id = tokenizer.eos_token_id
        chat_template = tokenizer.chat_template

        def apply_chat_template(self, messages: list[dict[str, str]], **settings: Any) -> list[int]:
            shown = [{"role": "user", "content": f"{len(messages)} messages"}, *messages[1:]]
            return list(tokenizer.apply_chat_template(shown, **settings))

    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template changes a turn once others follow"):
        reply_tokens(Rewriting(), [{"role": "tool", "content": "7"}], Row([], {}, "rows.jsonl:1"))
