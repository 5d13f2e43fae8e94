"""Drawing tokens: exact distributions, and independence of rows."""

from __future__ import annotations

import pytest
import torch

from firebox.sampler.sample import Settings, draw, top_logprobs

LOGITS = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])


def settings(rows: int, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Settings:
    return Settings(
        torch.full((rows,), temperature), torch.full((rows,), top_k), torch.full((rows,), top_p, dtype=torch.float64)
    )


def expected(temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """The slow way, one token at a time."""
    probs = (LOGITS.double() / temperature).softmax(-1)
    if top_k:
        probs[top_k:] = 0  # LOGITS are sorted
        probs /= probs.sum()
    kept, mass = torch.zeros_like(probs), 0.0
    for i, p in enumerate(probs.tolist()):
        if mass >= top_p:
            break
        kept[i], mass = p, mass + p
    return kept / kept.sum()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 1.0), (1.0, 3, 1.0), (1.0, 0, 0.8), (0.7, 4, 0.9), (1.0, 1, 1.0)],
)
def test_frequencies_equal_the_exact_distribution(temperature, top_k, top_p):
    rows = 20_000
    # Evenly spread uniforms make the frequencies exact to one count per token: no statistics needed.
    uniforms = (torch.arange(rows, dtype=torch.float64) + 0.5) / rows
    drawn = draw(LOGITS.expand(rows, -1).contiguous(), settings(rows, temperature, top_k, top_p), uniforms)
    frequencies = torch.bincount(drawn.tokens, minlength=len(LOGITS)) / rows
    probs = expected(temperature, top_k, top_p)
    assert (frequencies - probs).abs().max() <= 2 / rows
    torch.testing.assert_close(drawn.sampling_logprobs, probs.log()[drawn.tokens].float(), atol=1e-6, rtol=0)
    torch.testing.assert_close(drawn.logprobs, LOGITS.log_softmax(-1)[drawn.tokens], atol=1e-6, rtol=0)


def test_rows_with_different_settings_do_not_mix():
    logits = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    mixed = Settings(
        torch.tensor([0.0, 1.0, 0.5, 1.0, 2.0]),
        torch.tensor([0, 5, 0, 0, 3]),
        torch.tensor([1.0, 1.0, 0.5, 1.0, 0.9], dtype=torch.float64),
    )
    uniforms = torch.tensor([0.1, 0.4, 0.9, 0.5, 0.7], dtype=torch.float64)
    together = draw(logits, mixed, uniforms)
    for i in range(5):
        alone = draw(logits[i : i + 1], Settings(*(column[i : i + 1] for column in mixed)), uniforms[i : i + 1])
        assert [column[i].item() for column in together] == [column[0].item() for column in alone]


def test_greedy_is_certain():
    drawn = draw(LOGITS.unsqueeze(0), settings(1, temperature=0.0), torch.tensor([0.999], dtype=torch.float64))
    assert drawn.tokens.item() == 0
    assert drawn.sampling_logprobs.item() == 0.0


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_the_ends_of_the_unit_interval_never_reach_an_excluded_token(uniform):
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]])
    drawn = draw(logits, settings(1), torch.tensor([uniform], dtype=torch.float64))
    assert drawn.tokens.item() in (1, 2)


def test_a_tiny_temperature_is_finite():
    drawn = draw(LOGITS.unsqueeze(0) * 1e3, settings(1, temperature=1e-5), torch.tensor([0.5], dtype=torch.float64))
    assert drawn.tokens.item() == 0
    assert drawn.sampling_logprobs.isfinite().all()


def test_top_logprobs_are_the_best_of_the_plain_model():
    tokens, values = top_logprobs(LOGITS.unsqueeze(0), 3)
    assert tokens.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(values[0], LOGITS.log_softmax(-1)[:3])
