"""The sampling thread with the genuine sampler client, against a deployment whose queue is as long as the test says."""

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fireworks.training.sdk import AdaptiveConcurrencyController, DeploymentSampler

from training.utils.data import Row
from training.utils.errors import DataError, PlatformError
from training.utils.render import load_tokenizer
from training.utils.rl.config import RolloutConfig
from training.utils.rl.rewards import Task
from training.utils.rl.rollout import Rollouts
from training.utils.rl.trajectory import Prompt

PROMPTS = [Prompt(Row([], {"wanted": number}, f"rows.jsonl:{number}"), [number, number]) for number in range(20, 24)]


class Deployment(BaseHTTPRequestHandler):
    """Answers every prompt with its first token and the request's seed; a stop token is never said."""

    queue_s = 0.0
    logprobs = True
    seeds: list[int]

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seeds.append(asked["seed"])
        tokens = [asked["prompt"][0], asked["seed"] % 100]
        rows = [{"token": "x", "token_id": token, "logprob": -0.5, "sampling_logprob": -0.5} for token in tokens]
        choice = {
            "index": 0,
            "text": "x",
            "finish_reason": "length",
            "logprobs": {"content": rows if self.logprobs else rows[:1]},
            "raw_output": {"completion_token_ids": tokens},
        }
        metrics = {"prefill-queue-duration": str(self.queue_s)}
        answer = f"data: {json.dumps({'choices': [choice], 'perf_metrics': metrics})}\n\ndata: [DONE]\n\n".encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: Any) -> None:
        """A client may leave in the middle of an answer."""


@pytest.fixture
def deployment() -> Iterator[type[Deployment]]:
    handler = type("Handler", (Deployment,), {"seeds": []})
    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        handler.url = f"http://127.0.0.1:{server.server_port}"  # type: ignore[attr-defined]
        yield handler
        server.shutdown()


def wanted(text: str, row: dict[str, Any]) -> float:
    return float(row["wanted"])


def rollouts(deployment: Any, tiny_dir: Path, reward: Any = wanted) -> Rollouts:
    tokenizer = load_tokenizer(str(tiny_dir))
    controller = AdaptiveConcurrencyController(initial_window=16)
    sampler = DeploymentSampler(deployment.url, "accounts/a/deployments/d", "key", tokenizer, controller)
    settings = RolloutConfig(group_size=2, max_tokens=2)
    return Rollouts(sampler, tokenizer, Task(reward, settings), settings, timeout=30, seed=0)


def test_answers_come_back_in_order_whichever_reward_is_slow(deployment: Any, tiny_dir: Path) -> None:
    def slow_first(text: str, row: dict[str, Any]) -> float:
        time.sleep(0.2 if row["wanted"] == 20 else 0)
        return wanted(text, row)

    with rollouts(deployment, tiny_dir, slow_first) as sampling:
        groups, _ = sampling.begin(PROMPTS, step=1).result(30)
    assert [[one.reward for one in group] for group in groups] == [[n, n] for n in (20.0, 21.0, 22.0, 23.0)]
    assert all(one.tokens[0] == group[0].prompt.tokens[0] for group in groups for one in group)


def test_every_rollout_has_a_draw_of_its_own_that_the_step_fixes(deployment: Any, tiny_dir: Path) -> None:
    with rollouts(deployment, tiny_dir) as sampling:
        for step in (1, 1, 2):
            sampling.begin(PROMPTS, step).result(30)
    first, again, second = (sorted(deployment.seeds[start : start + 8]) for start in (0, 8, 16))
    assert first == again
    assert len(set(first) | set(second)) == 16


@pytest.mark.parametrize(("queue_s", "expected"), [(3.0, 8), (0.0, 20)])
def test_requests_at_once_follow_the_queue_of_the_server(
    deployment: Any, tiny_dir: Path, queue_s: float, expected: int
) -> None:
    """A long queue halves the window, an empty one widens it by four at a time."""
    deployment.queue_s = queue_s
    with rollouts(deployment, tiny_dir) as sampling:
        metrics = sampling.begin(PROMPTS, step=1).result(30).metrics
    assert metrics == {"rollout/window": expected, "rollout/queue_s": queue_s}


def test_sampling_is_abandoned_at_the_end_of_a_run(deployment: Any, tiny_dir: Path) -> None:
    with rollouts(deployment, tiny_dir, lambda text, row: time.sleep(60)) as sampling:
        future = sampling.begin(PROMPTS, step=1)
        started = time.monotonic()
    assert time.monotonic() - started < 10
    assert future.cancelled()


def test_an_answer_without_its_log_probs_stops_the_run(deployment: Any, tiny_dir: Path) -> None:
    deployment.logprobs = False
    with rollouts(deployment, tiny_dir) as sampling, pytest.raises(PlatformError, match="1 log-probs for 2 sampled"):
        sampling.begin(PROMPTS, step=1).result(30)


def test_a_reward_that_is_no_number_stops_the_run_and_names_the_row(deployment: Any, tiny_dir: Path) -> None:
    with rollouts(deployment, tiny_dir, lambda text, row: "good") as sampling:
        future = sampling.begin(PROMPTS[:1], step=1)
        with pytest.raises(DataError, match=r"rows\.jsonl:20: the reward function returned 'good'"):
            future.result(30)
