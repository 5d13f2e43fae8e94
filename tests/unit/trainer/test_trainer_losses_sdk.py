"""The genuine Fireworks client: its own losses on log-probs, embeddings and similarities, and the contrastive one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fireworks.training.sdk import types
from fireworks.training.sdk.client import FiretitanServiceClient

BASE = "accounts/local/models/tiny"
LENGTHS = (6, 11, 6, 17)


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[object]:
    service = FiretitanServiceClient(base_url=url, api_key="any")
    yield service.create_training_client(BASE)
    service.close()


def data(*, targets: bool) -> list[types.Datum]:
    rows = [list(range(10 * i, 10 * i + n + 1)) for i, n in enumerate(LENGTHS)]
    return [
        types.Datum(
            model_input=types.ModelInput.from_ints(row[:-1]),
            loss_fn_inputs={"target_tokens": row[1:]} if targets else {},
        )
        for row in rows
    ]


def test_a_custom_loss_runs_the_forward_pass_once(client):
    def loss(_: list[types.Datum], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        total = torch.cat(logprobs).square().sum()
        return total, {"mine": total.item()}

    metrics = client.forward_backward_custom(data(targets=True), loss).result().metrics
    assert metrics["mine"] > 0
    assert metrics["reused_forward:sum"] == 1.0
    client.optim_step(types.AdamParams(learning_rate=1e-4)).result()


@pytest.mark.parametrize(("output", "width"), [("embedding", None), ("cos_similarity_matrix", len(LENGTHS))])
def test_a_custom_loss_on_embeddings_learns(client, output: str, width: int | None):
    def loss(_: list[types.Datum], rows: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        assert all(row.dim() == 1 and width in (None, len(row)) for row in rows)
        total = (torch.stack(rows) - rows[0]).square().sum()
        return total, {"distance": total.item()}

    distances = []
    for _ in range(3):
        passed = client.forward_backward_custom(data(targets=False), loss, output=output, pooling="mean")
        distances.append(passed.result().metrics["distance"])
        adam = types.AdamParams(learning_rate=1e-3)
        client.optim_step(adam, grad_accumulation_normalization="num_sequences").result()
    assert distances == sorted(distances, reverse=True)


def test_contrastive_training_learns(client):
    losses = []
    for _ in range(3):
        passed = client.forward_backward_contrastive(data(targets=False), num_queries=2, temperature=0.1)
        losses.append(passed.result().metrics["loss"])
        client.optim_step(types.AdamParams(learning_rate=1e-3)).result()
    assert losses == sorted(losses, reverse=True)
