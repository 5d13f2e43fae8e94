r"""Reinforcement learning with a verifiable reward: policy gradients on groups of sampled answers.

    python -m training.recipes.rl_loop --base-model accounts/local/models/tiny --deployment.tokenizer-model ./tiny \
        --dataset countdown.jsonl --reward training.examples.countdown:reward \
        --infra.training-shape-id accounts/local/trainingShapes/tiny-cpu

Each step samples `group_size` answers to `prompts_per_step` prompts from a deployment, scores them, takes one policy-
gradient step and hot-loads the new weights into the deployment. The server divides the summed loss by its tokens.
With `--rollout.max-head-offpolicy-versions` above 0, rollouts of the next steps are sampled while the trainer works.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Ge, Lt

from training.utils import cli, data, dry_run, losses
from training.utils.checkpoints import Checkpointer, CheckpointLog
from training.utils.client import ReconnectableClient
from training.utils.config import (
    Checked,
    Count,
    DeployConfig,
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
from training.utils.errors import ConfigError, DataError
from training.utils.metrics import Curves, RunLog, Timer
from training.utils.provision import Workspace
from training.utils.render import load_tokenizer, render_prompt
from training.utils.rl import policy
from training.utils.rl.config import NamedFunction, PolicyConfig, PolicyLoss, RolloutConfig
from training.utils.rl.rewards import Task
from training.utils.rl.rollout import Rollouts, Sampled
from training.utils.rl.trajectory import Prompt, Rollout, describe, flatten, save_rollouts
from training.utils.schedule import adam_params
from training.utils.steps import Plan, Step

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

# --- config ---------------------------------------------------------------------------------------------------------


@dataclass
class Config(Checked):
    """Settings of one run. To resume one, set `weight_sync.dcp_save_interval` and keep `log_path`."""

    base_model: str  # the model to train, accounts/<account>/models/<id>
    dataset: str  # JSONL of {"messages": [...]} or {"prompt"}, plus what the reward reads
    reward: NamedFunction  # (completion, row) -> float, or of a whole trajectory: (trajectory) -> float
    log_path: str = "runs/rl"  # metrics, checkpoints and curves; the same folder again resumes
    output_model_id: str | None = None  # promote the result under this id
    lora_rank: Count = 0  # 0 trains all parameters
    policy_loss: PolicyLoss = "grpo"  # the formula; its settings are in `policy`
    max_steps: Positive = 100  # optimizer steps
    eval_fraction: Annotated[float, Ge(0), Lt(1)] = 0.0  # share of the rows that is held out
    eval_every: Count = 0  # evaluate every so many steps; always before the first and after the last
    seed: int = 0  # fixes the split, the order and every draw
    grad_accumulation_normalization: Normalization | None = "num_loss_tokens"  # what the server divides the gradient by
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(learning_rate=1e-5))
    infra: InfraConfig = field(default_factory=InfraConfig)
    deployment: DeployConfig = field(default_factory=DeployConfig)
    weight_sync: WeightSyncConfig = field(default_factory=WeightSyncConfig)
    wandb: WandBConfig = field(default_factory=WandBConfig)
    run: RunOptions = field(default_factory=RunConfig)

    def check_together(self) -> None:
        check_output_model_id(self.output_model_id)
        policy.server_loss(self.policy_loss, self.policy)
        if not self.deployment.tokenizer_model:
            fix = "set a Hugging Face name or a directory: prompts are tokenized here"
            raise ConfigError("Config.deployment.tokenizer_model", self.deployment.tokenizer_model, fix)
        if self.policy.answer_mean and self.grad_accumulation_normalization == "num_loss_tokens":
            fix = "use num_sequences: policy.answer_mean has divided each answer by its tokens already"
            raise self.refuse("grad_accumulation_normalization", fix)


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
    reference: policy.Scorer | None
    rollouts: Rollouts
    syncer: WeightSyncer
    saver: Checkpointer
    log: RunLog
    prompts: Prompts

    def loop(self, start: int, consumed: int, on_step: Callable[[dict[str, Any]], None]) -> int:
        """All steps behind `start`. Returns the number of prompts consumed."""
        config, interval = self.config, self.config.weight_sync.weight_sync_interval
        if start == 0 and self.evaluates(0):
            on_step(self.log.log(0, self.evaluate()))
        size, num_prompts = config.rollout.prompts_per_step, len(self.prompts.train)
        plan = Plan(num_prompts, size, 1, config.max_steps, config.seed, start, consumed)
        for planned, future in self.sampled_ahead(plan):
            step, consumed, timer = planned.number, planned.consumed, Timer()
            with timer("rollout"):
                groups, metrics = future.result()
            rewards = [[rollout.reward for rollout in group] for group in groups]
            advantages = [losses.group_advantages(group, config.policy.advantages) for group in rewards]
            save_rollouts(self.log.folder / "rollouts", step, groups, advantages)
            metrics |= describe(groups, self.rollouts.version)
            metrics |= self.train_step(step, groups, advantages, timer)
            if interval > 0 and step % interval == 0:
                with timer("weight_sync"):
                    self.syncer.save_and_hotload(f"step-{step}")
                self.rollouts.version += 1
            metrics |= timer.seconds | {"time/step_s": timer.total}
            metrics["perf/tokens_per_s"] = metrics["rollout/tokens"] / timer.total
            if self.evaluates(step):
                metrics |= self.evaluate()
            on_step(self.log.log(step, metrics))
            if self.saver.due(step):
                self.saver.save(step, consumed)
        return consumed

    def sampled_ahead(self, plan: Plan) -> Iterator[tuple[Step, Future[Sampled]]]:
        """Every step with its rollouts, which were begun with weights that are as old as the settings allow, at most.

        The next ones are begun when the loop comes back, behind the hot-load of the step that was handed out before.
        """
        begun: deque[tuple[Step, Future[Sampled]]] = deque()
        for step in plan.steps():
            begun.append((step, self.rollouts.begin([self.prompts.train[i] for i in step.rows], step.number)))
            if len(begun) > self.config.rollout.max_head_offpolicy_versions:
                yield begun.popleft()
        yield from begun

    def train_step(
        self, step: int, groups: Sequence[Sequence[Rollout]], advantages: Sequence[losses.Array], timer: Timer
    ) -> dict[str, float]:
        """One gradient step on the groups that can teach something; without one, only the mismatch is measured."""
        config = self.config
        chosen = policy.instructive(groups, advantages, config.policy)
        if not chosen:
            self.log.note(f"step {step}: every group earned equal rewards, so there is nothing to learn and no update")
            return policy.compare(flatten(groups), policy.logprobs_of(self.client, flatten(groups)))
        with timer("score"):
            examples, metrics = policy.examples(chosen, config.policy, self.client, self.reference)
        loss_fn, loss_config = policy.server_loss(config.policy_loss, config.policy)
        with timer("forward_backward"):
            output = self.client.forward_backward([example.datum() for example in examples], loss_fn, loss_config)
        adam = adam_params(config.optim, step, config.max_steps)
        with timer("optim"):
            optim = self.client.optim_step(adam, config.grad_accumulation_normalization).metrics or {}
        metrics |= policy.outcome(examples, output, loss_config) | {"optim/lr": adam.learning_rate}
        return metrics | ({"optim/grad_norm": optim["grad_norm"]} if "grad_norm" in optim else {})

    def evaluates(self, step: int) -> bool:
        """Whether the held-out reward is due behind this many steps."""
        every = self.config.eval_every
        return bool(self.prompts.held_out) and (step in (0, self.config.max_steps) or (every > 0 and step % every == 0))

    def evaluate(self) -> dict[str, float]:
        """Mean reward of greedy answers to the held-out prompts."""
        return {"eval/reward": float(np.mean([r.reward for r in self.rollouts.greedy(self.prompts.held_out)]))}


def main(config: Config, on_step: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Run the recipe; `on_step` sees every row of metrics. Returns job, checkpoints, final metrics, output model."""
    validate(config)
    task, sync = Task(config.reward, config.rollout), config.weight_sync
    shape_id = str(config.infra.training_shape_id)
    with (
        RunLog(config, live=LIVE, curves=CURVES, mismatch_stop_after=config.rollout.mismatch_stop_after) as log,
        Workspace(config.log_path) as workspace,
    ):
        records = CheckpointLog(config.log_path)
        resume_from = records.to_resume(config, workspace.states)
        profile = workspace.resolve(shape_id)
        tokenizer = load_tokenizer(str(config.deployment.tokenizer_model))
        prompts = load_prompts(config, tokenizer, profile.max_supported_context_length, log.note)
        if config.run.dry_run:
            rollouts_per_step = config.rollout.prompts_per_step * config.rollout.group_size
            return dry_run.show(config, profile, {"prompts": len(prompts.train), "steps": config.max_steps,
                                               "rollouts": rollouts_per_step * config.max_steps})  # fmt: skip

        # --- provision ---
        client = workspace.trainer(
            config.base_model,
            profile,
            config.infra,
            lora_rank=config.lora_rank,
            learning_rate=config.optim.learning_rate,
        )
        reference = None
        if config.policy.kl_beta > 0:
            reference = workspace.reference(config.base_model, config.infra, client, config.lora_rank)
        if reference is None:
            log.note("the KL term is off: policy.kl_beta is 0, or infra.ref_training_shape_id is not set")
        else:
            log.note(f"the KL term is towards the base model {config.base_model}, whatever weights the run starts from")
        deployment_id = workspace.deployment(config.base_model, profile, config.deployment, client)
        syncer = workspace.syncer(client, deployment_id, config.base_model, config.lora_rank, sync)
        sampler, timeout = workspace.sampler(deployment_id, tokenizer), config.deployment.sample_timeout
        rollouts = Rollouts(sampler, tokenizer, task, config.rollout, timeout=timeout, seed=config.seed)
        saver = Checkpointer(client, records, config, workspace.delete_state)
        start, consumed = saver.start(resume_from, log.note)
        if sync.weight_sync_interval > 0 and (sync.weight_sync_before_training or start > 0 or config.run.init_from):
            syncer.save_and_hotload(f"start-{start}")
        log.begin(start, config.max_steps, job_id=client.job_id, deployment_id=deployment_id)

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
