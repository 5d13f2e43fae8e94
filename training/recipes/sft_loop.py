r"""Supervised fine-tuning: imitate the assistant's messages of a JSONL file.

    python -m training.recipes.sft_loop --base-model accounts/local/models/tiny --tokenizer-model ./tiny \
        --dataset chats.jsonl --infra.training-shape-id accounts/local/trainingShapes/tiny-cpu

The loss is the mean negative log-likelihood in nats per trained token. It is normalized here, by the weights, so the
server must not do so again. Two steps are in flight: the next one is sent before the last one is awaited.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from annotated_types import Ge, Lt

from training.utils import cli, data, losses
from training.utils.checkpoints import Checkpointer, CheckpointLog
from training.utils.client import ReconnectableClient
from training.utils.config import (
    Checked,
    Count,
    InfraConfig,
    Normalization,
    OptimConfig,
    Positive,
    WandBConfig,
    WeightSyncConfig,
    check_output_model_id,
    validate,
)
from training.utils.datums import build_datum
from training.utils.errors import ConfigError, DataError
from training.utils.metrics import Curves, RunLog
from training.utils.provision import Workspace, context_limit
from training.utils.render import Rendered, load_tokenizer, render_chat
from training.utils.schedule import adam_params

LIVE = {"loss": "train/loss", "eval": "eval/loss", "tok/s": "perf/tokens_per_s"}
CURVES = [
    Curves("nats per token", ["train/loss", "eval/loss", "eval/unigram_loss"]),
    Curves("gradient norm", ["optim/grad_norm"]),
]
STEPS_IN_FLIGHT = 2

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass
class Config(Checked):
    """Settings of one run. To resume one, set `weight_sync.dcp_save_interval` and keep `log_path`."""

    base_model: str  # the model to train, accounts/<account>/models/<id>
    tokenizer_model: str  # Hugging Face name or local directory
    dataset: str  # JSONL of {"messages": [...]} or {"prompt", "completion"}
    log_path: str = "runs/sft"  # metrics, checkpoints and curves; the same folder again resumes
    output_model_id: str | None = None  # promote the result under this id
    init_from: str | None = None  # start from these weights, cross_job://<job>/<name>
    lora_rank: Count = 0  # 0 trains all parameters
    max_seq_len: Positive | None = None  # longer rows are left out; unset: what the shape holds
    batch_size: Positive = 8  # rows per step
    epochs: Positive = 1  # passes over the training rows
    max_steps: Positive | None = None  # overrides epochs
    max_rows: Positive | None = None  # use only the first rows of the file
    eval_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of the rows that is held out
    eval_every: Count = 0  # evaluate every so many steps; always before the first and after the last
    seed: int = 0  # fixes the split, the order and every draw
    grad_accumulation_normalization: Normalization | None = None  # what the server divides the gradient by
    optim: OptimConfig = field(default_factory=OptimConfig)
    infra: InfraConfig = field(default_factory=InfraConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    wandb: WandBConfig = field(default_factory=WandBConfig)

    def check_together(self) -> None:
        check_output_model_id(self.output_model_id)
        if self.weight_sync.weight_sync_before_training:
            fix = "leave it off: this recipe has no deployment, only the dcp_* settings matter to it"
            raise ConfigError("Config.weight_sync.weight_sync_before_training", True, fix)


# --- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Rendered rows that are trained on or evaluated together."""

    rows: list[Rendered]

    @property
    def num_trained(self) -> int:
        return sum(row.num_trained for row in self.rows)

    @property
    def num_tokens(self) -> int:
        return sum(len(row.tokens) for row in self.rows)

    def datums(self) -> list[Any]:
        """Datums whose summed loss is the batch's mean nats per trained token."""
        total = self.num_trained
        return [build_datum(row.tokens, weights=losses.mean_weights(row.weights, total)) for row in self.rows]


def load_batches(config: Config, tokenizer: Any, limit: int, note: Callable[[str], None]) -> tuple[Batch, Batch]:
    """(training rows, held-out rows), rendered. Rows longer than `limit` tokens are left out, and counted aloud."""
    rows = data.load_chats(config.dataset)[: config.max_rows]
    train, held_out = (
        Batch([render_chat(tokenizer, row) for row in side])
        for side in data.split(rows, config.eval_fraction, config.seed)
    )
    for name, side in (("training", train), ("held-out", held_out)):
        too_long = [row for row in side.rows if len(row.tokens) > limit]
        if too_long:
            note(f"left out {len(too_long)} of {len(side.rows)} {name} rows: longer than {limit} tokens")
            side.rows[:] = [row for row in side.rows if len(row.tokens) <= limit]
            if not side.rows:
                raise DataError(f"{config.dataset}: no {name} row fits {limit} tokens; use a shape that holds more")
    trained = f"{train.num_trained} of their {train.num_tokens} tokens"
    note(f"training on {len(train.rows)} rows, {trained}; {len(held_out.rows)} rows held out")
    return train, held_out


# --- loop -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InFlight:
    """A step that was sent and not yet awaited. `consumed` counts the rows of the data stream up to its end."""

    step: int
    consumed: int
    num_tokens: int
    learning_rate: float
    forward_backward: Any
    optim_step: Any

    def wait(self, timeout: float) -> dict[str, float]:
        """The step's metrics, once the trainer has taken it."""
        loss = self.forward_backward.result(timeout=timeout).metrics["loss:sum"]
        optim = self.optim_step.result(timeout=timeout).metrics or {}
        metrics = {"train/loss": loss, "optim/lr": self.learning_rate}
        return metrics | ({"optim/grad_norm": optim["grad_norm"]} if "grad_norm" in optim else {})


@dataclass(frozen=True)
class Run:
    """The parts of one run that the loop works with."""

    config: Config
    client: ReconnectableClient
    saver: Checkpointer
    log: RunLog
    train: Batch
    held_out: Batch
    total_steps: int
    vocab_size: int

    def loop(self, start: int, consumed: int, on_step: Callable[[dict[str, Any]], None]) -> int:
        """All steps behind `start`. Returns the number of rows consumed."""
        if start == 0 and self.evaluates(0):
            on_step(self.log.log(0, self.evaluate()))
        in_flight: deque[InFlight] = deque()
        last = time.monotonic()
        for step in range(start + 1, self.total_steps + 1):
            in_flight.append(self.send(step, consumed))
            consumed = in_flight[-1].consumed
            # A state or a held-out loss belongs behind exactly this step: nothing later may be on its way.
            drain = self.saver.due(step) or self.evaluates(step) or step == self.total_steps
            while in_flight and (drain or len(in_flight) >= STEPS_IN_FLIGHT):
                done = in_flight.popleft()
                metrics = done.wait(self.client.default_timeout)
                seconds = time.monotonic() - last
                metrics |= {"perf/tokens_per_s": done.num_tokens / seconds, "time/step_s": seconds}
                if self.evaluates(done.step):
                    metrics |= self.evaluate()
                on_step(self.log.log(done.step, metrics))
                if self.saver.due(done.step):
                    self.saver.save(done.step, done.consumed)
                last = time.monotonic()
        return consumed

    def send(self, step: int, consumed: int) -> InFlight:
        """Submit the passes and the optimizer step of one batch without waiting for either."""
        config, num_rows = self.config, len(self.train.rows)
        left = config.batch_size if config.max_steps else num_rows * config.epochs - consumed
        size = min(config.batch_size, left)
        batch = Batch([self.train.rows[i] for i in data.batch_at(num_rows, consumed, size, config.seed)])
        adam = adam_params(config.optim, step, self.total_steps)
        forward_backward = self.client.inner.forward_backward(batch.datums(), "cross_entropy")
        optim_step = self.client.inner.optim_step(
            adam, grad_accumulation_normalization=config.grad_accumulation_normalization
        )
        return InFlight(step, consumed + size, batch.num_tokens, adam.learning_rate, forward_backward, optim_step)

    def evaluates(self, step: int) -> bool:
        """Whether the held-out loss is due behind this many steps."""
        every = self.config.eval_every
        return bool(self.held_out.rows) and (step in (0, self.total_steps) or (every > 0 and step % every == 0))

    def evaluate(self) -> dict[str, float]:
        """Held-out nats per token, beside what counting tokens achieves."""
        loss, size = 0.0, self.config.batch_size
        for start in range(0, len(self.held_out.rows), size):
            batch = Batch(self.held_out.rows[start : start + size])
            mean = self.client.forward(batch.datums(), "cross_entropy").metrics["loss:sum"]
            loss += mean * batch.num_trained / self.held_out.num_trained
        train, held_out = ([t for row in side.rows for t in row.trained_tokens] for side in (self.train, self.held_out))
        return {"eval/loss": loss, "eval/unigram_loss": losses.unigram_loss(train, held_out, self.vocab_size)}


def main(config: Config, on_step: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Run the recipe; `on_step` sees every row of metrics. Returns job, checkpoints, final metrics, output model."""
    validate(config)
    shape_id = str(config.infra.training_shape_id)
    with (
        RunLog(config.log_path, live=LIVE, curves=CURVES, wandb=config.wandb, config=asdict(config)) as log,
        Workspace() as workspace,
    ):
        if config.grad_accumulation_normalization not in (None, "none"):
            log.note("grad_accumulation_normalization divides once more: this loss is a mean per token already")
        records = CheckpointLog(config.log_path)
        resume_from = records.to_resume(config.base_model, shape_id, config.weight_sync)
        profile = workspace.resolve(shape_id)
        tokenizer = load_tokenizer(config.tokenizer_model)
        train, held_out = load_batches(config, tokenizer, context_limit(profile, config.max_seq_len), log.note)

        # --- provision ---
        client = workspace.trainer(
            config.base_model,
            profile,
            config.infra,
            lora_rank=config.lora_rank,
            learning_rate=config.optim.learning_rate,
        )
        saver = Checkpointer(client, records, config.base_model, shape_id, config.weight_sync)
        start, consumed = saver.start(resume_from, config.init_from, log.note)
        total_steps = config.max_steps or math.ceil(len(train.rows) * config.epochs / config.batch_size)
        log.begin(start, total_steps)

        run = Run(config, client, saver, log, train, held_out, total_steps, len(tokenizer))
        consumed = run.loop(start, consumed, on_step)

        # --- final checkpoint ---
        saver.finish(total_steps, consumed)
        output_model = None
        if config.output_model_id:
            snapshot = saver.save_promotable(total_steps, consumed)
            output_model = workspace.promote(client.job_id, snapshot, config.output_model_id, config.base_model)
        return log.result(
            job_id=client.job_id, deployment_id=None, checkpoints=records.names(), output_model=output_model
        )


if __name__ == "__main__":
    cli.run(Config, main)
