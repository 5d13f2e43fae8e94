"""What a run leaves behind: checkpoint rows, metrics, curves."""

import json
import sys
from pathlib import Path

import pytest

from training.utils import Checkpoint, CheckpointError, CheckpointLog, WandBConfig
from training.utils.metrics import Curves, RunLog, Timer
from training.utils.provision import derive_deployment_id


def row(step: int, **changes: str | None) -> Checkpoint:
    values = {"state_path": f"cross_job://j/step-{step}", "sampler_path": None} | changes
    return Checkpoint(f"step-{step}", step, step * 8, "j", base_model="m", training_shape="s", **values)


def test_checkpoint_rows_come_back_and_the_newest_state_wins(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path / "run")
    assert log.latest() is None
    for entry in (row(2), row(4), row(5, state_path=None, sampler_path="final-5-ab")):
        log.append(entry)
    assert log.latest() == row(4)
    assert log.names() == ["cross_job://j/step-2", "cross_job://j/step-4", "final-5-ab"]


def test_a_broken_checkpoint_row_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path)
    log.append(row(2))
    with log.path.open("a") as file:
        file.write('{"name": "step-4"\n')
    with pytest.raises(CheckpointError, match=r"checkpoints.jsonl:2: not a checkpoint row"):
        log.latest()


def run_log(folder: Path, wandb: WandBConfig | None = None) -> RunLog:
    curves = [Curves("loss", ["train/loss", "absent"])]
    return RunLog(folder, live={"loss": "train/loss"}, curves=curves, wandb=wandb or WandBConfig(), config={})


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_have_one_row_per_step_after_a_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_log(tmp_path) as log:
        log.begin(0, 4)
        for step in (1, 2, 3):
            log.log(step, {"train/loss": 1.0 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "tr')
    with run_log(tmp_path) as log:
        log.begin(2, 4)
        log.log(3, {"train/loss": 0.25})
        result = log.result(job_id="j")
    assert steps(tmp_path) == [1, 2, 3]
    assert result["metrics"]["train/loss"] == 0.25
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().err
    assert "step 3/4  loss 0.25  ETA" in printed
    assert f"curves: {tmp_path / 'curves.png'}" in printed


def test_a_fresh_start_moves_older_metrics_aside(tmp_path: Path) -> None:
    for _ in range(2):
        with run_log(tmp_path) as log:
            log.begin(0, 1)
            log.log(1, {"train/loss": 1.0})
    assert steps(tmp_path) == [1]
    assert len(list(tmp_path.glob("metrics-before-*.jsonl"))) == 1


def test_a_failing_tracker_is_reported_once_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with run_log(tmp_path, WandBConfig(project="p")) as log:
        log.begin(0, 2)
        log.log(1, {"train/loss": 1.0})
        log.log(2, {"train/loss": 0.5})
    assert steps(tmp_path) == [1, 2]
    assert capsys.readouterr().err.count("Weights & Biases is off") == 1


def test_timers_add_up() -> None:
    timer = Timer()
    for _ in range(2):
        with timer("rollout"):
            pass
    with timer("optim"):
        pass
    assert list(timer.seconds) == ["time/rollout_s", "time/optim_s"]
    assert timer.total == sum(timer.seconds.values()) > 0


def test_deployment_ids_are_valid_and_named_after_the_model() -> None:
    first, second = (derive_deployment_id("accounts/local/models/Qwen3.5-8B") for _ in range(2))
    assert first.startswith("qwen3-5-8b-")
    assert first != second
    assert len(derive_deployment_id("accounts/a/models/" + "x" * 80)) <= 63
