"""`load_adapter`: what PEFT made computes the same here, and nothing but what the operator allows is ever read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights import logprobs, plain_logprobs, trained
from trainer_harness import Driver
from transformers import AutoModelForCausalLM

from firebox.wire.training import LoadAdapter, SaveForSampler


def make_adapter(tiny_dir: Path, out: Path, **settings: object) -> torch.nn.Module:
    """A random adapter of rank 4 in `out`, as PEFT writes it; returns PEFT's own model of it."""
    torch.manual_seed(3)
    config = peft.LoraConfig(**({"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "up_proj"]} | settings))
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_dir, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(out, save_embedding_layers=False)
    return model


@pytest.fixture
def allowed(tmp_path: Path) -> Path:
    (tmp_path / "allowed").mkdir()
    return tmp_path / "allowed"


@pytest.fixture
def driver(make_spec, allowed: Path, tmp_path: Path) -> Driver:
    return trained(make_spec(lora_rank=8, allow_dirs=[str(allowed)], models_dir=str(tmp_path / "models")))


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"target_modules": ["o_proj"], "lora_alpha": 3}])
@pytest.mark.parametrize("registered", [False, True])
def test_an_adapter_computes_what_peft_says(
    driver: Driver, tiny_dir: Path, tmp_path: Path, allowed: Path, settings: dict, registered: bool
):
    directory = tmp_path / "models" / "mine" if registered else allowed / "deep" / "mine"
    model = make_adapter(tiny_dir, directory, **settings)
    ref = "accounts/fireworks/models/mine" if registered else str(directory)
    assert driver.do(LoadAdapter(path=ref)).adapter_path == ref
    assert (logprobs(driver) - plain_logprobs(model)).abs().max() <= 1e-5
    # Weights only: what the model had gathered before is gone.
    state = driver.state()
    assert state["counters"].tolist() == [0, 0, 0]
    assert not any(name.startswith("gradients/") for name in state)
    # And it trains on, all layers of it.
    driver.backward(5)
    driver.step()
    after = driver.state()
    ups = [name for name in state if name.startswith("weights/") and name.endswith("lora_B.weight")]
    assert not [name for name in ups if torch.equal(state[name], after[name])]


def test_what_this_trainer_published_comes_back(driver: Driver, make_spec, tmp_path: Path, allowed: Path):
    driver.do(SaveForSampler(name="mine"))
    shutil.copytree(tmp_path / "jobs/job/snapshots/mine", allowed / "mine")
    other = Driver(make_spec("other", lora_rank=4, allow_dirs=[str(allowed)]), 4)
    other.do(LoadAdapter(path=str(allowed / "mine")))
    state, expected = other.state(), driver.state()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items() if name.startswith("weights/"))
    foreign = Driver(make_spec("foreign", lora_rank=4, allow_dirs=[str(allowed)], base_model="other"), 4)
    assert "adapter of" in foreign.error(LoadAdapter(path=str(allowed / "mine")))


def test_only_allowed_files_are_read(driver: Driver, make_spec, tiny_dir: Path, tmp_path: Path, allowed: Path):
    make_adapter(tiny_dir, tmp_path / "outside")
    make_adapter(tiny_dir, allowed / "half")
    (allowed / "link").symlink_to(tmp_path / "outside")
    (allowed / "half" / "adapter_model.safetensors").unlink()
    (allowed / "half" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    (tmp_path / "allowed-not").symlink_to(tmp_path / "outside")
    before = driver.state()
    for path in (
        tmp_path / "outside", tmp_path / "allowed-not", allowed / "link", allowed / "half", allowed / "../outside",
        "/", "/etc/passwd", "/nowhere/at/all",
    ):  # fmt: skip
        assert "--allow-dir" in driver.error(LoadAdapter(path=str(path)))
    assert "name too long" in driver.error(LoadAdapter(path=f"{allowed}/{'x' * 5000}"))
    for ref in ("", "mine", "../mine", "gs://bucket/mine", "file:///etc", "/a\0b"):
        assert "neither" in driver.error(LoadAdapter(path=ref))
    for ref, told in (
        ("accounts/local/models/none", "known ones: none"),
        ("accounts/other/models/mine", "another account"),
        ("accounts/local/models/..", "model id"),
        ("accounts/local/models/a/../b", "not a resource name"),
    ):
        assert told in driver.error(LoadAdapter(path=ref))
    assert all(torch.equal(tensor, before[name]) for name, tensor in driver.state().items() if name != "rng")
    alone = Driver(make_spec("alone", lora_rank=4), 4)
    assert "without a server" in alone.error(LoadAdapter(path="accounts/local/models/mine"))
    assert "--allow-dir" in alone.error(LoadAdapter(path=str(tmp_path / "outside")))


def damaged(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        file = directory / "adapter_model.safetensors"
        save_file(change(load_file(file)), file)

    return write


def configured(**changes: object) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        file = directory / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return write


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (configured(use_dora=True), "use_dora"),
        (configured(peft_type="IA3"), "peft_type"),
        (configured(modules_to_save=["lm_head"]), "modules_to_save"),
        (configured(rank_pattern={"q_proj": 2}), "rank_pattern"),
        (configured(r=0), "r=0"),
        (configured(r=8), "rank 8"),
        (configured(lora_alpha=None), "lora_alpha"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "not valid JSON"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "JSON object"),
        (lambda d: (d / "adapter_config.json").unlink(), "no PEFT directory"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x" * 100), "adapter_model.safetensors"),
        (damaged(lambda t: {}), "nothing in it"),
        (damaged(lambda t: {k: v for k, v in t.items() if "lora_A" in k}), "not both there"),
        (damaged(lambda t: {k.replace("q_proj", "z_proj"): v for k, v in t.items()}), "z_proj"),
        (damaged(lambda t: {k: v * torch.nan for k, v in t.items()}), "NaN"),
        (damaged(lambda t: {k: v[:, :-1].clone() if "lora_A" in k else v for k, v in t.items()}), "here"),
    ],
)  # fmt: skip
def test_an_adapter_that_does_not_fit_changes_nothing(
    driver: Driver, tiny_dir: Path, allowed: Path, spoil: Callable[[Path], None], told: str
):
    make_adapter(tiny_dir, allowed / "bad")
    spoil(allowed / "bad")
    before = driver.state()
    assert told in driver.error(LoadAdapter(path=str(allowed / "bad")))
    assert all(torch.equal(tensor, before[name]) for name, tensor in driver.state().items() if name != "rng")


def test_an_adapter_needs_a_model_of_its_rank(driver: Driver, make_spec, tiny_dir: Path, allowed: Path):
    make_adapter(tiny_dir, allowed / "two", r=2)
    assert "rank 2" in driver.error(LoadAdapter(path=str(allowed / "two")))
    full = Driver(make_spec("full", allow_dirs=[str(allowed)]), 0)
    assert "LoRA" in full.error(LoadAdapter(path=str(allowed / "two")))
