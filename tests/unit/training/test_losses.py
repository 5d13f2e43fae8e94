"""The arithmetic, against numbers worked out by hand or by another route."""

import math

import numpy as np
import pytest

from training.utils import losses


def test_advantages_are_centred_and_scaled_within_the_group() -> None:
    advantages = losses.group_advantages([1.0, 0.0, 0.0, 0.0])
    assert advantages == pytest.approx(np.array([3, -1, -1, -1]) / math.sqrt(3), rel=1e-5)
    for kind in ("grpo", "dr_grpo", "rloo"):
        assert not losses.group_advantages([0.3, 0.3, 0.3], kind).any()


def test_published_variants_of_the_advantage() -> None:
    rewards = [1.0, 0.0, 0.0, 0.5]
    assert losses.group_advantages(rewards, "dr_grpo") == pytest.approx([0.625, -0.375, -0.375, 0.125])
    others = [(sum(rewards) - reward) / 3 for reward in rewards]
    assert losses.group_advantages(rewards, "rloo") == pytest.approx(np.array(rewards) - np.array(others))


def test_truncated_weights_are_ratios_up_to_the_cap() -> None:
    weights = losses.truncated_weights(
        np.array([-1.0, -2.0, -1.0, -1.0]), np.array([-1.0, -1.0, -3.0, -800.0]), cap=3.0
    )
    assert weights == pytest.approx([1.0, math.exp(-1), 3.0, 3.0])


def test_k3_is_an_unbiased_estimate_of_the_divergence() -> None:
    policy, reference = np.array([0.7, 0.2, 0.1]), np.array([0.5, 0.3, 0.2])
    exact = float((policy * np.log(policy / reference)).sum())
    estimate = float((policy * losses.k3(np.log(policy), np.log(reference))).sum())
    assert estimate == pytest.approx(exact, rel=1e-12)
    assert (losses.k3(np.log(policy), np.log(reference)) >= 0).all()


def test_the_penalty_is_taken_off_where_the_policy_is_surer_than_the_reference() -> None:
    shaped = losses.kl_shaped(2.0, np.array([-1.0, -3.0]), np.array([-2.0, -3.0]), beta=0.5)
    assert shaped == pytest.approx([1.5, 2.0])


def test_the_unigram_baseline_counts_with_one_added_to_every_token() -> None:
    # After 3 x token 0 and 1 x token 1 of 4: p = 4/8, 2/8, 1/8, 1/8.
    assert losses.unigram_loss([0, 0, 0, 1], [0, 2], 4) == pytest.approx((math.log(2) + math.log(8)) / 2)


def test_mismatch_is_zero_only_for_equal_log_probs() -> None:
    same = losses.mismatch(np.array([-1.0, -2.0]), np.array([-1.0, -2.0]))
    assert same == {
        "mismatch/abs_mean": 0.0,
        "mismatch/abs_max": 0.0,
        "mismatch/k3": 0.0,
        "mismatch/exp_abs_mean": 1.0,
        "mismatch/pearson": pytest.approx(1.0),
    }
    apart = losses.mismatch(np.array([-1.0, -2.0]), np.array([-1.5, -2.0]))
    assert (apart["mismatch/abs_mean"], apart["mismatch/abs_max"]) == (0.25, 0.5)
    assert apart["mismatch/exp_abs_mean"] == (math.exp(0.5) + 1) / 2
    assert apart["mismatch/k3"] > 0
    assert "mismatch/pearson" not in losses.mismatch(np.array([-1.0, -1.0001]), np.array([-1.0001, -1.0]))
