"""Weights in and out of an engine: every form of a checkpoint's path, merged models, and where a model begins."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
import torch
from trainer_harness import BASE_MODEL, Driver, forward, serving
from transformers import AutoModelForCausalLM

from firebox.export.child import export
from firebox.weights.manifest import read_snapshot
from firebox.wire import tinker
from firebox.wire.training import CreateModel, LoadState, LoraConfig, SaveForSampler, SaveState
from firebox.wire.worker import ExportRequest

RUN_JOB = "run-" + "0123456789abcdef" * 2
TINKER = tinker.checkpoint_path(f"session-{'ab' * 16}:train:3", "training", "half")


def trained(spec, rank: int = 4) -> Driver:
    """A model after one step, with a gradient pending."""
    driver = Driver(spec, rank)
    driver.backward(1)
    driver.step()
    driver.backward(2)
    return driver


def logprobs(driver: Driver) -> torch.Tensor:
    """[2, 19], of the tokens of `forward(9)`."""
    outputs = driver.do(forward(9)).loss_fn_outputs
    return torch.tensor([output["logprobs"].data.tolist() for output in outputs])


def plain_logprobs(model) -> torch.Tensor:
    """What a Hugging Face model says of the same tokens."""
    data = forward(9).data
    tokens = torch.tensor([datum.model_input.chunks[0].tokens for datum in data])
    targets = torch.tensor([datum.loss_fn_inputs["target_tokens"].data for datum in data])
    with torch.inference_mode():
        return model.eval()(tokens).logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]


# ------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("job", "name", "ref"),
    [
        ("here", "half", "half"),
        ("other", "half", "cross_job://other/half"),
        (RUN_JOB, "half", f"local/{RUN_JOB}/half"),
        ("pool-tiny", TINKER.artifact, TINKER.path),
    ],
)
def test_every_form_of_a_path_loads_the_same_state(make_spec, job: str, name: str, ref: str):
    source = trained(make_spec(job, lora_rank=4))
    source.do(SaveState(name=name))
    here = Driver(make_spec("here", lora_rank=4), 4)
    loaded = here.do(LoadState(ref=ref, optimizer=True))
    assert loaded.path == ref
    expected = source.state()
    assert here.state().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in here.state().items())
    # Weights alone: the same model, and an optimizer that begins anew.
    here.do(LoadState(ref=ref, optimizer=False))
    state = here.state()
    assert state["counters"].tolist() == [0, 0, 0]
    assert not any(key.startswith("gradients/") for key in state)
    assert all(torch.equal(state[key], expected[key]) for key in state if key.startswith("weights/"))


def test_a_path_that_leads_nowhere_is_told(make_spec):
    driver = trained(make_spec("job", lora_rank=4))
    driver.do(SaveState(name="good"))
    driver.do(SaveForSampler(name="sampled"))
    pooled = trained(make_spec("pool", lora_rank=4))
    pooled.do(SaveForSampler(name=tinker.checkpoint_path(TINKER.run, "sampler", "sampled").artifact))
    sampled = TINKER.path.replace("weights/half", "sampler_weights/sampled")
    for ref in ("sampled", "cross_job://job/sampled", sampled):
        told = driver.error(LoadState(ref=ref, optimizer=True))
        assert "is a sampler snapshot" in told
        assert "save_state" in told
    assert "saved ones: good" in driver.error(LoadState(ref="cross_job://job/better", optimizer=True))
    assert "saved ones: none" in driver.error(LoadState(ref=f"local/{RUN_JOB}/good", optimizer=True))
    assert "another account" in driver.error(LoadState(ref=f"other/{RUN_JOB}/good", optimizer=True))
    for ref in (TINKER.path, TINKER.path + "/x", "tinker://x/weights/y", "local/job/good", f"local/{RUN_JOB}/../good"):
        assert "path" in driver.error(LoadState(ref=ref, optimizer=True))


def test_an_adapter_of_another_base_model_is_refused(make_spec):
    trained(make_spec("job", lora_rank=4)).do(SaveState(name="good"))
    other = "accounts/local/models/other"
    driver = Driver(make_spec("other", lora_rank=4, base_model=other), 4)
    assert f"is an adapter of '{BASE_MODEL}'" in driver.error(LoadState(ref="cross_job://job/good", optimizer=True))


def test_loading_never_moves_a_sequence(make_spec):
    """Saved at place 1 of one model and loaded at place 2 of another, which goes on with 3 whatever came of it."""
    with serving(make_spec()) as url, httpx.Client(base_url=f"{url}/api/v1", timeout=60) as client:

        def done(route: str, body: dict) -> dict:
            request_id = client.post(route, json=body).json()["request_id"]
            deadline = time.monotonic() + 60
            while (result := client.post("retrieve_future", json={"request_id": request_id}).json()) and (
                result.get("type") == "try_again"
            ):
                assert time.monotonic() < deadline
            return result

        session = client.post("create_session", json={}).json()["session_id"]
        first, second = (
            done("create_model", {"session_id": session, "model_seq_id": i, "base_model": BASE_MODEL})["model_id"]
            for i in (0, 1)
        )
        assert done("save_weights", {"model_id": first, "seq_id": 1, "path": "a"})["path"] == "a"
        assert done("save_weights", {"model_id": second, "seq_id": 1, "path": "b"})["path"] == "b"
        load = {"model_id": second, "path": "a", "optimizer": True}
        assert done("load_weights", load | {"seq_id": 2})["type"] == "load_weights"
        assert "category" in done("load_weights", load | {"seq_id": 3, "path": "none"})
        assert done("save_weights", {"model_id": second, "seq_id": 4, "path": "c"})["path"] == "c"
        assert done("save_weights", {"model_id": first, "seq_id": 2, "path": "d"})["path"] == "d"
        for route, seq_id, field, value in (
            ("save_weights", 5, "ttl_seconds", 60),
            ("save_weights_for_sampler", 6, "ttl_seconds", 60),
            ("save_weights_for_sampler", 7, "metadata", {"decision_calibration": {}}),
        ):
            told = done(route, {"model_id": second, "seq_id": seq_id, "path": "e", field: value})
            assert told["category"] == "user"
            assert field in told["error"]
        assert done("save_weights", {"model_id": second, "seq_id": 8, "path": "e", "ttl_seconds": None})["path"] == "e"


# ----------------------------------------------------------------------------------------------------- merged weights


def test_a_merged_model_computes_what_the_adapter_did(make_spec, tiny_dir: Path, tmp_path: Path):
    driver = Driver(make_spec(lora_rank=4), 4)
    assert "nothing to merge" in driver.error(SaveForSampler(name="fresh", checkpoint_type="merged_base"))
    for seed in range(3):
        driver.backward(seed)
        driver.step()
    before = logprobs(driver)
    driver.do(SaveForSampler(name="merged", checkpoint_type="merged_base", export_precision="source"))
    driver.do(SaveForSampler(name="half", checkpoint_type="merged_base", export_precision="bf16"))
    assert torch.equal(logprobs(driver), before)  # the live weights are not the merged ones
    snapshots = tmp_path / "jobs/job/snapshots"
    for name, dtype, tolerance in (("merged", "float32", 1e-5), ("half", "bfloat16", 0.1)):
        manifest = read_snapshot(snapshots / name)
        assert manifest is not None
        assert (manifest.kind, manifest.adapter, manifest.dtype) == ("base", None, dtype)
        out = tmp_path / f"out-{name}"
        report = export(ExportRequest(chain=[str(snapshots / name)], model_dir=str(tiny_dir), out_dir=str(out)))
        assert (report.ok, report.kind) == (True, "HF_BASE_MODEL")
        model = AutoModelForCausalLM.from_pretrained(out)
        assert str(model.dtype) == f"torch.{dtype}"
        assert (plain_logprobs(model) - before).abs().max() <= tolerance
        # The tiny model shares its head with its embedding; the adapter of the head changed the head alone.
        assert model.config.tie_word_embeddings is False


def test_what_cannot_be_merged_is_told(make_spec):
    driver = trained(make_spec(lora_rank=4))
    for told, kind, precision in (
        ("nvfp4", "merged_base", "nvfp4"),
        ("export_precision", "base", "bf16"),
        ("'merged_base'", "whole", None),
    ):
        save = SaveForSampler(name="x", checkpoint_type=kind, export_precision=precision)
        assert told in driver.error(save)
    full = trained(make_spec("full"), 0)
    assert "LoRA" in full.error(SaveForSampler(name="x", checkpoint_type="merged_base"))


# ------------------------------------------------------------------------------------------------------ beginnings


def test_who_attaches_to_weights_with_steps_behind_them_is_told(make_spec):
    driver = trained(make_spec(), 0)
    driver.step()
    again = driver.engine._create_model("again", CreateModel(base_model=BASE_MODEL))
    assert again.step == 2
    lora = Driver(make_spec("lora", lora_rank=4), 4)
    fresh = lora.engine._create_model("fresh", CreateModel(base_model=BASE_MODEL, lora_config=LoraConfig(rank=2)))
    assert fresh.step == 0
