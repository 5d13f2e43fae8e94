r"""Direct preference optimization: prefer the better of two answers, without a reward model.

    python -m training.recipes.dpo_loop --base-model accounts/local/models/tiny --tokenizer-model ./tiny \
        --dataset preferences.jsonl --infra.training-shape-id accounts/local/trainingShapes/tiny-cpu

The loss is the mean over the pairs, so the server must not divide again. It compares the policy with a frozen
reference, which is asked once, before the first step: the base model, on a trainer of its own
(infra.ref_training_shape_id) or beneath a LoRA run's adapter; without either, the weights that the run begins with.
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
    Normalization,
    OptimConfig,
    Positive,
    PositiveFloat,
    RunConfig,
    RunOptions,
    WandBConfig,
    WeightSyncConfig,
    check_output_model_id,
    validate,
)
from training.utils.errors import ConfigError
from training.utils.metrics import Curves, RunLog, Timer
from training.utils.pairs import RenderedPair, answer_logprobs, load_pairs, pair_datums, score
from training.utils.provision import Workspace, context_limit
from training.utils.reference_logprobs import Reference, ask, recall, who_is_reference
from training.utils.render import load_tokenizer
from training.utils.schedule import adam_params
from training.utils.steps import Plan, Step

if TYPE_CHECKING:
    from torch import Tensor

LIVE = {"loss": "train/loss", "accuracy": "train/accuracy", "eval": "eval/accuracy", "tok/s": "perf/tokens_per_s"}
CURVES = [
    Curves("loss", ["train/loss", "eval/loss"]),
    Curves("share of pairs whose chosen answer is ahead", ["train/accuracy", "eval/accuracy"]),
    Curves("implicit reward", ["train/margin", "train/chosen_reward", "train/rejected_reward", "eval/margin"]),
]

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass
class DpoConfig(Checked):
    """The loss."""

    beta: PositiveFloat = 0.1  # how dearly leaving the reference is paid for
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = 0.0  # share of the pairs that are taken to be wrong


@dataclass
class Config(Checked):
    """Settings of one run. To resume one, set `weight_sync.dcp_save_interval` and keep `log_path`."""

    base_model: str  # the model to train, accounts/<account>/models/<id>
    tokenizer_model: str  # Hugging Face name or local directory
    dataset: str  # JSONL, a folder of Hugging Face datasets, or hf://<owner>/<name>[:<split>]
    log_path: str = "runs/dpo"  # metrics, checkpoints and curves; the same folder again resumes
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
    loss: DpoConfig = field(default_factory=DpoConfig)
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
    reference: Reference
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
        metrics = {f"train/{name}": output.metrics[name] for name in preference.DPO_METRICS}
        metrics |= {"optim/lr": adam.learning_rate} | timer.seconds | {"time/step_s": timer.total}
        metrics["perf/tokens_per_s"] = sum(pair.num_tokens for pair in pairs) / timer.total
        return metrics | ({"optim/grad_norm": optim["grad_norm"]} if "grad_norm" in optim else {})

    def loss(self, pairs: Sequence[RenderedPair], _: Sequence[Any], logprobs: Sequence[Tensor]) -> preference.Loss:
        """The loss of these pairs and its metrics, from the log-probs [T-1] of their datums."""
        settings, (ref_chosen, ref_rejected) = self.config.loss, self.reference.of(pairs)
        chosen, rejected = answer_logprobs(logprobs, pairs)
        beta, smoothing = settings.beta, settings.label_smoothing
        return preference.dpo(chosen, rejected, ref_chosen, ref_rejected, beta=beta, label_smoothing=smoothing)

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
        if config.infra.ref_training_shape_id:
            workspace.resolve(config.infra.ref_training_shape_id)  # a shape that is not there costs no trainer
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

        # --- reference ---
        everything, who = [*train, *held_out], who_is_reference(config.base_model, config.lora_rank, config.infra)
        folder = log.folder / "reference"
        reference = recall(folder, who, everything) if start > 0 else None
        if reference is None:
            log.note(f"asking the reference, {who}, about {len(everything)} pairs")
            with Workspace(folder) as apart:  # a trainer that is only the reference is gone once it has answered
                frozen = apart.reference(config.base_model, config.infra, client, config.lora_rank) or client
                reference = ask(frozen.forward, who, everything, config.batch_size)
            reference.save(folder)

        log.begin(start, plan.total_steps, job_id=client.job_id)

        consumed = Run(config, client, saver, log, train, held_out, reference, plan).loop(on_step)

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
