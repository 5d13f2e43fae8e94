"""Every loss against formulas written out token by token, in single and in double precision."""

from __future__ import annotations

import math

import pytest
import torch
from proofs import Record
from torch import Tensor

from firebox.trainer.losses import LOSSES, REFUSED, find_loss, resolve_config
from firebox.wire.errors import InvalidArgument

LENGTHS = [5, 1, 9, 4]


def inputs(dtype: torch.dtype, width: int | None = None, thresholds: bool = False) -> dict[str, Tensor]:
    """Noisy old log-probs on both sides of every threshold; some advantages, weights and mask cells are zero."""
    generator = torch.Generator().manual_seed(5)
    shape = (sum(LENGTHS),) if width is None else (sum(LENGTHS), width)

    def draw() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    made = {
        "logprobs": -draw().abs() - 0.5,
        "advantages": draw() * (draw() > -1),
        "weights": draw().abs() * (draw() > -1),
        "sequence_ratio_mask": (draw() > -0.5).double(),
    }
    if thresholds:
        made |= {"clip_low_threshold": 0.9 - draw().abs() / 10, "clip_high_threshold": 1.1 + draw().abs() / 10}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def new_logprobs(given: dict[str, Tensor]) -> Tensor:
    noise = torch.randn(given["logprobs"].shape, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return given["logprobs"] + 0.4 * noise.to(given["logprobs"].dtype)


def reference(name: str, new: Tensor, given: dict[str, Tensor]) -> Tensor:
    """The summed loss, one cell at a time, with branches instead of clamps."""
    total = new.new_zeros(())
    rows = torch.arange(sum(LENGTHS)).split(LENGTHS)
    for row in rows:
        own = {key: tensor[row].flatten() for key, tensor in given.items()}
        logps = new[row].flatten()
        chosen = own["sequence_ratio_mask"] != 0
        gaps = [(logps[i] - own["logprobs"][i]).detach() for i in range(len(logps)) if chosen[i]]
        mean = sum(gaps) / len(gaps) if gaps else new.new_zeros(())
        for i, logp in enumerate(logps):
            cell = {key: tensor[i] for key, tensor in own.items()}
            total = total + cell["weights"] * reference_cell(name, logp, cell, mean)
    return total


def reference_cell(name: str, logp: Tensor, cell: dict[str, Tensor], mean: Tensor) -> Tensor:
    old, advantage = cell["logprobs"], cell["advantages"]
    low = cell.get("clip_low_threshold", torch.tensor(0.0 if name == "cispo" else 0.8))
    high = cell.get("clip_high_threshold", torch.tensor(4.0 if name == "cispo" else 1.2))
    if name == "cross_entropy":
        return -logp
    if name == "reinforce":
        return -advantage * logp
    if name == "dro":
        return -advantage * logp + (0.025 * (logp - old) ** 2 if advantage != 0 else 0 * logp)
    ratio = torch.exp(logp - logp.detach() + mean) if name == "gspo" else torch.exp(logp - old)
    if name == "importance_sampling":
        return -ratio * advantage
    bounded = low if ratio < low else high if ratio > high else ratio
    if name == "cispo":
        return -bounded.detach() * advantage * logp
    plain, clipped = -ratio * advantage, -bounded * advantage
    worse = plain if plain >= clipped else clipped
    if name == "dapo" and advantage < 0 and worse > -3.0 * advantage:
        return -3.0 * advantage + 0 * logp
    return worse


@pytest.mark.prove
@pytest.mark.parametrize("thresholds", [False, True], ids=["one", "per_token"])
@pytest.mark.parametrize("width", [None, 3], ids=["one_target", "three_targets"])
@pytest.mark.parametrize("name", sorted(LOSSES))
def test_value_and_gradient_equal_the_formula(name: str, width: int | None, thresholds: bool, record: Record):
    given = inputs(torch.float32, width, thresholds)
    ours, theirs = (new_logprobs(given).requires_grad_() for _ in range(2))
    loss = LOSSES[name](ours, given, LOSSES[name].config, LENGTHS).sum()
    expected = reference(name, theirs, given)
    loss.backward()
    expected.backward()
    assert ours.grad is not None
    assert theirs.grad is not None
    record("relative difference of the loss", abs(loss.item() / expected.item() - 1))
    record("relative difference of the gradient", ((ours.grad - theirs.grad).norm() / theirs.grad.norm()).item())
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.prove
@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"cispo", "gspo"}))
def test_gradient_is_the_derivative_in_double_precision(name: str):
    given = inputs(torch.float64)
    loss = LOSSES[name]
    leaf = new_logprobs(given).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, given, loss.config, LENGTHS), leaf, rtol=1e-6, atol=1e-9)


@pytest.mark.prove
@pytest.mark.parametrize("name", ["cispo", "gspo"])
def test_constant_ratios_are_held_constant_in_double_precision(name: str):
    """Numeric differences would move the part that is held constant, so the closed form of the gradient is checked."""
    given = inputs(torch.float64)
    new = new_logprobs(given).requires_grad_()
    loss = LOSSES[name]
    loss(new, given, loss.config, LENGTHS).sum().backward()
    reference_leaf = new.detach().clone().requires_grad_()
    reference(name, reference_leaf, given).backward()
    assert new.grad is not None
    assert reference_leaf.grad is not None
    torch.testing.assert_close(new.grad, reference_leaf.grad, rtol=1e-12, atol=1e-14)


def test_a_dual_clip_bounds_the_loss_of_bad_tokens():
    given = {"logprobs": torch.tensor([-4.0]), "advantages": torch.tensor([-2.0])}
    leaf = torch.tensor([-0.5], requires_grad=True)
    loss = LOSSES["dapo"](leaf, given, LOSSES["dapo"].config, [1])
    loss.backward()
    assert loss.item() == 6.0
    assert leaf.grad is not None
    assert leaf.grad.item() == 0


def test_the_sequence_ratio_is_a_geometric_mean_over_the_masked_tokens():
    old, new = torch.tensor([-1.0, -1.0, -9.0]), torch.tensor([-1.2, -0.9, -1.0])
    given = {"logprobs": old, "advantages": torch.ones(3), "sequence_ratio_mask": torch.tensor([1.0, 1.0, 0.0])}
    loss = LOSSES["gspo"](new, given, LOSSES["gspo"].config, [3])
    torch.testing.assert_close(loss, torch.full((3,), -math.exp((-0.2 + 0.1) / 2)))
    without_mask = {"logprobs": old, "advantages": torch.tensor([1.0, 1.0, 0.0])}
    loss = LOSSES["gspo"](new, without_mask, LOSSES["gspo"].config, [3])
    torch.testing.assert_close(loss[:2], torch.full((2,), -math.exp((-0.2 + 0.1) / 2)))


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_known_names_that_do_not_work_say_what_to_do(name: str):
    with pytest.raises(InvalidArgument, match=f"{name} is not supported: .*; use "):
        find_loss(name)


@pytest.mark.parametrize(
    ("name", "config", "told"),
    [
        ("ppo", {"clip_low": 0.8}, "ppo has no key 'clip_low'; its keys: clip_high_threshold"),
        ("cross_entropy", {"beta": 1}, "its keys: none"),
        ("dro", {"beta": "much"}, "beta: 'much' is not a number"),
        ("dro", {"beta": -1}, "beta: -1.0 must be 0 or above"),
        ("dapo", {"eps_clip_c": 1}, "eps_clip_c: 1.0 must be above 1"),
        ("gspo", {"seq_ratio_log_cap": 0}, "seq_ratio_log_cap: 0.0 must be above 0"),
        ("cispo", {"clip_low_threshold": 5}, "clip_low_threshold 5.0 is above clip_high_threshold 4.0"),
    ],
)
def test_wrong_settings_are_the_users_mistake(name: str, config: dict[str, object], told: str):
    with pytest.raises(InvalidArgument, match=told):
        resolve_config(name, LOSSES[name], config)


def test_an_unknown_loss_lists_the_known_ones():
    with pytest.raises(InvalidArgument, match="'pppo' is not known; use one of cispo, cross_entropy"):
        find_loss("pppo")
