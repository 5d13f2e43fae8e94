"""What a run leaves behind: checkpoint rows, metrics, curves, files for a supervisor."""

import json
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest

from training.recipes import sft_loop
from training.utils import (
    Checkpoint,
    CheckpointError,
    CheckpointLog,
    ConfigError,
    MismatchError,
    RunConfig,
    WandBConfig,
    WeightSyncConfig,
)
from training.utils.bands import judge
from training.utils.checkpoints import fixed
from training.utils.metrics import Curves, RunLog, Timer


def config(folder: Path, **changes: Any) -> sft_loop.Config:
    changes = {"weight_sync": WeightSyncConfig(dcp_save_interval=2)} | changes
    return sft_loop.Config("m", "t", "rows.jsonl", log_path=str(folder), **changes)


def row(step: int, job: str = "j", **changes: Any) -> Checkpoint:
    values = {"state_path": f"cross_job://{job}/step-{step}", "fixed": {"seed": 0}} | changes
    return Checkpoint(f"step-{step}", step, step * 8, job, **values)


def holding(*names: str) -> Callable[[str], Collection[str]]:
    return lambda job: names if job == "j" else ()


def test_checkpoint_rows_come_back_and_the_last_word_counts(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path / "run")
    assert log.latest() is None
    final = row(5, state_path=None, sampler_path="final-5-ab")
    for entry in (row(2, state_path=None), row(2), row(4), final):
        log.append(entry)
    assert log.rows() == [row(2), row(4), final]
    assert log.latest() == row(4)
    assert log.names() == ["cross_job://j/step-2", "cross_job://j/step-4", "final-5-ab"]
    log.append(row(2))
    assert log.latest() == row(2), "a row that is resumed from becomes the newest"
    log.drop([row(4)])
    assert log.rows() == [final, row(2)]


def test_a_broken_checkpoint_row_is_an_error_not_a_fresh_start(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path)
    log.append(row(2))
    with log.path.open("a") as file:
        file.write('{"name": "step-4"\n')
    with pytest.raises(CheckpointError, match=r"checkpoints.jsonl:2: not a checkpoint row"):
        log.latest()


def test_the_rest_of_a_cut_write_says_nothing(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path)
    log.append(row(2))
    with log.path.open("a") as file:
        file.write('{"name": "ste')
    assert log.rows() == [row(2)]
    log.append(row(4))
    assert log.rows() == [row(2), row(4)]


def test_the_newest_state_of_the_server_is_resumed(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path)
    assert log.to_resume(config(tmp_path), holding()) is None
    for entry in (row(2), row(4), row(6, state_path=None)):
        log.append(entry)
    assert log.to_resume(config(tmp_path), holding("step-2", "step-4")) == row(4), "the save of step 6 was cut off"
    found = log.to_resume(config(tmp_path), holding("step-2", "step-4", "step-6"))
    assert found == row(6), "the save of step 6 finished, only its last row is missing"
    with pytest.raises(CheckpointError, match=r"does not have cross_job://j/step-4 any more: name another in run"):
        log.to_resume(config(tmp_path), holding("step-2"))


def test_a_named_checkpoint_comes_first(tmp_path: Path) -> None:
    log = CheckpointLog(tmp_path)
    for entry in (row(2), row(4)):
        log.append(entry)
    for name in ("step-2", "cross_job://j/step-2"):
        named = config(tmp_path, run=RunConfig(resume_from=name), weight_sync=WeightSyncConfig())
        assert log.to_resume(named, holding()) == row(2)
    with pytest.raises(CheckpointError, match=r"'step-3' is not in .*\(states there: step-2, step-4\); run\.init_from"):
        log.to_resume(config(tmp_path, run=RunConfig(resume_from="step-3")), holding())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "step-4 was saved with seed 0, not 1"),
        ({"lora_rank": 8}, "step-4 was saved with lora_rank 0, not 8"),
        ({"max_seq_len": 5}, "step-4 was saved with max_seq_len None, not 5"),
        ({"weight_sync": WeightSyncConfig()}, "set weight_sync.dcp_save_interval above 0"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    log = CheckpointLog(tmp_path)
    log.append(row(4, fixed=fixed(config(tmp_path))))
    with pytest.raises(CheckpointError, match=message):
        log.to_resume(config(tmp_path, **changes), holding("step-4"))


def test_other_rows_under_the_same_name_are_other_data(tmp_path: Path) -> None:
    data, log = tmp_path / "rows.jsonl", CheckpointLog(tmp_path)
    data.write_text("one")
    mine = config(tmp_path)
    mine.dataset = str(data)
    log.append(row(4, fixed=fixed(mine)))
    moved = data.rename(tmp_path / "moved.jsonl")
    mine.dataset = str(moved)
    assert log.to_resume(mine, holding("step-4")) is not None
    moved.write_text("two")
    with pytest.raises(CheckpointError, match="saved with dataset sha256:"):
        log.to_resume(mine, holding("step-4"))


def run_log(folder: Path, mismatch_stop_after: int = 0, **changes: Any) -> RunLog:
    curves = [Curves("loss", ["train/loss", "absent"])]
    live = {"loss": "train/loss"}
    return RunLog(config(folder, **changes), live=live, curves=curves, mismatch_stop_after=mismatch_stop_after)


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


def two_steps(folder: Path, **changes: Any) -> None:
    with run_log(folder, **changes) as log:
        log.begin(0, 2)
        log.log(1, {"train/loss": 1.0})
        log.log(2, {"train/loss": 0.5})
    assert steps(folder) == [1, 2]


def test_a_missing_tracker_is_reported_once_and_training_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, package, None)
    two_steps(tmp_path, wandb=WandBConfig(project="p"), run=RunConfig(trackio="p"))
    printed = capsys.readouterr().err
    assert printed.count("Weights & Biases is off for this run") == 1
    assert printed.count("trackio is off for this run") == 1


def test_a_tracker_that_fails_on_the_way_is_switched_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def log(self, row: Any, step: int) -> None:
            raise OSError("disk full")

        def finish(self) -> None:
            raise AssertionError("it is off")

    class Module:
        init = staticmethod(lambda **_: Full())
        Settings = staticmethod(lambda **_: None)

    monkeypatch.setitem(sys.modules, "wandb", Module)
    two_steps(tmp_path, wandb=WandBConfig(run_name="r"))
    assert capsys.readouterr().err.count("Weights & Biases is off for this run: disk full") == 1


def test_wandb_offline_keeps_the_rows_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    two_steps(tmp_path, wandb=WandBConfig(project="p", run_name="r"))
    assert [path.stat().st_size > 0 for path in tmp_path.glob("wandb/offline-run-*/run-*.wandb")] == [True]


def test_trackio_shows_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    two_steps(tmp_path, run=RunConfig(trackio="p"))
    assert list((tmp_path / "trackio").glob("p*.db"))


def test_tensorboard_reads_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    two_steps(tmp_path, run=RunConfig(tensorboard=True))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]


def test_a_supervisor_can_follow_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {kind: tmp_path / "seen" / kind for kind in ("STATUS", "METADATA", "METRICS", "OUTPUT")}
    for kind, path in paths.items():
        monkeypatch.setenv(f"COOKBOOK_{kind}_FILE", str(path))

    def read(kind: str) -> Any:
        return json.loads(paths[kind].read_text())

    with run_log(tmp_path / "run") as log:
        assert read("STATUS")["state"] == "starting"
        log.begin(0, 2, job_id="j")
        assert read("METADATA")["job_id"] == "j"
        assert read("METADATA")["settings"]["optim.learning_rate"] == 1e-4
        log.log(1, {"train/loss": 1.0})
        status = read("STATUS")
        assert (status["state"], status["step"], status["total_steps"]) == ("running", 1, 2)
        log.log(2, {"train/loss": 0.5})
        result = log.result(job_id="j")
    assert read("STATUS")["state"] == "completed"
    assert read("OUTPUT") == result
    assert paths["METRICS"].read_text() == (tmp_path / "run" / "metrics.jsonl").read_text()
    for error, state in ((ValueError("bad row"), "failed"), (SystemExit(143), "stopped")):
        with pytest.raises(type(error)), run_log(tmp_path / "run"):
            raise error
        assert read("STATUS")["state"] == state
        assert read("STATUS")["message"] == repr(error)


def test_a_supervisor_file_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("COOKBOOK_METRICS_FILE", str(tmp_path / "file" / "metrics"))
    with pytest.raises(ConfigError, match=r"^COOKBOOK_METRICS_FILE = "):
        run_log(tmp_path)


@pytest.mark.parametrize(
    ("metrics", "band"),
    [
        ({}, None),
        ({"abs_mean": 0.009, "k3": 0.0009, "pearson": 0.9995, "exp_abs_mean": 1.01}, "green"),
        ({"abs_mean": 0.01, "k3": 0.0}, "amber"),
        ({"abs_mean": 0.05, "k3": 0.0}, "red"),
        ({"abs_mean": 0.0, "k3": 0.001}, "amber"),
        ({"abs_mean": 0.0, "k3": 0.01}, "red"),
        ({"exp_abs_mean": 1.06}, "amber"),
        ({"pearson": 0.995}, "amber"),
        ({"pearson": 0.98}, "red"),
        ({"abs_mean": float("nan")}, "red"),
    ],
)
def test_bands_of_the_mismatch(metrics: dict[str, float], band: str | None) -> None:
    assert judge({f"mismatch/{name}": value for name, value in metrics.items()}) == band


def test_samples_of_older_weights_are_not_judged() -> None:
    assert judge({"mismatch/abs_mean": 1.0, "rollout/staleness": 1.0}) is None


def test_a_run_stops_after_red_steps_in_a_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    red, green = {"mismatch/abs_mean": 0.06}, {"mismatch/abs_mean": 0.0}
    with run_log(tmp_path, mismatch_stop_after=2) as log:
        log.begin(0, 9)
        for step, metrics in enumerate([green, red, green, red], start=1):
            log.log(step, metrics)
        with pytest.raises(MismatchError, match=r"step 5: .* 2 steps in a row \(mismatch/abs_mean 0\.06\)"):
            log.log(5, red)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]
    assert capsys.readouterr().err.count("band red") == 1
    with run_log(tmp_path, mismatch_stop_after=0) as log:
        log.begin(0, 9)
        for step in range(1, 10):
            log.log(step, red)


def test_timers_add_up() -> None:
    timer = Timer()
    for _ in range(2):
        with timer("rollout"):
            pass
    with timer("optim"):
        pass
    assert list(timer.seconds) == ["time/rollout_s", "time/optim_s"]
    assert timer.total == sum(timer.seconds.values()) > 0
