"""Hot-load over the socket: good and bad snapshots, in flight and at rest."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from firebox.weights.manifest import Probe, SnapshotManifest, committed_dir, describe, seal

from .conftest import BASE_MODEL, make_spec, serving
from .test_completions import PROMPT, complete, ids_of, rows_of


@pytest.fixture
def own(model_dir: Path) -> Iterator[httpx.Client]:
    with serving(make_spec(model_dir)) as client:
        yield client


@pytest.fixture(scope="module")
def plain(model_dir: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    return {name: p.data for name, p in model.named_parameters()}


def shifted(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: w + 0.05 * torch.randn(w.shape, generator=generator) for n, w in weights.items()}


def commit(root: Path, identity: str, write: Callable[[Path], None], **fields: object) -> Path:
    with committed_dir(root / identity) as scratch:
        write(scratch)
        manifest = {
            "identity": identity, "kind": "base", "base_model": BASE_MODEL, "dtype": "float32", "step": 1,
            "created_at": "2026-01-01T00:00:00Z", "files": describe(scratch),
        }  # fmt: skip
        seal(scratch, SnapshotManifest(**(manifest | fields)))
    return root / identity


def commit_weights(root: Path, identity: str, weights: dict[str, torch.Tensor], **fields: object) -> Path:
    return commit(root, identity, lambda d: save_file(weights, d / "model.safetensors"), **fields)


def hotload(client: httpx.Client, path: Path, previous: str | None = None) -> dict:
    response = client.post("/worker/hotload", json={"identity": path.name, "path": str(path), "previous": previous})
    assert response.status_code == 200, response.text
    return response.json()


def assert_serves(client: httpx.Client, model, identity: str | None) -> None:
    """Sampled log-probs equal plain transformers with those weights, and carry their identity."""
    choice = complete(client, max_tokens=16, ignore_eos=True)["choices"][0]
    tokens = torch.tensor([PROMPT + ids_of(choice)])
    with torch.inference_mode():
        logprobs = model(tokens).logits[0, :-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    assert (logprobs[len(PROMPT) - 1 :] - torch.tensor(rows_of(choice))).abs().max() <= 1e-5
    assert choice["snapshot_identities"] == [{"snapshot_identity": identity, "count": 16}]


def model_with(model_dir: Path, weights: dict[str, torch.Tensor]):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    model.load_state_dict(weights, strict=False)
    return model.eval()


def make_adapter(model_dir: Path, out: Path, targets: list[str], seed: int):
    """A random PEFT adapter in `out`; returns plain peft's model of it."""
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=16, target_modules=targets)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(out, save_embedding_layers=False)
    return model.eval()


def test_base_then_delta(own, model_dir, plain, tmp_path):
    one, two = shifted(plain, 1), shifted(plain, 2)
    status = hotload(own, commit_weights(tmp_path, "s-1", one))
    assert (status["current_snapshot_identity"], status["stage"], status["error"]) == ("s-1", "serving", "")
    assert_serves(own, model_with(model_dir, one), "s-1")
    delta = commit_weights(tmp_path, "s-2", two, kind="delta", parent="s-1")
    assert hotload(own, delta, previous="s-1")["current_snapshot_identity"] == "s-2"
    assert_serves(own, model_with(model_dir, two), "s-2")


def test_adapters_replace_each_other_and_a_base_replaces_them(own, model_dir, plain, tmp_path):
    for name, targets in (("a-1", ["q_proj", "down_proj"]), ("a-0", ["v_proj", "lm_head"]), ("a-2", ["k_proj"])):
        peft = {}

        def write(directory: Path, targets=targets, peft=peft) -> None:
            peft["model"] = make_adapter(model_dir, directory, targets, seed=len(targets))

        hotload(own, commit(tmp_path, name, write, kind="adapter"))
        assert_serves(own, peft["model"], name)
    full = shifted(plain, 3)
    hotload(own, commit_weights(tmp_path, "s-1", full))
    assert_serves(own, model_with(model_dir, full), "s-1")
    # An adapter stands on the base model, not on the full weights that were loaded before it.
    hotload(own, tmp_path / "a-2")
    assert_serves(own, peft["model"], "a-2")


def probe_of(model, tokens: torch.Tensor) -> Probe:
    with torch.inference_mode():
        logits = model(tokens[None]).logits[0, :-1]
    logprobs = logits.log_softmax(-1).gather(-1, tokens[1:, None])[:, 0].tolist()
    return Probe(tokens=tokens.tolist(), logprobs=logprobs)


def test_weights_that_contradict_their_probe_are_taken_back(own, model_dir, plain, tmp_path):
    """Whatever went wrong between trainer and sampler, other log-probs than the trainer's are never served."""
    good = shifted(plain, 1)
    probe = probe_of(model_with(model_dir, good), torch.arange(12))
    liar = commit_weights(tmp_path, "liar", shifted(plain, 2), probe=probe)
    base = model_with(model_dir, plain)
    for before, load in (((None, base), []), (("s-1", model_with(model_dir, good)), ["s-1"])):
        for identity in load:
            hotload(own, commit_weights(tmp_path, identity, good, probe=probe))
        status = hotload(own, liar)
        assert (status["stage"], status["current_snapshot_identity"]) == ("serving", before[0])
        assert status["target_snapshot_identity"] == "liar"
        assert "log-probs differ from the trainer's" in status["error"]
        assert_serves(own, before[1], before[0])


def test_adapter_comes_back_after_a_swap_that_broke(own, model_dir, plain, tmp_path):
    peft = {}

    def write(directory: Path) -> None:
        peft["model"] = make_adapter(model_dir, directory, ["q_proj"], seed=3)

    hotload(own, commit(tmp_path, "a-1", write, kind="adapter"))
    probe = probe_of(model_with(model_dir, plain), torch.arange(12))
    assert hotload(own, commit_weights(tmp_path, "liar", shifted(plain, 2), probe=probe))["error"]
    assert_serves(own, peft["model"], "a-1")


def test_status_tells_what_a_swap_did(own, model_dir, plain, tmp_path):
    one = shifted(plain, 1)
    probe = probe_of(model_with(model_dir, one), torch.arange(12))
    status = hotload(own, commit_weights(tmp_path, "s-1", one, probe=probe))
    stages = [step["stage"] for step in status["timeline"]]
    assert stages == ["fetching", "verified", "paused", "swapped", "serving"]
    seconds = [step["seconds"] for step in status["timeline"]]
    assert seconds == sorted(seconds)
    assert status["canary"]["trainer_difference"] <= 1e-5
    assert status["canary"]["movement"] > 0.01
    twin = hotload(own, commit_weights(tmp_path, "s-2", one, probe=probe))
    assert twin["canary"]["movement"] == 0.0
    refused = hotload(own, tmp_path / "missing")
    assert [step["stage"] for step in refused["timeline"]] == ["fetching", "serving"]


def test_a_promoted_adapter_is_served_from_the_start(model_dir, tmp_path):
    make_adapter(model_dir, tmp_path / "adapter", ["v_proj", "up_proj"], seed=5)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with serving(make_spec(model_dir, adapter_dir=str(tmp_path / "adapter"))) as client:
        assert_serves(client, PeftModel.from_pretrained(base, tmp_path / "adapter").eval(), None)


def other_model(root: Path, weights: dict) -> Path:
    return commit_weights(root, "bad", weights, base_model="accounts/local/models/other")


def missing_weight(root: Path, weights: dict) -> Path:
    return commit_weights(root, "bad", dict(list(weights.items())[1:]))


def strange_weight(root: Path, weights: dict) -> Path:
    return commit_weights(root, "bad", weights | {"stranger": torch.zeros(2)})


def wrong_shape(root: Path, weights: dict) -> Path:
    name = "model.norm.weight"
    return commit_weights(root, "bad", weights | {name: torch.zeros(3)})


def wrong_dtype(root: Path, weights: dict) -> Path:
    return commit_weights(root, "bad", {n: w.bfloat16() for n, w in weights.items()})


def orphan_delta(root: Path, weights: dict) -> Path:
    return commit_weights(root, "bad", weights, kind="delta", parent="never-loaded")


def flipped_byte(root: Path, weights: dict) -> Path:
    path = commit_weights(root, "bad", weights)
    file = path / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    return path


def uncommitted(root: Path, weights: dict) -> Path:
    (root / "bad").mkdir()
    save_file(weights, root / "bad" / "model.safetensors")
    return root / "bad"


def damaged_manifest(root: Path, weights: dict) -> Path:
    path = commit_weights(root, "bad", weights)
    (path / "manifest.json").write_text("{")
    return path


def adapter_without_config(root: Path, weights: dict) -> Path:
    return commit_weights(root, "bad", {"x.lora_A.weight": torch.zeros(1, 1)}, kind="adapter")


def strange_adapter(root: Path, weights: dict) -> Path:
    def write(directory: Path) -> None:
        (directory / "adapter_config.json").write_text(json.dumps({"r": 1, "lora_alpha": 1}))
        save_file({"x.lora_A.weight": torch.zeros(1, 1)}, directory / "adapter_model.safetensors")

    return commit(root, "bad", write, kind="adapter")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (other_model, "base_model"),
        (missing_weight, "missing"),
        (strange_weight, "stranger"),
        (wrong_shape, "model.norm.weight"),
        (wrong_dtype, "bfloat16"),
        (orphan_delta, "parent"),
        (flipped_byte, "checksum"),
        (uncommitted, "no committed snapshot"),
        (damaged_manifest, "damaged"),
        (adapter_without_config, "adapter_config.json"),
        (strange_adapter, "x.lora_A.weight"),
    ],
)
def test_a_bad_snapshot_leaves_the_old_weights_serving(own, model_dir, plain, tmp_path, make, reason):
    good = shifted(plain, 1)
    hotload(own, commit_weights(tmp_path, "s-1", good))
    status = hotload(own, make(tmp_path, shifted(plain, 2)), previous="never-loaded" if make is orphan_delta else None)
    assert reason in status["error"]
    assert status["stage"] == "serving"
    assert (status["current_snapshot_identity"], status["target_snapshot_identity"]) == ("s-1", "bad")
    assert_serves(own, model_with(model_dir, good), "s-1")
    assert hotload(own, commit_weights(tmp_path, "s-2", plain))["error"] == ""


def test_previous_must_be_what_is_loaded(own, plain, tmp_path):
    hotload(own, commit_weights(tmp_path, "s-1", plain))
    delta = commit_weights(tmp_path, "s-2", plain, kind="delta", parent="s-1")
    assert "previous_snapshot_identity" in hotload(own, delta)["error"]
    base = commit_weights(tmp_path, "s-3", plain)
    assert "stands alone" in hotload(own, base, previous="s-1")["error"]


def long_request(client: httpx.Client, answers: list) -> threading.Thread:
    def ask() -> None:
        body = {"prompt": PROMPT, "max_tokens": 600, "ignore_eos": True, "raw_output": True}
        answers.append(httpx.post(f"{client.base_url}/v1/completions", json=body, timeout=60).json()["choices"][0])

    thread = threading.Thread(target=ask)
    thread.start()
    deadline = time.monotonic() + 10
    while client.get("/worker/status").json()["in_flight"] == 0:
        assert time.monotonic() < deadline
    return thread


@pytest.mark.parametrize("transition", ["ASYNC", "SYNC"])
def test_requests_in_flight(model_dir, plain, tmp_path, transition):
    """ASYNC goes on with the new weights and labels the tokens; SYNC ends on the old ones."""
    answers: list[dict] = []
    path = commit_weights(tmp_path, "s-1", shifted(plain, 1))
    with serving(make_spec(model_dir, max_context_length=1024, transition=transition)) as client:
        thread = long_request(client, answers)
        assert hotload(client, path)["current_snapshot_identity"] == "s-1"
        still_running = thread.is_alive()
        thread.join(timeout=60)
    spans = [span["snapshot_identity"] for span in answers[0]["snapshot_identities"]]
    assert sum(span["count"] for span in answers[0]["snapshot_identities"]) == 600
    assert spans == ([None, "s-1"] if transition == "ASYNC" else [None])
    assert still_running or transition == "SYNC"


def test_a_copy_that_breaks_refuses_requests_until_a_whole_load(own, model_dir, plain, tmp_path, monkeypatch):
    from firebox.sampler import hotload as room

    hotload(own, commit_weights(tmp_path, "s-1", plain))
    with monkeypatch.context() as patch:
        patch.setattr(room._LiveWeights, "copy", lambda self, staged: (_ for _ in ()).throw(RuntimeError("bus error")))
        status = hotload(own, commit_weights(tmp_path, "s-2", plain))
    assert (status["stage"], status["current_snapshot_identity"]) == ("error", None)
    assert "bus error" in status["error"]
    assert own.post("/v1/completions", json={"prompt": PROMPT}).status_code == 503
    assert hotload(own, tmp_path / "s-1")["stage"] == "serving"
    assert_serves(own, model_with(model_dir, plain), "s-1")


def test_a_command_that_cannot_be_read_is_refused(own):
    for body in (b"", b"{}", b'{"identity": 5}'):
        assert own.post("/worker/hotload", content=body).status_code == 400
