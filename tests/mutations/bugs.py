"""Twelve bugs that training code really has, one at a time in a copy of the sources, and the tests that must see them.

Owns the list of bugs and the copy. A bug is an exact replacement in a named file; a text that is no longer there
exactly once is an error, so the list cannot go stale unnoticed.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LIMIT_S = 240


class Bug(NamedTuple):
    name: str
    file: str
    right: str
    wrong: str
    tests: str
    """Arguments of pytest: the smallest tests that should fail."""


BUGS = (
    Bug(
        "shifted targets",
        "training/utils/datums.py",
        "np.asarray(tokens[1:], dtype=np.int64)",
        "np.asarray(tokens[:-1], dtype=np.int64)",
        "tests/unit/training/test_render.py",
    ),
    Bug(
        "inverted mask",
        "training/utils/render.py",
        "    return Rendered(tokens, weights)",
        "    return Rendered(tokens, [1.0 - weight for weight in weights])",
        "tests/unit/training/test_render.py",
    ),
    Bug(
        "advantage not normalized",
        "training/utils/losses.py",
        "(rewards - rewards.mean()) / (rewards.std() + 1e-6)",
        "rewards - rewards.mean()",
        "tests/unit/training/test_losses.py",
    ),
    Bug(
        "missing token count",
        "firebox/trainer/engine.py",
        "state.count(result.num_loss_tokens, result.num_sequences)\n        return result.output\n",
        "state.count(0, result.num_sequences)\n        return result.output\n",
        "tests/numerics/test_golden_traces.py -k sft",
    ),
    Bug(
        "stale weights after publish",
        "firebox/sampler/hotload.py",
        "            self._tensors[name].copy_(tensor)",
        "            self._tensors[name].clone().copy_(tensor)",
        "tests/unit/sampler/test_hotload.py -k test_base_then_delta",
    ),
    Bug(
        "Adam step lost",
        "firebox/trainer/optimizer.py",
        'self._adam.state[parameter] = {moment: state[f"{name}/{moment}"] for moment in _MOMENTS}',
        'self._adam.state[parameter] = {m: state[f"{name}/{m}"] for m in _MOMENTS} | {"step": torch.tensor(0.0)}',
        "tests/numerics/test_resume_every_step.py -k full",
    ),
    Bug(
        "data cursor + 1",
        "training/utils/data.py",
        "    positions = range(consumed, consumed + size)",
        "    positions = range(consumed + (consumed > 0), consumed + size)",
        "tests/unit/training/test_data.py -k test_the_position_alone",
    ),
    Bug(
        "adapter scale x 2",
        "firebox/trainer/lora.py",
        "self._scale = config.effective_alpha / config.rank",
        "self._scale = 2 * config.effective_alpha / config.rank",
        "tests/numerics/test_trainer_numerics.py -k test_lora_equals_peft",
    ),
    Bug(
        "log-probs at sampling temperature",
        "firebox/sampler/sample.py",
        "raw = logprobs_of(logits, tokens)",
        "raw = logprobs_of(policy, tokens)",
        "tests/unit/sampler/test_sample.py",
    ),
    Bug(
        "EOS masked",
        "training/utils/render.py",
        "            return position + 1",
        "            return position",
        "tests/unit/training/test_render.py",
    ),
    Bug(
        "double normalization",
        "firebox/trainer/state.py",
        "max(1, divisors[normalization])",
        "max(1, divisors[normalization]) ** 2",
        "tests/numerics/test_trainer_numerics.py -k test_step_is_normalize",
    ),
    Bug(
        "clip before normalize",
        "firebox/trainer/optimizer.py",
        "        if divisor != 1:\n",
        "        if params.grad_clip_norm > 0:\n"
        "            torch.nn.utils.clip_grad_norm_(parameters, params.grad_clip_norm)\n"
        "        if divisor != 1:\n",
        "tests/numerics/test_trainer_numerics.py -k test_step_is_normalize",
    ),
)


def planted(bug: Bug, source: str) -> str:
    """`source` with the bug; raises ValueError when its place is not there exactly once."""
    if (found := source.count(bug.right)) != 1:
        raise ValueError(f"{bug.name}: {bug.right!r} is {found} times in {bug.file}, not once; update the list")
    return source.replace(bug.right, bug.wrong)


def copy_sources(to: Path) -> Path:
    """A copy of the tracked files and of those not yet tracked, without the environment."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, to / name)
    return to


def fails(copy: Path, tests: str) -> bool:
    """Whether a test fails in the copy; raises RuntimeError when pytest could not run them."""
    command: Sequence[str] = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", *tests.split()]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest {tests} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def caught(bug: Bug, copy: Path) -> bool:
    """Whether the tests see the bug; the copy is as before afterwards."""
    file = copy / bug.file
    source = file.read_text()
    file.write_text(planted(bug, source))
    try:
        return fails(copy, bug.tests)
    finally:
        file.write_text(source)
