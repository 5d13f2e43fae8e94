"""Settings that only reinforcement learning has. Imports neither torch nor an SDK.

Owns what is sampled and how samples become a gradient; the names of losses on the server live in `policy`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge
from tyro.constructors import PrimitiveConstructorSpec

from training.utils.config import Checked, Count, NonNegative, Positive, PositiveFloat

PolicyLoss = Literal["grpo", "importance_sampling", "dapo", "gspo", "cispo", "dro", "reinforce"]
AdvantageKind = Literal["grpo", "dr_grpo", "rloo"]

# Either the function itself or "module:name"; on a command line only the latter can be said.
NamedFunction = Annotated[
    str | Callable[..., Any],
    PrimitiveConstructorSpec[Any](
        nargs=1,
        metavar="MODULE:NAME",
        instance_from_str=lambda words: words[0],
        is_instance=lambda value: isinstance(value, str) or callable(value),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass
class RolloutConfig(Checked):
    """What one step samples. An environment is called with a row, once per rollout, and returns what answers the model:
    called with each completion, that returns the messages to go on with, and none at the end."""

    prompts_per_step: Positive = 8  # groups of one step
    group_size: Annotated[int, Ge(2)] = 8  # answers to each prompt
    max_tokens: Positive = 256  # tokens that may follow a prompt, over all turns
    temperature: PositiveFloat = 1.0  # of training rollouts; evaluation is greedy
    max_head_offpolicy_versions: Count = 0  # sample ahead while the trainer works, with weights this many syncs old
    environment: NamedFunction | None = None  # (row) -> respond, and respond(completion) -> messages
    max_turns: Positive = 8  # how often the model may speak where there is an environment
    mismatch_stop_after: Count = 3  # stop after so many steps in which sampler and trainer disagree badly; 0: never
    call_timeout_s: PositiveFloat = 600  # seconds that one call of the reward or the environment may take


@dataclass
class PolicyConfig(Checked):
    """How rewards become a gradient."""

    advantages: AdvantageKind = "grpo"  # rewards centred and scaled, dr_grpo centred, rloo against the others' mean
    clip_low: NonNegative | None = None  # lower bound of the ratio; None is the paper's own
    clip_high: PositiveFloat | None = None  # upper bound of the ratio; None is the paper's own
    answer_mean: bool = False  # divide the loss of each answer by its number of tokens
    tis_cap: NonNegative = 0.0  # weigh tokens with min(p_trainer / p_sampler, cap), ratios from the trainer; 0 is off
    kl_beta: NonNegative = 0.001  # penalty towards the reference
    drop_zero_variance: bool = True  # leave groups out whose rewards are all equal
