r"""The demo: a model's whole life on this machine, in about three minutes.

    python -m training.examples.demo --out runs/demo

Starts a server, makes a tiny random model and teaches it to reverse four digits: by imitating annotators who disagree
(SFT), then by rewarding right answers (GRPO). Each model is promoted, deployed and examined on questions that were
never trained on.

Knows the platform by its command line and its address only. Invariant: it exits with 0 only if the model has learned.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from training.examples import demo_data
from training.recipes import rl_loop, sft_loop
from training.utils import cli, data
from training.utils.config import (
    Checked,
    DeployConfig,
    InfraConfig,
    OptimConfig,
    WeightSyncConfig,
)
from training.utils.errors import CookbookError, PlatformError
from training.utils.provision import Workspace
from training.utils.render import load_tokenizer, render_prompt
from training.utils.rl.config import RolloutConfig
from training.utils.rl.rewards import Task
from training.utils.rl.rollout import Rollouts
from training.utils.rl.trajectory import Prompt, Rollout

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 20
ANSWER_TOKENS = 8
ANSWER_TIMEOUT_S = 60
# Held-out exact match, lowest and highest, that shows a run went as it should.
EXPECTED = {"tiny": (0.0, 0.05), "tiny-sft": (0.2, 0.4), "tiny-grpo": (0.8, 1.0)}
ORIGIN = {
    "tiny": "random weights",
    "tiny-sft": "SFT: annotators who disagree",
    "tiny-grpo": "GRPO: rewarded when right",
}
TUNED = OptimConfig(beta2=0.95, eps=1e-12, weight_decay=0.0)

console = Console(highlight=False)


@dataclass
class Config(Checked):
    """Settings of the demo."""

    out: Annotated[str, tyro.conf.arg(help="folder for the server's data, the runs and the logs")] = "runs/demo"
    seed: Annotated[int, tyro.conf.arg(help="fixes the model, the data and every draw")] = 0


def main(config: Config) -> None:
    """Run the demo. Leaves everything in a folder of its own, the exact match of each model in `summary.json`."""
    started = time.monotonic()
    folder = Path(config.out) / time.strftime("%Y%m%d-%H%M%S")
    folder.mkdir(parents=True)
    console.print(f"Logs and results of this run: [bold]{folder}[/]")
    with server(folder):
        say(1, "Making a tiny random model and its data")
        firebox(folder, "models", "make-tiny", "tiny", "--seed", str(config.seed))
        rows = demo_data.make_demo_data(folder / "data", config.seed)
        tokenizer_dir = str(next((folder / "server" / "models").glob("*/tiny")))
        questions = [
            Prompt(r, render_prompt(load_tokenizer(tokenizer_dir), r)) for r in data.load_prompts(rows.heldout)
        ]
        exams = {"tiny": examine("tiny", questions, tokenizer_dir)}

        say(2, f"SFT on {demo_data.SFT_ROWS} answers of two annotators; most phrasings were answered carelessly")
        sft_loop.main(sft_config(folder, rows.sft, tokenizer_dir, config.seed))
        exams["tiny-sft"] = examine("tiny-sft", questions, tokenizer_dir)

        say(3, f"GRPO on {demo_data.RL_ROWS} other questions; new weights are hot-loaded into the sampler every step")
        rl_loop.main(rl_config(folder, rows.rl, tokenizer_dir, config.seed))
        say(4, "Asking the promoted model")
        exams["tiny-grpo"] = examine("tiny-grpo", questions, tokenizer_dir)
    scores = {model: sum(answer.reward for answer in exam) / len(exam) for model, exam in exams.items()}
    summary = {"exact_match": scores, "seconds": round(time.monotonic() - started, 1)}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    show(exams, scores)
    check(scores, folder)
    console.print(f"Done in {summary['seconds']:.0f} s.", NEXT.format(folder=folder), soft_wrap=True, markup=False)


def load_questions(rows: Path, tokenizer_dir: str) -> list[Prompt]:
    tokenizer = load_tokenizer(tokenizer_dir)
    return [Prompt(row, render_prompt(tokenizer, row)) for row in data.load_prompts(rows)]


def sft_config(folder: Path, rows: Path, tokenizer_dir: str, seed: int) -> sft_loop.Config:
    return sft_loop.Config(
        base_model=model_name("tiny"),
        tokenizer_model=tokenizer_dir,
        dataset=str(rows),
        log_path=str(folder / "sft"),
        output_model_id="tiny-sft",
        batch_size=32,
        max_steps=300,
        seed=seed,
        optim=OptimConfig(**vars(TUNED) | {"learning_rate": 1e-3, "lr_schedule": "linear", "warmup_steps": 20}),
        infra=InfraConfig(training_shape_id=shape("tiny")),
    )


def rl_config(folder: Path, rows: Path, tokenizer_dir: str, seed: int) -> rl_loop.Config:
    return rl_loop.Config(
        base_model=model_name("tiny-sft"),
        dataset=str(rows),
        reward=demo_data.reward,
        log_path=str(folder / "grpo"),
        output_model_id="tiny-grpo",
        max_steps=24,
        seed=seed,
        rollout=RolloutConfig(prompts_per_step=16, group_size=8, max_tokens=ANSWER_TOKENS),
        optim=OptimConfig(**vars(TUNED) | {"learning_rate": 2e-4}),
        infra=InfraConfig(training_shape_id=shape("tiny-sft"), ref_training_shape_id=shape("tiny-sft", "-forward")),
        deployment=DeployConfig(tokenizer_model=tokenizer_dir),
        weight_sync=WeightSyncConfig(weight_sync_interval=1),
    )


def examine(model: str, questions: list[Prompt], tokenizer_dir: str) -> list[Rollout]:
    """The model's greedy answers to all `questions`, from a deployment of its own."""
    with Workspace() as workspace, console.status(f"deploying {model}"):
        tokenizer, profile = load_tokenizer(tokenizer_dir), workspace.resolve(shape(model))
        sampler = workspace.sampler(workspace.deployment(model_name(model), profile, DeployConfig(), None), tokenizer)
        settings = RolloutConfig(max_tokens=ANSWER_TOKENS)
        task = Task(demo_data.reward, settings)
        with Rollouts(sampler, tokenizer, task, settings, timeout=ANSWER_TIMEOUT_S, seed=0) as rollouts:
            answers = rollouts.greedy(questions)
    right = sum(answer.reward for answer in answers)
    console.print(f"{model} answers {right:.0f} of {len(answers)} held-out questions right")
    return answers


def show(exams: dict[str, list[Rollout]], scores: dict[str, float]) -> None:
    """The scores, beside the answers to one question that only the last model knows."""
    before, after = exams["tiny-sft"], exams["tiny-grpo"]
    asked = next((i for i, answer in enumerate(after) if answer.reward > before[i].reward), 0)
    question = after[asked].prompt.row.messages[-1]["content"]
    table = Table(title=f"{len(after)} questions that were never trained on, answered greedily", title_justify="left")
    for heading in ("model", "made by", "right", f'answer to "{question}"'):
        table.add_column(heading, justify="right" if heading == "right" else "left")
    for model, exam in exams.items():
        table.add_row(model, ORIGIN[model], f"{scores[model]:.1%}", repr(exam[asked].text))
    console.print()
    console.print(table)


NEXT = """
  curves and metrics   {folder}/sft, {folder}/grpo
  logs                 {folder}/server.log, {folder}/server/jobs/*/*/log, {folder}/server/deployments/*/*/log

Next, with your own model and rows:
  .venv/bin/firebox up                                    prints two export lines: set them where you work
  .venv/bin/firebox models add NAME --from DIR            a Qwen3-, Qwen2- or Llama-style directory
  .venv/bin/firebox shapes                                where it can be trained
  .venv/bin/python -m training.recipes.sft_loop --help    rows are {{"messages": [...]}}, one per line
  .venv/bin/python -m training.recipes.rl_loop --help     a reward is a function (completion, row) -> float
The models of this run are kept: .venv/bin/firebox up --data-dir {folder}/server"""


def check(scores: dict[str, float], folder: Path) -> None:
    """Raise CookbookError unless every model scores what it should."""
    off = [f"{m} {scores[m]:.3f}, expected {low} to {high}" for m, (low, high) in EXPECTED.items()
           if not low <= scores[m] <= high]  # fmt: skip
    if off:
        raise CookbookError(f"the models did not learn as they should: {'; '.join(off)}. See {folder}")


# --- the server, by its command line ---------------------------------------------------------------------------------


@contextmanager
def server(folder: Path) -> Iterator[None]:
    """A server of this run's own, stopped with all its workers when the block ends."""
    command = [sys.executable, "-m", "firebox", "up", "--port", "0", "--data-dir", str(folder / "server")]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        address, key = _announced(process, folder)
        os.environ |= {"FIREWORKS_BASE_URL": address, "FIREWORKS_API_KEY": key}
        console.print(f"The server is up at {address}")
        yield
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()  # its workers notice and end by themselves


def _announced(process: subprocess.Popen[str], folder: Path) -> tuple[str, str]:
    """Address and key that the server prints once it answers."""
    assert process.stdout is not None
    deadline = threading.Timer(START_TIMEOUT_S, process.kill)
    deadline.start()
    said: dict[str, str] = {}
    for line in process.stdout:
        name, _, value = line.strip().removeprefix("export ").partition("=")
        said[name] = value
        if {"FIREWORKS_BASE_URL", "FIREWORKS_API_KEY"} <= said.keys():
            break
    deadline.cancel()
    if "FIREWORKS_API_KEY" not in said:
        raise PlatformError(f"the server did not start; see {folder / 'server.log'}")
    return said["FIREWORKS_BASE_URL"], said["FIREWORKS_API_KEY"]


def firebox(folder: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "firebox", *arguments, "--data-dir", str(folder / "server")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise PlatformError(f"firebox {' '.join(arguments)} failed: {done.stderr.strip()[-500:]}")


def model_name(model: str) -> str:
    return f"accounts/local/models/{model}"


def shape(model: str, mode: str = "") -> str:
    return f"accounts/local/trainingShapes/{model}-cpu{mode}"


def say(number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/4 {text}[/]")


if __name__ == "__main__":
    cli.run(Config, main)
