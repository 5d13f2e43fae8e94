"""DPO and ORPO, and SFT beside them, against a whole server: learning on data made by a script, and real rows."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from proofs import FULL, Record, count
from running import MODEL, RunningServer

from training.examples.preferences import make_preferences
from training.recipes import dpo_loop, orpo_loop, sft_loop
from training.utils import InfraConfig, OptimConfig, PlatformError, WeightSyncConfig

DATA = Path(os.environ.get("FIREBOX_TEST_DATA") or "/nonexistent")
SHAPES = "accounts/local/trainingShapes"
FULL_MODEL = InfraConfig(training_shape_id=f"{SHAPES}/tiny-cpu")
LORA = InfraConfig(training_shape_id=f"{SHAPES}/tiny-cpu-lora")
WITH_REFERENCE = replace(FULL_MODEL, ref_training_shape_id=f"{SHAPES}/tiny-cpu-forward")

only_when_proving = pytest.mark.skipif(not FULL, reason="runs under FIREBOX_PROVE=1")


@pytest.fixture(autouse=True)
def _address(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def about(server: RunningServer, tmp_path: Path) -> dict[str, Any]:
    """Settings of every run here: 400 pairs made by a script, a quarter of them held out."""
    make_preferences(tmp_path / "pairs.jsonl")
    return {
        "base_model": MODEL,
        "tokenizer_model": str(server.data / "models" / "local" / "tiny"),
        "dataset": str(tmp_path / "pairs.jsonl"),
        "log_path": str(tmp_path / "run"),
        "eval_fraction": 0.25,
        "max_steps": count(8, 40),
    }


def steps_of(config: Any) -> list[dict[str, Any]]:
    lines = (Path(config.log_path) / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if not name.startswith(("time", "perf"))}
            for line in lines]  # fmt: skip


@pytest.mark.prove
@pytest.mark.parametrize(
    ("recipe", "infra", "lora_rank", "learning_rate"),
    [
        pytest.param(orpo_loop, FULL_MODEL, 0, 1e-3, id="orpo"),
        pytest.param(orpo_loop, LORA, 8, 3e-3, id="orpo-lora", marks=only_when_proving),
        pytest.param(dpo_loop, FULL_MODEL, 0, 3e-4, id="dpo", marks=only_when_proving),
        pytest.param(dpo_loop, LORA, 8, 3e-3, id="dpo-lora", marks=only_when_proving),
        pytest.param(dpo_loop, WITH_REFERENCE, 0, 3e-4, id="dpo-reference-trainer", marks=only_when_proving),
    ],
)
def test_preferences_are_learned(
    recipe: ModuleType, infra: InfraConfig, lora_rank: int, learning_rate: float, about: dict[str, Any], record: Record
) -> None:
    """The manner that a question asks for is preferred in questions that were never seen."""
    optim = OptimConfig(learning_rate=learning_rate, warmup_steps=2)
    config = recipe.Config(**about, infra=infra, lora_rank=lora_rank, optim=optim)
    recipe.main(config)
    first, *_, last = steps_of(config)
    for name in ("loss", "margin", "accuracy"):
        record(f"held-out {name} before and after", [round(row[f"eval/{name}"], 4) for row in (first, last)])
    assert last["eval/accuracy"] >= 0.95
    assert last["eval/margin"] > first["eval/margin"] + 0.5
    assert last["eval/loss"] < first["eval/loss"]
    if recipe is dpo_loop:  # before the first step policy and reference are the same model
        assert first["eval/loss"] == pytest.approx(math.log(2), abs=1e-5)


@pytest.mark.prove
def test_dpo_that_is_cut_off_goes_on_with_the_reference_it_began_with(about: dict[str, Any], record: Record) -> None:
    """Steps 5 and 6 are taken twice, and bit for bit the same, though the first weights are gone the second time."""
    make_preferences(Path(about["dataset"]), num_rows=32)
    about |= {"max_steps": 6, "batch_size": 4, "infra": FULL_MODEL, "optim": OptimConfig(learning_rate=1e-3)}
    config = dpo_loop.Config(**about, weight_sync=WeightSyncConfig(dcp_save_interval=4))

    def cut_off(row: dict[str, Any]) -> None:
        if row["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dpo_loop.main(config, on_step=cut_off)
    first = steps_of(config)
    assert [row["step"] for row in first] == [0, 1, 2, 3, 4, 5, 6]
    resumed: list[int] = []
    dpo_loop.main(config, on_step=lambda row: resumed.append(row["step"]))
    assert resumed == [5, 6]
    assert steps_of(config) == first
    record("training margin by step", [round(row["train/margin"], 4) for row in first[1:]])
    # Before the first step, policy and reference are the same model.
    assert first[0]["eval/loss"] == first[1]["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first[-1]["eval/accuracy"] >= 0.75


def test_a_reference_shape_that_is_not_there_is_told_before_a_trainer_starts(
    server: RunningServer, about: dict[str, Any]
) -> None:
    jobs = "/v1/accounts/local/rlorTrainerJobs"
    before = server.ask("GET", jobs).json()
    infra = replace(FULL_MODEL, ref_training_shape_id=f"{SHAPES}/no-such-shape")
    with pytest.raises(PlatformError, match="no-such-shape"):
        dpo_loop.main(dpo_loop.Config(**about, infra=infra))
    assert server.ask("GET", jobs).json() == before


@pytest.mark.prove
@only_when_proving
@pytest.mark.parametrize("recipe", [orpo_loop, dpo_loop], ids=["orpo", "dpo"])
def test_real_preferences(recipe: ModuleType, about: dict[str, Any], record: Record) -> None:
    """Long rows, cut to what the model is given; 30 pairs are too few to ask for more than that they are fitted."""
    if not DATA.is_dir():
        pytest.skip("FIREBOX_TEST_DATA is not set")
    about |= {"dataset": str(DATA / "ifeval_preference.jsonl"), "max_seq_len": 512, "batch_size": 4, "max_steps": 30}
    config = recipe.Config(**about, infra=FULL_MODEL, optim=OptimConfig(learning_rate=3e-4, warmup_steps=2))
    recipe.main(config)
    first, *_, last = steps_of(config)
    for name in ("loss", "margin", "accuracy"):
        record(f"held-out {name} before and after", [round(row[f"eval/{name}"], 4) for row in (first, last)])
        record(f"training {name}, last step", last[f"train/{name}"])
    assert last["train/accuracy"] == 1.0
    assert last["train/loss"] < steps_of(config)[1]["train/loss"]


@pytest.mark.prove
@only_when_proving
@pytest.mark.parametrize(
    ("infra", "lora_rank", "learning_rate"), [(FULL_MODEL, 0, 1e-3), (LORA, 8, 5e-3)], ids=["full", "lora"]
)
def test_imitation_is_learned(
    infra: InfraConfig, lora_rank: int, learning_rate: float, about: dict[str, Any], tmp_path: Path, record: Record
) -> None:
    """SFT on the chosen answers, as prompt and completion: the manner is certain, only the sum is hard."""
    pairs = [json.loads(line) for line in Path(about["dataset"]).read_text().splitlines()]
    rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    optim = OptimConfig(learning_rate=learning_rate, warmup_steps=2)
    about |= {"dataset": str(tmp_path / "rows.jsonl"), "infra": infra, "lora_rank": lora_rank, "optim": optim}
    config = sft_loop.Config(**about)
    sft_loop.main(config)
    first, *_, last = steps_of(config)
    record("held-out loss before and after, nats per token", [first["eval/loss"], last["eval/loss"]])
    record("held-out loss of a unigram", last["eval/unigram_loss"])
    assert last["eval/loss"] < 0.5 * last["eval/unigram_loss"]
