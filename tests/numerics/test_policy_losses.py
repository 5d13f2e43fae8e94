"""Every policy loss of the cookbook, from rollouts to parameter gradients, against its paper's formula in plain torch.

The cookbook makes the datums, a live engine computes the loss. The reference takes log-probs from plain `transformers`,
one answer at a time, and is written as the paper writes it, so nothing of ours is on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from live_engine import LiveEngine
from proofs import Record
from torch import Tensor
from transformers import AutoModelForCausalLM

from firebox.wire.training import Chunk, Datum, Forward, ForwardOutput, ModelInput, TensorData
from training.utils.data import Row
from training.utils.losses import group_advantages
from training.utils.rl import policy
from training.utils.rl.config import PolicyConfig
from training.utils.rl.trajectory import Prompt, Rollout

GROUPS, GROUP_SIZE = 2, 4
BETA = 0.05


class Answer:
    """One answer as a paper sees it: its advantage, and its tokens' log-probs now and when they were sampled."""

    def __init__(self, advantage: float, now: Tensor, old: Tensor) -> None:
        self.advantage, self.now, self.old = advantage, now, old
        self.ratio = (now - old).exp()


def surrogate(ratio: Tensor, advantage: float, low: float, high: float) -> Tensor:
    return torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def grpo(answers: Sequence[Answer]) -> Tensor:
    """Shao et al. 2024, equation 3, without the KL term: the mean over answers of the mean over their tokens."""
    return -sum(surrogate(a.ratio, a.advantage, 0.8, 1.2).mean() for a in answers)


def importance_sampling(answers: Sequence[Answer]) -> Tensor:
    return -sum((a.ratio * a.advantage).sum() for a in answers)


def dapo(answers: Sequence[Answer]) -> Tensor:
    """Yu et al. 2025, equation 8: all tokens weigh the same, and the upper bound is the higher one.

    Where the advantage is below zero, its published code also bounds the loss (the dual clip), here at 3.
    """
    tokens = [surrogate(a.ratio, a.advantage, 0.8, 1.28) for a in answers]
    bounded = [t.clamp(min=3 * a.advantage) if a.advantage < 0 else t for t, a in zip(tokens, answers, strict=True)]
    return -sum(t.sum() for t in bounded)


def gspo(answers: Sequence[Answer]) -> Tensor:
    """Zheng et al. 2025, equations 5 and 7: one ratio per answer, the geometric mean of its tokens' ratios."""
    ratios = [(a.now - a.old).mean().exp() for a in answers]
    return -sum(surrogate(s, a.advantage, 1 - 3e-4, 1 + 4e-4) for s, a in zip(ratios, answers, strict=True))


def cispo(answers: Sequence[Answer]) -> Tensor:
    """MiniMax 2025, equation 4: the clipped ratio is a weight without a gradient."""
    return -sum((a.ratio.detach().clamp(max=4.0) * a.advantage * a.now).sum() for a in answers)


def dro(answers: Sequence[Answer]) -> Tensor:
    """Richemond et al. 2024, equation 4: half the squared gap between advantage and tempered log-ratio, per token.

    It is divided by the temperature, and what does not depend on the policy is left out of the value.
    """
    gaps = [(a.advantage - BETA * (a.now - a.old)) for a in answers]
    constant = sum(len(a.now) * a.advantage**2 / (2 * BETA) + (a.advantage * a.old).sum() for a in answers)
    return sum((gap**2).sum() for gap in gaps) / (2 * BETA) - constant


def reinforce(answers: Sequence[Answer]) -> Tensor:
    return -sum((a.advantage * a.now).sum() for a in answers)


# The sum of the paper's terms, and whether they are means over each answer's tokens.
PAPERS: dict[str, tuple[Callable[[Sequence[Answer]], Tensor], bool]] = {
    "grpo": (grpo, True),
    "importance_sampling": (importance_sampling, False),
    "dapo": (dapo, False),
    "gspo": (gspo, True),
    "cispo": (cispo, False),
    "dro": (dro, False),
    "reinforce": (reinforce, False),
}


def answer_logprobs(model: Any, rollout: Rollout) -> Tensor:
    """Log-probs of the tokens that the model said, by plain transformers."""
    tokens = torch.tensor([*rollout.prompt.tokens, *rollout.tokens])
    logprobs = model(tokens[None]).logits[0, :-1].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]
    return logprobs[len(rollout.prompt.tokens) - 1 :][torch.from_numpy(rollout.sampled)]


def make_rollouts(model: Any) -> list[list[Rollout]]:
    """Answers of many lengths, some with an environment's words inside, sampled by a policy that is some way off."""
    rng = np.random.default_rng(3)
    groups = []
    for number in range(GROUPS):
        prompt = Prompt(Row([], {}, f"rows.jsonl:{number + 1}"), rng.integers(0, 1000, 6 + number).tolist())
        group = []
        for length in rng.integers(3, 20, GROUP_SIZE):
            sampled = np.ones(length, dtype=bool)
            sampled[length // 3 : length // 2] = False
            tokens, blank = rng.integers(0, 1000, length).tolist(), np.zeros(length)
            rollout = Rollout(prompt, tokens, blank, sampled, [], "", 1, False, 0, float(rng.random()))
            blank[sampled] = answer_logprobs(model, rollout).detach().numpy() + 0.8 * rng.standard_normal(sampled.sum())
            group.append(rollout)
        groups.append(group)
    return groups


def send(engine: LiveEngine, examples: Sequence[policy.Example], loss: policy.ServerLoss) -> float:
    """Let the engine accumulate the gradient of what the cookbook would send. Returns the summed loss."""
    data = []
    for datum in (example.datum() for example in examples):
        inputs = {
            name: TensorData(data=np.asarray(tensor.data), dtype=tensor.dtype)
            for name, tensor in datum.loss_fn_inputs.items()
        }
        data.append(
            Datum(model_input=ModelInput(chunks=[Chunk(tokens=datum.model_input.to_ints())]), loss_fn_inputs=inputs)
        )
    result = engine.do(Forward(data=data, loss_fn=loss.name, loss_fn_config=dict(loss.config), backward=True))
    assert isinstance(result, ForwardOutput)
    return result.metrics["loss:sum"]


@pytest.mark.prove
@pytest.mark.parametrize("policy_loss", list(policy.POLICY_LOSSES))
def test_loss_and_gradients_equal_the_paper(policy_loss: Any, tiny_dir: Path, tmp_path: Path, record: Record) -> None:
    formula, answer_mean = PAPERS[policy_loss]
    settings = PolicyConfig(answer_mean=answer_mean)
    model = AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32)
    groups = make_rollouts(model)
    advantages = [group_advantages([rollout.reward for rollout in group]) for group in groups]
    chosen = policy.instructive(groups, advantages, settings)

    engine = LiveEngine(tiny_dir, tmp_path, "job")
    examples, _ = policy.examples(chosen, settings, policy=None, reference=None)  # type: ignore[arg-type]
    ours = send(engine, examples, policy.server_loss(policy_loss, settings))
    gradients = {
        name.removeprefix("gradients/"): tensor
        for name, tensor in engine.state().items()
        if name.startswith("gradients/")
    }

    answers = [
        Answer(value, answer_logprobs(model, rollout), torch.from_numpy(rollout.logprobs[rollout.sampled]).float())
        for rollout, value in chosen
    ]
    theirs = formula(answers)
    theirs.backward()
    plain = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in plain.values()]).norm()
    gap = torch.stack([(gradients[name] - gradient).norm() for name, gradient in plain.items()]).norm()

    outside = torch.cat([answer.ratio for answer in answers]).sub(1).abs().gt(0.2).float().mean()
    record("share of ratios further than 0.2 from 1", outside.item())
    record("relative difference of the loss", abs(ours / theirs.item() - 1))
    record("relative difference of the gradient", (gap / norm).item())
    assert norm > 0
    assert outside > 0.3  # the bounds are put to work
    assert ours == pytest.approx(theirs.item(), rel=1e-5)
    assert gap / norm < 1e-5
