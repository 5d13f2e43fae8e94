"""What the cookbook promises of a run, against a whole server: dry runs, resume, kept checkpoints, reconnection."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from running import MODEL, RunningServer

from training.recipes import rl_loop, sft_loop
from training.utils import (
    CheckpointError,
    CheckpointLog,
    DeployConfig,
    InfraConfig,
    ReconnectableClient,
    ReconnectedError,
    RolloutConfig,
    RunConfig,
    WeightSyncConfig,
    Workspace,
)
from training.utils.datums import build_datum

SHAPE = "accounts/local/trainingShapes/tiny-cpu"
LORA_SHAPE = "accounts/local/trainingShapes/tiny-cpu-lora"
FORWARD_SHAPE = "accounts/local/trainingShapes/tiny-cpu-forward"


@pytest.fixture(autouse=True)
def _address(server: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in server.env.items():
        monkeypatch.setenv(name, value)


def config(server: RunningServer, folder: Path, **changes: Any) -> sft_loop.Config:
    """Six steps of two rows each, a state behind every second one."""
    rows = folder / "rows.jsonl"
    if not rows.exists():
        chats = [
            {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"{i}"}]}
            for i in range(9)
        ]
        rows.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    settings: dict[str, Any] = {
        "base_model": MODEL,
        "tokenizer_model": str(server.data / "models" / "local" / "tiny"),
        "dataset": str(rows),
        "log_path": str(folder / "run"),
        "batch_size": 2,
        "max_steps": 6,
        "infra": InfraConfig(training_shape_id=SHAPE),
        "weight_sync": WeightSyncConfig(dcp_save_interval=2),
    }
    return sft_loop.Config(**settings | changes)


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["train/loss"] for row in rows]


def running_jobs(server: RunningServer) -> list[str]:
    return [job["name"] for job in server.ask("GET", "/v1/accounts/local/rlorTrainerJobs").json()["rlorTrainerJobs"]]


def test_a_dry_run_shows_everything_and_creates_nothing(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = running_jobs(server)
    shown = sft_loop.main(config(server, tmp_path, run=RunConfig(dry_run=True)))
    assert running_jobs(server) == before
    assert not (tmp_path / "run").exists()
    sources = {name: setting["source"] for name, setting in shown["settings"].items()}
    assert sources["batch_size"] == "set"
    assert shown["settings"]["optim.learning_rate"] == {"value": 1e-4, "source": "default"}
    assert sources["infra.accelerator_type"].startswith(f"{SHAPE}/versions/")
    assert sources["FIREWORKS_BASE_URL"] == "environment"
    assert shown["settings"]["FIREWORKS_BASE_URL"]["value"] == server.url
    assert shown["estimate"]["steps"] == 6
    assert shown["shape"]["max_supported_context_length"] > 0
    printed = capsys.readouterr().err
    assert "optim.learning_rate" in printed
    assert "nothing was created" in printed


KILLED_AT_STEP_5 = """
import os, sys, tyro
from training.recipes import sft_loop
sft_loop.main(tyro.cli(sft_loop.Config), lambda row: row["step"] == 5 and os.kill(os.getpid(), 9))
"""


def test_a_cut_run_goes_on_as_if_it_had_not_been(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed at step 5, before the row that says that the server has committed step 4: it is found on the server."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for folder in (whole, cut):
        folder.mkdir()
    sft_loop.main(config(server, whole))
    killed, before = config(server, cut), set(running_jobs(server))
    arguments = [
        "--base-model", MODEL, "--tokenizer-model", killed.tokenizer_model, "--dataset", killed.dataset,
        "--log-path", killed.log_path, "--batch-size", "2", "--max-steps", "6", "--infra.training-shape-id", SHAPE,
        "--weight-sync.dcp-save-interval", "2",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-c", KILLED_AT_STEP_5, *arguments], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    (left,) = set(running_jobs(server)) - before
    log = CheckpointLog(cut / "run")
    first, second = log.rows()
    *rows, confirmed = log.path.read_text().splitlines(keepends=True)
    log.path.write_text("".join(rows))
    assert log.latest() == first
    result = sft_loop.main(config(server, cut, run=RunConfig(keep_checkpoints=2)))
    assert f"resumed at step 4, row 8, from {second.state_path}" in capsys.readouterr().err
    assert losses(cut) == losses(whole)
    assert left not in running_jobs(server), "what the killed run left was removed"
    kept = log.rows()
    assert [row.step for row in kept] == [4, 6]
    assert result["checkpoints"] == [row.state_path for row in kept]
    with Workspace() as workspace:
        assert workspace.states(second.source_job_id) == ["step-4"], "step-2 made room for step-6"
        assert workspace.states("no-such-job") == []
        assert workspace.delete_state(second.source_job_id, "step-4")
        assert not workspace.delete_state(second.source_job_id, "step-4")
    log.path.write_text(confirmed)
    with pytest.raises(CheckpointError, match=r"does not have cross_job://.*/step-4 any more"):
        sft_loop.main(config(server, cut))


def test_an_adapter_is_a_warm_start(server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    lora = {"lora_rank": 4, "infra": InfraConfig(training_shape_id=LORA_SHAPE)}
    result = sft_loop.main(config(server, first, output_model_id="warm-adapter", **lora))
    assert result["output_model"] == "accounts/local/models/warm-adapter"
    run = RunConfig(init_from=result["output_model"])
    sft_loop.main(config(server, second, run=run, max_steps=1, weight_sync=WeightSyncConfig(), **lora))
    printed = capsys.readouterr().err
    assert "starting at step 0, row 0, with the weights of accounts/local/models/warm-adapter" in printed
    assert printed.count("dcp_save_interval is 0, so this run cannot be resumed") == 1
    assert losses(second)[0] < losses(first)[0] - 0.001


def trained(client: ReconnectableClient) -> float:
    """One step; returns the loss before it."""
    import tinker

    datum = build_datum([5, 6, 7, 8, 9], weights=[1.0] * 5)
    loss = float(client.forward_backward([datum]).metrics["loss:sum"])
    client.optim_step(tinker.AdamParams(learning_rate=1e-2))
    return loss


def test_a_client_that_reconnects_never_goes_on_with_base_weights(server: RunningServer) -> None:
    with Workspace() as workspace:
        job = workspace.trainer(MODEL, workspace.resolve(SHAPE), InfraConfig(training_shape_id=SHAPE)).job_id
        client = ReconnectableClient(workspace.trainers, job, MODEL, reconnect=True)
        trained(client)
        os.kill(server.pid_of(client.endpoint.job_name), signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(ReconnectedError, match="it holds the base weights") as lost:
                trained(client)
            assert lost.value.checkpoint is None
        client.close()

        client = ReconnectableClient(workspace.trainers, job, MODEL, reconnect=True)
        for _ in range(2):
            trained(client)
        client.save_state("two")
        expected = trained(client)
        os.kill(server.pid_of(client.endpoint.job_name), signal.SIGKILL)
        with pytest.raises(ReconnectedError, match=r"'two', saved behind 2 optimizer steps of this client") as caught:
            trained(client)
        assert (caught.value.checkpoint, caught.value.step) == ("two", 2)
        assert trained(client) == expected
        with pytest.raises(Exception, match="no_such_loss") as refused:
            client.forward([build_datum([1, 2])], "no_such_loss")
        assert not isinstance(refused.value, ReconnectedError), "a refusal is not a loss of the trainer"
        client.close()


def rl_config(server: RunningServer, folder: Path, **changes: Any) -> rl_loop.Config:
    """Two steps of four answers each."""
    rows = folder / "prompts.jsonl"
    rows.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    settings: dict[str, Any] = {
        "base_model": MODEL,
        "dataset": str(rows),
        "reward": length,
        "log_path": str(folder / "rl"),
        "max_steps": 2,
        "rollout": RolloutConfig(prompts_per_step=2, group_size=2, max_tokens=4),
        "infra": InfraConfig(training_shape_id=SHAPE),
        "deployment": DeployConfig(tokenizer_model=str(server.data / "models" / "local" / "tiny")),
    }
    return rl_loop.Config(**settings | changes)


def length(completion: str, row: dict[str, Any]) -> float:
    return float(len(completion))


def test_rl_without_reference_and_without_sync(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, seen = set(running_jobs(server)), set[str]()
    off = WeightSyncConfig(weight_sync_interval=0)
    config = rl_config(server, tmp_path, weight_sync=off)
    result = rl_loop.main(config, lambda row: seen.update(running_jobs(server)))
    assert len(seen - before) == 1, "no reference trainer"
    assert capsys.readouterr().err.count("the KL term is off") == 1
    assert "train/kl" not in result["metrics"]
    assert "time/weight_sync_s" not in result["metrics"]
    assert result["deployment_id"].startswith("tiny-")
    with Workspace() as workspace:
        assert workspace.states(result["job_id"]) == [], "neither a state nor a snapshot was saved"
        assert workspace.deployments.get(result["deployment_id"]) is None


def test_rl_with_reference_and_first_sync(server: RunningServer, tmp_path: Path) -> None:
    before, seen = set(running_jobs(server)), set[str]()
    config = rl_config(
        server,
        tmp_path,
        max_steps=1,
        infra=InfraConfig(training_shape_id=SHAPE, ref_training_shape_id=FORWARD_SHAPE),
        weight_sync=WeightSyncConfig(weight_sync_before_training=True),
    )
    result = rl_loop.main(config, lambda row: seen.update(running_jobs(server)))
    assert len(seen - before) == 2
    assert result["metrics"]["train/kl"] >= 0
    with Workspace() as workspace:
        kinds = {row["name"].rpartition("/")[2].rpartition("-")[0]: row["checkpointType"]
                 for row in workspace.trainers.list_checkpoints(result["job_id"])}  # fmt: skip
    assert kinds == {"start-0": "CHECKPOINT_TYPE_INFERENCE_BASE", "step-1": "CHECKPOINT_TYPE_INFERENCE_ARC_V2"}
