r"""Odds ratio preference optimization: imitate the better of two answers and keep its odds above the worse one's.

    python -m training.recipes.orpo_loop --base-model accounts/local/models/tiny --tokenizer-model ./tiny \
        --dataset preferences.jsonl --infra.training-shape-id accounts/local/trainingShapes/tiny-cpu

The loss is nats per token of the chosen answers plus a mean over the pairs, so the server must not divide again. There
is no reference and no stage of SFT before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Lt

from training.utils import cli, dry_run, preference
from training.utils.checkpoints import Checkpointer, CheckpointLog
from training.utils.client import ReconnectableClient
from training.utils.config import (
    Checked,
    Count,
    InfraConfig,
    NonNegative,
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
from training.utils.errors import ConfigError
from training.utils.metrics import Curves, RunLog, Timer
from training.utils.pairs import RenderedPair, answer_lengths, answer_logprobs, load_pairs, pair_datums, score
from training.utils.provision import Workspace, context_limit
from training.utils.render import load_tokenizer
from training.utils.schedule import adam_params
from training.utils.steps import Plan, Step

if TYPE_CHECKING:
    from torch import Tensor

LIVE = {"loss": "train/loss", "accuracy": "train/accuracy", "eval": "eval/accuracy", "tok/s": "perf/tokens_per_s"}
CURVES = [
    Curves("loss", ["train/loss", "train/nll", "eval/loss", "eval/nll"]),
    Curves("share of pairs whose chosen answer is ahead", ["train/accuracy", "eval/accuracy"]),
    Curves("log of the odds ratio", ["train/margin", "eval/margin"]),
]

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass
class OrpoConfig(Checked):
    """The loss."""

    odds_ratio_weight: NonNegative = 0.1  # of the odds ratio, beside imitation


@dataclass
class Config(Checked):
    """Settings of one run. To resume one, set `weight_sync.dcp_save_interval` and keep `log_path`."""

    base_model: str  # the model to train, accounts/<account>/models/<id>
    tokenizer_model: str  # Hugging Face name or local directory
    dataset: str  # JSONL, a folder of Hugging Face datasets, or hf://<owner>/<name>[:<split>]
    log_path: str = "runs/orpo"  # metrics, checkpoints and curves; the same folder again resumes
    output_model_id: str | None = None  # promote the result under this id
    lora_rank: Count = 0  # 0 trains all parameters
    max_seq_len: Positive | None = None  # longer answers are cut; unset: what the shape holds
    batch_size: Positive = 8  # pairs per step
    epochs: Positive = 1  # passes over the training pairs
    max_steps: Positive | None = None  # overrides epochs
    eval_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of the pairs that is held out
    eval_every: Count = 0  # evaluate every so many steps; always before the first and after the last
    seed: int = 0  # fixes the split, the order and every draw
    grad_accumulation_normalization: Normalization | None = None  # what the server divides the gradient by
    loss: OrpoConfig = field(default_factory=OrpoConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-5))
    infra: InfraConfig = field(default_factory=InfraConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    wandb: WandBConfig = field(default_factory=WandBConfig)
    run: RunOptions = field(default_factory=RunConfig)

    def check_together(self) -> None:
        check_output_model_id(self.output_model_id)
        if self.weight_sync.weight_sync_before_training:
            fix = "leave it off: this recipe has no deployment, only the dcp_* settings matter to it"
            raise ConfigError("Config.weight_sync.weight_sync_before_training", True, fix)


# --- loop -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The parts of one run that the loop works with."""

    config: Config
    client: ReconnectableClient
    saver: Checkpointer
    log: RunLog
    train: list[RenderedPair]
    held_out: list[RenderedPair]
    plan: Plan

    def loop(self, on_step: Callable[[dict[str, Any]], None]) -> int:
        """All steps of the plan. Returns the number of pairs consumed."""
        if self.plan.start == 0 and self.evaluates(0):
            on_step(self.log.log(0, self.evaluate()))
        consumed = self.plan.consumed
        for step in self.plan.steps():
            consumed = step.consumed
            metrics = self.train_step(step)
            if self.evaluates(step.number):
                metrics |= self.evaluate()
            on_step(self.log.log(step.number, metrics))
            if self.saver.due(step.number):
                self.saver.save(step.number, consumed)
        return consumed

    def train_step(self, step: Step) -> dict[str, float]:
        """One gradient step. The loss runs here; the trainer gets its derivative by each log-prob."""
        pairs, timer = [self.train[i] for i in step.rows], Timer()
        adam = adam_params(self.config.optim, step.number, self.plan.total_steps)
        with timer("forward_backward"):
            output = self.client.forward_backward_custom(pair_datums(pairs), partial(self.loss, pairs))
        with timer("optim"):
            optim = self.client.optim_step(adam, self.config.grad_accumulation_normalization).metrics or {}
        metrics = {f"train/{name}": output.metrics[name] for name in preference.ORPO_METRICS}
        metrics |= {"optim/lr": adam.learning_rate} | timer.seconds | {"time/step_s": timer.total}
        metrics["perf/tokens_per_s"] = sum(pair.num_tokens for pair in pairs) / timer.total
        return metrics | ({"optim/grad_norm": optim["grad_norm"]} if "grad_norm" in optim else {})

    def loss(self, pairs: Sequence[RenderedPair], _: Sequence[Any], logprobs: Sequence[Tensor]) -> preference.Loss:
        """The loss of these pairs and its metrics, from the log-probs [T-1] of their datums."""
        chosen, rejected = answer_logprobs(logprobs, pairs)
        weight = self.config.loss.odds_ratio_weight
        return preference.orpo(chosen, rejected, *answer_lengths(pairs), weight=weight)

    def evaluates(self, step: int) -> bool:
        """Whether the held-out loss is due behind this many steps."""
        every = self.config.eval_every
        return bool(self.held_out) and (step in (0, self.plan.total_steps) or (every > 0 and step % every == 0))

    def evaluate(self) -> dict[str, float]:
        """The loss of all held-out pairs and its metrics."""
        logprobs = score(self.client.forward, self.held_out, self.config.batch_size)
        _, metrics = self.loss(self.held_out, [], logprobs)
        return {f"eval/{name}": value for name, value in metrics.items()}


def main(config: Config, on_step: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Run the recipe; `on_step` sees every row of metrics. Returns job, checkpoints, final metrics, output model."""
    validate(config)
    with RunLog(config, live=LIVE, curves=CURVES) as log, Workspace(config.log_path) as workspace:
        if config.grad_accumulation_normalization not in (None, "none"):
            log.note("grad_accumulation_normalization divides once more: this loss is a mean already")
        records = CheckpointLog(config.log_path)
        resume_from = records.to_resume(config, workspace.states)
        profile = workspace.resolve(str(config.infra.training_shape_id))
        tokenizer = load_tokenizer(config.tokenizer_model)
        limit, fraction = context_limit(profile, config.max_seq_len), config.eval_fraction
        train, held_out = load_pairs(
            config.dataset, tokenizer, limit, eval_fraction=fraction, seed=config.seed, note=log.note
        )
        plan = Plan(len(train), config.batch_size, config.epochs, config.max_steps, config.seed)
        if config.run.dry_run:
            tokens = sum(pair.num_tokens for pair in train) * config.batch_size * plan.total_steps // len(train)
            return dry_run.show(config, profile, {"pairs": len(train), "steps": plan.total_steps, "tokens": tokens})

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

        consumed = Run(config, client, saver, log, train, held_out, plan).loop(on_step)

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
