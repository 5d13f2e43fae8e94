r"""Reinforcement learning with a verifiable reward: GRPO on sampled groups.

    python -m training.recipes.rl_loop --base-model accounts/local/models/tiny --deployment.tokenizer-model ./tiny \
        --dataset countdown.jsonl --reward training.examples.countdown:reward \
        --infra.training-shape-id accounts/local/trainingShapes/tiny-cpu

Each step samples `group_size` answers to `prompts_per_step` prompts from a deployment, scores them, takes one policy-
gradient step and hot-loads the new weights into the deployment. The server divides the summed loss by its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from annotated_types import Ge, Lt

from training.utils import cli, data, losses
from training.utils.checkpoints import Checkpointer, CheckpointLog
from training.utils.client import ReconnectableClient
from training.utils.config import (
    Checked,
    Count,
    DeployConfig,
    InfraConfig,
    NonNegative,
    Normalization,
    OptimConfig,
    Positive,
    RolloutConfig,
    WandBConfig,
    WeightSyncConfig,
    check_output_model_id,
    validate,
)
from training.utils.errors import ConfigError, DataError
from training.utils.metrics import Curves, RunLog, Timer
from training.utils.provision import Workspace
from training.utils.render import load_tokenizer, render_prompt
from training.utils.rl.rollout import (
    Prompt,
    RewardSpec,
    Rollout,
    Rollouts,
    answer_parts,
    compare,
    describe,
    load_reward,
    logprobs_of,
    save_rollouts,
)
from training.utils.schedule import adam_params

if TYPE_CHECKING:
    from fireworks.training.sdk import WeightSyncer

LIVE = {
    "reward": "rollout/reward",
    "eval": "eval/reward",
    "loss": "train/loss",
    "KL": "train/kl",
    "tok/s": "perf/tokens_per_s",
}
CURVES = [
    Curves("reward", ["rollout/reward", "eval/reward"]),
    Curves("loss", ["train/loss"]),
    Curves("KL and mismatch, nats", ["train/kl", "mismatch/abs_mean", "mismatch/k3"]),
]
GRPO_CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
SERVER_LOSS: dict[str, tuple[str, dict[str, float] | None]] = {
    "grpo": ("ppo", GRPO_CLIP),
    "importance_sampling": ("importance_sampling", None),
}

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass
class Config(Checked):
    """Settings of one run. To resume one, set `weight_sync.dcp_save_interval` and keep `log_path`."""

    base_model: str  # the model to train, accounts/<account>/models/<id>
    dataset: str  # JSONL of {"messages": [...]} or {"prompt"}, plus what the reward reads
    reward: RewardSpec  # (completion, row) -> float
    log_path: str = "runs/rl"  # metrics, checkpoints and curves; the same folder again resumes
    output_model_id: str | None = None  # promote the result under this id
    init_from: str | None = None  # start from these weights, cross_job://<job>/<name>
    lora_rank: Count = 0  # 0 trains all parameters
    policy_loss: Literal["grpo", "importance_sampling"] = "grpo"  # grpo clips the ratio
    kl_beta: NonNegative = 0.001  # penalty towards the base model, held by infra.ref_training_shape_id
    max_steps: Positive = 100  # optimizer steps
    eval_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of the rows that is held out
    eval_every: Count = 0  # evaluate every so many steps; always before the first and after the last
    seed: int = 0  # fixes the split, the order and every draw
    grad_accumulation_normalization: Normalization | None = "num_loss_tokens"  # what the server divides the gradient by
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-5))
    infra: InfraConfig = field(default_factory=InfraConfig)
    deployment: DeployConfig = field(default_factory=DeployConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    wandb: WandBConfig = field(default_factory=WandBConfig)

    def check_together(self) -> None:
        check_output_model_id(self.output_model_id)
        if not self.deployment.tokenizer_model:
            fix = "set a Hugging Face name or a directory: prompts are tokenized here"
            raise ConfigError("Config.deployment.tokenizer_model", self.deployment.tokenizer_model, fix)


# --- data -----------------------------------------------------------------------------------------------------------


class Prompts(NamedTuple):
    """Prompts to train on and prompts that are only evaluated."""

    train: list[Prompt]
    held_out: list[Prompt]


def load_prompts(config: Config, tokenizer: Any, limit: int, note: Callable[[str], None]) -> Prompts:
    """Tokenized prompts. Those that leave no room to answer are left out, and counted aloud."""
    sides = []
    for side in data.split(data.load_prompts(config.dataset), config.eval_fraction, config.seed):
        prompts = [Prompt(row, render_prompt(tokenizer, row)) for row in side]
        kept = [prompt for prompt in prompts if len(prompt.tokens) + config.rollout.max_tokens <= limit]
        if len(kept) < len(prompts):
            note(f"left out {len(prompts) - len(kept)} of {len(prompts)} prompts: rollout.max_tokens has no room")
        if prompts and not kept:
            raise DataError(f"{config.dataset}: no prompt fits; {limit} tokens must hold prompt and rollout.max_tokens")
        sides.append(kept)
    note(f"training on {len(sides[0])} prompts; {len(sides[1])} held out")
    return Prompts(*sides)


# --- loop -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The parts of one run that the loop works with."""

    config: Config
    client: ReconnectableClient
    reference: ReconnectableClient | None
    rollouts: Rollouts
    syncer: WeightSyncer
    saver: Checkpointer
    log: RunLog
    prompts: Prompts

    def loop(self, start: int, consumed: int, on_step: Callable[[dict[str, Any]], None]) -> int:
        """All steps behind `start`. Returns the number of prompts consumed."""
        config, train, interval = self.config, self.prompts.train, self.config.weight_sync.weight_sync_interval
        if start == 0 and self.evaluates(0):
            on_step(self.log.log(0, self.evaluate()))
        for step in range(start + 1, config.max_steps + 1):
            timer = Timer()
            indices = data.batch_at(len(train), consumed, config.rollout.prompts_per_step, config.seed)
            consumed += config.rollout.prompts_per_step
            with timer("rollout"):
                groups = self.rollouts.sample(
                    [train[i] for i in indices],
                    group_size=config.rollout.group_size,
                    temperature=config.rollout.temperature,
                    step=step,
                )
            advantages = [losses.group_advantages([rollout.reward for rollout in group]) for group in groups]
            save_rollouts(self.log.folder / "rollouts", step, groups, advantages)
            metrics = describe(groups, advantages) | self.train_step(step, groups, advantages, timer)
            if interval > 0 and step % interval == 0:
                with timer("weight_sync"):
                    self.syncer.save_and_hotload(f"step-{step}")
            metrics |= timer.seconds | {"time/step_s": timer.total}
            metrics["perf/tokens_per_s"] = metrics["rollout/tokens"] / timer.total
            if self.evaluates(step):
                metrics |= self.evaluate()
            on_step(self.log.log(step, metrics))
            if self.saver.due(step):
                self.saver.save(step, consumed)
        return consumed

    def train_step(
        self, step: int, groups: Sequence[Sequence[Rollout]], advantages: Sequence[losses.Array], timer: Timer
    ) -> dict[str, float]:
        """One gradient step on the groups that can teach something; without one, only the mismatch is measured."""
        config = self.config
        kept = [
            (rollout, float(value))
            for group, values in zip(groups, advantages, strict=True)
            for rollout, value in zip(group, values, strict=True)
            if values.any()
        ]
        if not kept:
            self.log.note(f"step {step}: every group earned equal rewards, so there is nothing to learn and no update")
            rollouts = [rollout for group in groups for rollout in group]
            return compare(rollouts, logprobs_of(self.client, rollouts))
        metrics: dict[str, float] = {}
        shaped: list[float | losses.Array] = [value for _, value in kept]
        if self.reference is not None:
            with timer("reference"):
                references = logprobs_of(self.reference, [rollout for rollout, _ in kept])
            pairs = [(rollout.logprobs, ref) for (rollout, _), ref in zip(kept, references, strict=True)]
            metrics["train/kl"] = float(np.concatenate([losses.k3(own, ref) for own, ref in pairs]).mean())
            shaped = [
                losses.kl_shaped(value, own, ref, config.kl_beta)
                for (_, value), (own, ref) in zip(kept, pairs, strict=True)
            ]
        loss_fn, loss_config = SERVER_LOSS[config.policy_loss]
        with timer("forward_backward"):
            datums = [rollout.datum(value) for (rollout, _), value in zip(kept, shaped, strict=True)]
            output = self.client.forward_backward(datums, loss_fn, loss_config)
        adam = adam_params(config.optim, step, config.max_steps)
        with timer("optim"):
            optim = self.client.optim_step(adam, config.grad_accumulation_normalization).metrics or {}
        rollouts = [rollout for rollout, _ in kept]
        num_tokens = sum(len(rollout.tokens) for rollout in rollouts)
        metrics |= {"train/loss": output.metrics["loss:sum"] / num_tokens, "optim/lr": adam.learning_rate}
        metrics |= compare(rollouts, answer_parts(rollouts, output))
        return metrics | ({"optim/grad_norm": optim["grad_norm"]} if "grad_norm" in optim else {})

    def evaluates(self, step: int) -> bool:
        """Whether the held-out reward is due behind this many steps."""
        every = self.config.eval_every
        return bool(self.prompts.held_out) and (step in (0, self.config.max_steps) or (every > 0 and step % every == 0))

    def evaluate(self) -> dict[str, float]:
        """Mean reward of greedy answers to the held-out prompts."""
        groups = self.rollouts.sample(self.prompts.held_out, group_size=1, temperature=0.0, step=0)
        return {"eval/reward": float(np.mean([rollout.reward for group in groups for rollout in group]))}


def main(config: Config, on_step: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Run the recipe; `on_step` sees every row of metrics. Returns job, checkpoints, final metrics, output model."""
    validate(config)
    reward, sync = load_reward(config.reward), config.weight_sync
    shape_id, ref_shape_id = str(config.infra.training_shape_id), config.infra.ref_training_shape_id
    settings = asdict(config) | {"reward": str(config.reward)}
    with (
        RunLog(config.log_path, live=LIVE, curves=CURVES, wandb=config.wandb, config=settings) as log,
        Workspace() as workspace,
    ):
        records = CheckpointLog(config.log_path)
        resume_from = records.to_resume(config.base_model, shape_id, sync)
        profile = workspace.resolve(shape_id)
        tokenizer = load_tokenizer(str(config.deployment.tokenizer_model))
        prompts = load_prompts(config, tokenizer, profile.max_supported_context_length, log.note)

        # --- provision ---
        client = workspace.trainer(
            config.base_model,
            profile,
            config.infra,
            lora_rank=config.lora_rank,
            learning_rate=config.optim.learning_rate,
        )
        reference = None
        if ref_shape_id is None:
            log.note("the KL term is off: infra.ref_training_shape_id is not set, so there is no reference trainer")
        else:
            ref_profile = workspace.resolve(ref_shape_id)
            reference = workspace.trainer(config.base_model, ref_profile, config.infra, forward_only=True)
            log.note(f"the KL term is towards the base model {config.base_model}, whatever weights the run starts from")
        deployment_id = workspace.deployment(config.base_model, profile, config.deployment, client)
        syncer = workspace.syncer(client, deployment_id, config.base_model, config.lora_rank, sync)
        sampler, timeout = workspace.sampler(deployment_id, tokenizer), config.deployment.sample_timeout
        rollouts = Rollouts(sampler, tokenizer, reward, config.rollout.max_tokens, timeout, config.seed)
        saver = Checkpointer(client, records, config.base_model, shape_id, sync)
        start, consumed = saver.start(resume_from, config.init_from, log.note)
        if sync.weight_sync_interval > 0 and (sync.weight_sync_before_training or start > 0 or config.init_from):
            syncer.save_and_hotload(f"start-{start}")
        log.begin(start, config.max_steps)

        with rollouts:
            run = Run(config, client, reference, rollouts, syncer, saver, log, prompts)
            consumed = run.loop(start, consumed, on_step)

        # --- final checkpoint ---
        saver.finish(config.max_steps, consumed)
        output_model = None
        if config.output_model_id:
            snapshot = saver.save_promotable(config.max_steps, consumed)
            output_model = workspace.promote(client.job_id, snapshot, config.output_model_id, config.base_model)
        return log.result(
            job_id=client.job_id, deployment_id=deployment_id, checkpoints=records.names(), output_model=output_model
        )


if __name__ == "__main__":
    cli.run(Config, main)
