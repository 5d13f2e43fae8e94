"""kill -9 of a recipe, of its trainer, of its sampler and of the server, at random moments: the same command goes on.

Each chain of runs has one `log_path`; a run is hit once, at any moment between its start and its end, then started
again. A chain that comes through is compared with a run that nobody hit.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from proofs import FULL, Record
from running import MODEL, RunningServer, running

from firebox.trainer.checkpoint import read_checkpoint, read_checkpoint_tensors

pytestmark = [
    pytest.mark.prove,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(not FULL, reason="takes minutes; runs under FIREBOX_PROVE=1"),
]
KILLS = 20
SFT_STEPS, RL_STEPS, BATCH, INTERVAL = 36, 12, 4, 3
Kill = Callable[[RunningServer, "subprocess.Popen[bytes]"], bool]
"""Says whether there was anything to kill."""
RUN_WITHIN_S = 300
RESUMED = re.compile(r"resumed at step (\d+), row (\d+), from")
SHAPE = "accounts/local/trainingShapes/tiny-cpu"


@dataclass
class Chain:
    """Runs of one command with one `log_path`, one after the other."""

    server: RunningServer
    folder: Path
    recipe: list[str]

    @contextlib.contextmanager
    def run(self) -> Iterator[subprocess.Popen[bytes]]:
        """One run, which does not outlive the block."""
        command = [sys.executable, "-m", *self.recipe, "--log-path", str(self.folder / "run")]
        env = os.environ | self.server.env | {"PYTHONPATH": str(self.folder.parent)}
        self.folder.mkdir(exist_ok=True)
        with (self.folder / "said.txt").open("wb") as said:
            run = subprocess.Popen(command, env=env, stdout=said, stderr=said)
            try:
                yield run
            finally:
                run.kill()
                run.wait()

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def confirmed(self) -> int:
        """The last step whose state is known to be saved."""
        file = self.folder / "run" / "checkpoints.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return max((row["step"] for row in rows if row["state_path"]), default=0)

    def check_resume(self, confirmed: int, rows_per_step: int) -> None:
        """If the last run came to take a step, it went on at or behind the last known state, with the row of that."""
        found = RESUMED.search(self.said)
        if not (found or "step " in self.said):
            return
        step, row = map(int, found.groups()) if found else (0, 0)
        assert step >= confirmed, self.said
        assert step % INTERVAL == 0
        assert row == step * rows_per_step

    def metrics(self) -> list[dict[str, float]]:
        """What each step measured, times apart."""
        lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [{k: v for k, v in row.items() if not k.startswith(("time", "perf"))} for row in rows]

    def final_state(self) -> dict[str, np.ndarray]:
        """Weights and optimizer state of the last checkpoint; torch's generator is a job's own, and nothing draws."""
        last = json.loads((self.folder / "run" / "checkpoints.jsonl").read_text().splitlines()[-1])
        _, _, job, name = last["state_path"].split("/")
        directory = self.server.data / "jobs" / "local" / job / "checkpoints" / name
        manifest = read_checkpoint(directory)
        assert manifest is not None
        tensors = read_checkpoint_tensors(directory, manifest)
        return {name: value.numpy() for name, value in tensors.items() if name != "rng"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RunningServer]:
    """A server that comes back on the address it had."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with running(tmp_path, "--port", str(port)) as up:
        yield up


def kill_recipe(server: RunningServer, run: subprocess.Popen[bytes]) -> bool:
    run.kill()
    return True


def kill_trainer(server: RunningServer, run: subprocess.Popen[bytes]) -> bool:
    return kill_worker(server, run, '"job"')


def kill_sampler(server: RunningServer, run: subprocess.Popen[bytes]) -> bool:
    return kill_worker(server, run, '"deployment"')


def kill_worker(server: RunningServer, run: subprocess.Popen[bytes], kind: str) -> bool:
    """As soon as there is one; what it serves stands in the file that it was started with."""
    while run.poll() is None:
        for spec in (server.data / "run").glob("*.json"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it may end just now
                if kind in spec.read_text():
                    os.kill(json.loads(spec.with_suffix(".pid").read_text())["pid"], signal.SIGKILL)
                    return True
        time.sleep(0.05)  # files of others give no event to wait for
    return False


def kill_server(server: RunningServer, run: subprocess.Popen[bytes]) -> bool:
    server.end(signal.SIGKILL)
    server.start()
    return True


@dataclass
class Tally:
    """What the hits of one victim came to."""

    hits: int = 0
    survived: int = 0
    resumed: int = 0
    chains: int = 0


def hit_often(new_chain: Callable[[], Chain], kill: Kill, rows_per_step: int, done: Callable[[Chain], None]) -> Tally:
    """`KILLS` hits, and chains that come through in the end, each of which goes to `done`."""
    rng, tally = random.Random(0), Tally()
    usual_s, chain = 0.0, new_chain()
    while True:
        confirmed, started, hit = chain.confirmed(), time.monotonic(), False
        with chain.run() as run:
            if tally.hits < KILLS and usual_s:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(rng.uniform(0, usual_s))
                hit = run.poll() is None and kill(chain.server, run)
            through = run.wait(RUN_WITHIN_S) == 0
        chain.check_resume(confirmed, rows_per_step)
        tally.hits += hit
        tally.survived += hit and through
        tally.resumed += "resumed at" in chain.said
        if through:
            done(chain)
            tally.chains += 1
            if tally.hits == KILLS:
                return tally
            if not confirmed and not hit:
                usual_s = time.monotonic() - started
            chain = new_chain()


@pytest.mark.parametrize("kill", [kill_recipe, kill_trainer, kill_server])
def test_sft_ends_with_the_same_bits(server: RunningServer, tmp_path: Path, kill: Kill, record: Record) -> None:
    """Losses, weights and optimizer state are those of the run that nobody hit, which is the first of the chains."""
    chats = [{"prompt": f"{n}?", "completion": f"{n * 7}"} for n in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    recipe = [
        "training.recipes.sft_loop", "--base-model", MODEL, "--tokenizer-model", str(server.data / "models/local/tiny"),
        "--dataset", str(tmp_path / "rows.jsonl"), "--batch-size", str(BATCH), "--max-steps", str(SFT_STEPS),
        "--infra.training-shape-id", SHAPE, "--weight-sync.dcp-save-interval", str(INTERVAL),
    ]  # fmt: skip
    chains: list[Chain] = []

    def new_chain() -> Chain:
        chains.append(Chain(server, tmp_path / f"chain-{len(chains)}", recipe))
        return chains[-1]

    def done(chain: Chain) -> None:
        assert chain.metrics() == chains[0].metrics()
        assert [row["step"] for row in chain.metrics()] == list(range(1, SFT_STEPS + 1))
        whole, state = chains[0].final_state(), chain.final_state()
        assert state.keys() == whole.keys()
        assert [name for name in whole if state[name].tobytes() != whole[name].tobytes()] == []

    tell(record, hit_often(new_chain, kill, BATCH, done))


def test_rl_takes_every_step_once(server: RunningServer, tmp_path: Path, record: Record) -> None:
    """A sampler that is killed has a successor, or the run stops and goes on; no step is missing or taken twice."""
    (tmp_path / "rewards.py").write_text("def reward(completion, row):\n    return len(completion) / 100\n")
    prompts = [{"prompt": f"{n}?"} for n in range(50)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    recipe = [
        "training.recipes.rl_loop", "--base-model", MODEL, "--reward", "rewards:reward",
        "--deployment.tokenizer-model", str(server.data / "models/local/tiny"),
        "--dataset", str(tmp_path / "rows.jsonl"), "--max-steps", str(RL_STEPS),
        "--rollout.prompts-per-step", str(BATCH), "--rollout.group-size", "2", "--rollout.max-tokens", "8",
        "--infra.training-shape-id", SHAPE, "--weight-sync.dcp-save-interval", str(INTERVAL),
        "--weight-sync.weight-sync-timeout", "60", "--deployment.sample-timeout", "60",
    ]  # fmt: skip
    numbers = iter(range(1000))

    def done(chain: Chain) -> None:
        assert [row["step"] for row in chain.metrics()] == list(range(1, RL_STEPS + 1))
        assert chain.confirmed() == RL_STEPS

    chain = lambda: Chain(server, tmp_path / f"chain-{next(numbers)}", recipe)  # noqa: E731
    tell(record, hit_often(chain, kill_sampler, BATCH, done))


def tell(record: Record, tally: Tally) -> None:
    record("kills", tally.hits)
    record("runs that came through although they were hit", tally.survived)
    record("runs that resumed", tally.resumed)
    record("chains that came through, one of them never hit", tally.chains)
    assert tally.chains > 1
