"""Promotion proves itself: the public libraries load what was promoted, and compute what the trainer computed."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fireworks.training.sdk import FiretitanServiceClient, TrainerJobConfig, TrainerJobManager, types
from proofs import FULL, Record
from running import MODEL, RunningServer

from firebox.weights.manifest import read_snapshot

PARENT = "accounts/local/models"
TOLERANCE = 1e-5
"""Nats, in float32."""
SAVES = {"full": {"base": "HF_BASE_MODEL"}, "lora": {"base": "HF_PEFT_ADDON", "merged_base": "HF_BASE_MODEL"}}


@contextmanager
def trained(server: RunningServer, trainers: TrainerJobManager, how: str) -> Iterator[tuple[str, Any]]:
    """(job id, client) of a model that two steps have changed."""
    rank, suffix = (4, "-lora") if how == "lora" else (0, "")
    profile = trainers.resolve_training_profile(f"accounts/local/trainingShapes/tiny-cpu{suffix}")
    shape = profile.training_shape_version
    created = trainers.create(TrainerJobConfig(base_model=MODEL, training_shape_ref=shape, lora_rank=rank))
    endpoint = trainers.wait_for_ready(created.job_id, created.job_name, timeout_s=120)
    service = FiretitanServiceClient(base_url=endpoint.base_url, api_key=server.key)
    try:
        client = service.create_training_client(base_model=MODEL, lora_rank=rank)
        tokens = np.random.default_rng(0).integers(0, 1000, 24)
        datum = types.Datum(
            model_input=types.ModelInput.from_ints(tokens[:-1].tolist()),
            loss_fn_inputs={"target_tokens": types.TensorData.from_numpy(tokens[1:])},
        )
        for _ in range(2):
            client.forward_backward([datum], "cross_entropy").result(timeout=60)
            client.optim_step(types.AdamParams(learning_rate=1e-2)).result(timeout=60)
        yield created.job_id, client
    finally:
        service.close()
        trainers.delete(created.job_id)


def difference(directory: Path, snapshot: Path) -> float:
    """How far a plain reload is from the trainer's log-probs, in nats; and that training has moved them."""
    from transformers import AutoModelForCausalLM

    manifest = read_snapshot(snapshot)
    assert manifest is not None
    assert manifest.probe is not None
    tokens = torch.tensor(manifest.probe.tokens)
    # An adapter directory names its base model: this one call loads both.
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True)
    with torch.inference_mode():
        logprobs = model.eval()(input_ids=tokens[None]).logits[0, :-1].log_softmax(-1)
    computed = logprobs.gather(-1, tokens[1:, None]).squeeze(-1)
    return float((computed - torch.tensor(manifest.probe.logprobs)).abs().max())


def chats(server: RunningServer, model: str) -> None:
    """The promoted model serves, and the command line talks to it."""
    params = {"deploymentId": model}
    made = server.ask("POST", "/v1/accounts/local/deployments", params=params, json={"baseModel": f"{PARENT}/{model}"})
    assert made.json()["state"] == "READY", made.text
    try:
        answer = server.command("chat", model, "-m", "Hello", "--temperature", "0", "--max-tokens", "8")
        assert answer == server.command("chat", model, "-m", "Hello", "--temperature", "0", "--max-tokens", "8")
        assert answer.strip()
    finally:
        server.ask("DELETE", f"/v1/accounts/local/deployments/{model}")


@pytest.mark.prove
@pytest.mark.skipif(not FULL, reason="every day the export child and the life of a job are tested by themselves")
@pytest.mark.parametrize("how", sorted(SAVES))
def test_promoted_model_computes_what_was_trained(
    server: RunningServer, tmp_path: Path, how: str, record: Record
) -> None:
    trainers = TrainerJobManager(api_key=server.key, base_url=server.url)
    with trained(server, trainers, how) as (job, client):
        snapshots = server.data / "jobs" / "local" / job / "snapshots"
        untrained = server.data / "models" / "local" / "tiny"
        for kind, model_kind in SAVES[how].items():
            saved = client.save_weights_for_sampler_ext(kind.replace("_", "-"), checkpoint_type=kind).snapshot_name
            name = f"promoted-{uuid.uuid4().hex[:8]}"
            model = trainers.promote_checkpoint(job, saved, name, MODEL)
            assert (model["state"], model["kind"]) == ("READY", model_kind)
            record(f"{kind}: stored difference, nats", model["maxAbsDiff"])
            assert model["maxAbsDiff"] <= TOLERANCE
            server.command("models", "export", name, str(tmp_path / name))
            record(f"{kind}: after export, nats", difference(tmp_path / name, snapshots / saved))
            assert difference(tmp_path / name, snapshots / saved) <= TOLERANCE
            assert difference(untrained, snapshots / saved) > 100 * TOLERANCE
            chats(server, name)
            server.command("models", "delete", name)
        damaged = client.save_weights_for_sampler_ext("damaged", checkpoint_type="base").snapshot_name
        (weights,) = (snapshots / damaged).glob("*.safetensors")
        raw = bytearray(weights.read_bytes())
        raw[len(raw) // 2] ^= 1
        weights.write_bytes(raw)
        with pytest.raises(RuntimeError, match=weights.name):
            trainers.promote_checkpoint(job, damaged, "never", MODEL)
        assert server.ask("GET", "/v1/accounts/local/models/never").status_code == 404
