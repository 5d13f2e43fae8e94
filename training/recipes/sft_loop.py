r"""Supervised fine-tuning: imitate the assistant's messages of a JSONL file.

    python -m training.recipes.sft_loop --base-model accounts/local/models/tiny --tokenizer-model ./tiny \
        --dataset chats.jsonl --infra.training-shape-id accounts/local/trainingShapes/tiny-cpu

The loss is the mean negative log-likelihood in nats per trained token. It is normalized here, by the weights, so the
server must not do so again. Two steps are in flight: the next one is sent before the last one is awaited.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from annotated_types import Ge, Lt

from training.utils import cli, data, dry_run, losses
from training.utils.checkpoints import Checkpointer, CheckpointLog
from training.utils.client import ReconnectableClient
from training.utils.config import (
    Checked,
    Count,
    InfraConfig,
    Normalization,
    OptimConfig,
    Positive,
    RunConfig,
    RunOptions,
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
from training.utils.steps import Plan, Sent, Step, pipelined

LIVE = {"loss": "train/loss", "eval": "eval/loss", "tok/s": "perf/tokens_per_s"}
CURVES = [
    Curves("nats per token", ["train/loss", "eval/loss", "eval/unigram_loss"]),
    Curves("gradient norm", ["optim/grad_norm"]),
]

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass
class Config(Checked):
    """Settings of one run. To resume one, set `weight_sync.dcp_save_interval` and keep `log_path`."""

    base_model: str  # the model to train, accounts/<account>/models/<id>
    tokenizer_model: str  # Hugging Face name or local directory
    dataset: str  # JSONL, a folder of Hugging Face datasets, or hf://<owner>/<name>[:<split>]
    log_path: str = "runs/sft"  # metrics, checkpoints and curves; the same folder again resumes
    output_model_id: str | None = None  # promote the result under this id
    lora_rank: Count = 0  # 0 trains all parameters
    max_seq_len: Positive | None = None  # longer rows are left out; unset: what the shape holds
    batch_size: Positive = 8  # rows per step
    epochs: Positive = 1  # passes over the training rows
    max_steps: Positive | None = None  # overrides epochs
    eval_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of the rows that is held out
    eval_every: Count = 0  # evaluate every so many steps; always before the first and after the last
    seed: int = 0  # fixes the split, the order and every draw
    grad_accumulation_normalization: Normalization | None = None  # what the server divides the gradient by
    optim: OptimConfig = field(default_factory=OptimConfig)
    infra: InfraConfig = field(default_factory=InfraConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    wandb: WandBConfig = field(default_factory=WandBConfig)
    run: RunOptions = field(default_factory=RunConfig)

    def check_together(self) -> None:
        check_output_model_id(self.output_model_id)
        if self.weight_sync.weight_sync_before_training:
            fix = "leave it off: this recipe has no deployment, only the dcp_* settings matter to it"
            raise ConfigError("Config.weight_sync.weight_sync_before_training", True, fix)


# --- data -----------------------------------------------------------------------------------------------------------


def load_rows(
    config: Config, tokenizer: Any, limit: int, note: Callable[[str], None]
) -> tuple[list[Rendered], list[Rendered]]:
    """(training rows, held-out rows), rendered. Rows longer than `limit` tokens are left out, and counted aloud."""
    chats = data.load_chats(config.dataset)
    note(data.describe(chats, config.dataset))
    sides = []
    for name, side in zip(("training", "held-out"), data.split(chats, config.eval_fraction, config.seed), strict=True):
        rendered = [one for chat in side for one in render_chat(tokenizer, chat)]
        fitting = [row for row in rendered if len(row.tokens) <= limit]
        if len(fitting) < len(rendered):
            note(f"left out {len(rendered) - len(fitting)} of {len(rendered)} {name} rows: longer than {limit} tokens")
        if rendered and not fitting:
            raise DataError(f"{config.dataset}: no {name} row fits {limit} tokens; use a shape that holds more")
        sides.append(fitting)
    train, held_out = sides
    trained = f"{num_trained(train)} of their {num_tokens(train)} tokens"
    note(f"training on {len(train)} rows, {trained}; {len(held_out)} rows held out")
    return train, held_out


def num_trained(rows: Sequence[Rendered]) -> int:
    return sum(row.num_trained for row in rows)


def num_tokens(rows: Sequence[Rendered]) -> int:
    return sum(len(row.tokens) for row in rows)


def mean_loss_datums(rows: Sequence[Rendered]) -> list[Any]:
    """Datums whose summed loss is the mean nats per trained token of all of them."""
    total = num_trained(rows)
    return [build_datum(row.tokens, weights=losses.mean_weights(row.weights, total)) for row in rows]


# --- loop -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The parts of one run that the loop works with."""

    config: Config
    client: ReconnectableClient
    saver: Checkpointer
    log: RunLog
    train: list[Rendered]
    held_out: list[Rendered]
    plan: Plan
    vocab_size: int

    def loop(self, on_step: Callable[[dict[str, Any]], None]) -> int:
        """All steps of the plan. Returns the number of rows consumed."""
        if self.plan.start == 0 and self.evaluates(0):
            on_step(self.log.log(0, self.evaluate()))
        consumed = self.plan.consumed
        for step, metrics in pipelined(self.plan.steps(), self.send, self.stops, self.client.default_timeout):
            consumed = step.consumed
            if self.evaluates(step.number):
                metrics |= self.evaluate()
            on_step(self.log.log(step.number, metrics))
            if self.saver.due(step.number):
                self.saver.save(step.number, consumed)
        return consumed

    def send(self, step: Step) -> Sent:
        """Submit the passes and the optimizer step of one batch without waiting for either."""
        rows = [self.train[i] for i in step.rows]
        adam = adam_params(self.config.optim, step.number, self.plan.total_steps)
        forward_backward = self.client.inner.forward_backward(mean_loss_datums(rows), "cross_entropy")
        normalization = self.config.grad_accumulation_normalization
        optim_step = self.client.inner.optim_step(adam, grad_accumulation_normalization=normalization)
        return Sent(step, num_tokens(rows), adam.learning_rate, forward_backward, optim_step)

    def stops(self, step: int) -> bool:
        """Whether a state or a held-out loss belongs behind exactly this step."""
        return self.saver.due(step) or self.evaluates(step) or step == self.plan.total_steps

    def evaluates(self, step: int) -> bool:
        """Whether the held-out loss is due behind this many steps."""
        every = self.config.eval_every
        return bool(self.held_out) and (step in (0, self.plan.total_steps) or (every > 0 and step % every == 0))

    def evaluate(self) -> dict[str, float]:
        """Held-out nats per token, beside what counting tokens achieves."""
        loss, size = 0.0, self.config.batch_size
        for start in range(0, len(self.held_out), size):
            rows = self.held_out[start : start + size]
            mean = self.client.forward(mean_loss_datums(rows), "cross_entropy").metrics["loss:sum"]
            loss += mean * num_trained(rows) / num_trained(self.held_out)
        train, held_out = ([t for row in side for t in row.trained_tokens] for side in (self.train, self.held_out))
        return {"eval/loss": loss, "eval/unigram_loss": losses.unigram_loss(train, held_out, self.vocab_size)}


def main(config: Config, on_step: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Run the recipe; `on_step` sees every row of metrics. Returns job, checkpoints, final metrics, output model."""
    validate(config)
    with RunLog(config, live=LIVE, curves=CURVES) as log, Workspace(config.log_path) as workspace:
        if config.grad_accumulation_normalization not in (None, "none"):
            log.note("grad_accumulation_normalization divides once more: this loss is a mean per token already")
        records = CheckpointLog(config.log_path)
        resume_from = records.to_resume(config, workspace.states)
        profile = workspace.resolve(str(config.infra.training_shape_id))
        tokenizer = load_tokenizer(config.tokenizer_model)
        train, held_out = load_rows(config, tokenizer, context_limit(profile, config.max_seq_len), log.note)
        plan = Plan(len(train), config.batch_size, config.epochs, config.max_steps, config.seed)
        if config.run.dry_run:
            tokens = sum(len(row.tokens) for row in train) * config.batch_size * plan.total_steps // len(train)
            return dry_run.show(config, profile, {"rows": len(train), "steps": plan.total_steps, "tokens": tokens})

        # --- provision ---
        client = workspace.trainer(
            config.base_model,
            profile,
            config.infra,
            lora_rank=config.lora_rank,
            learning_rate=config.optim.learning_rate,
        )
        saver = Checkpointer(client, records, config, workspace.delete_state)
        start, consumed = saver.start(resume_from, log.note)
        plan = replace(plan, start=start, consumed=consumed)
        log.begin(start, plan.total_steps, job_id=client.job_id)

        consumed = Run(config, client, saver, log, train, held_out, plan, len(tokenizer)).loop(on_step)

        # --- final checkpoint ---
        saver.finish(plan.total_steps, consumed)
        output_model = None
        if config.output_model_id:
            snapshot = saver.save_promotable(plan.total_steps, consumed)
            output_model = workspace.promote(client.job_id, snapshot, config.output_model_id, config.base_model)
        return log.result(
            job_id=client.job_id, deployment_id=None, checkpoints=records.names(), output_model=output_model
        )


if __name__ == "__main__":
    cli.run(Config, main)
