"""What bitwise mode costs: a pass and its backward, and decoding, each against the same engine without the mode.

The peer is our own default mode, so a ratio below 1 is the price.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path

import torch

from benchmarks.harness import Comparison, interleave
from firebox.modeling.attention import PackedCausal
from firebox.modeling.causal_lm import CausalLM, load_causal_lm, logprobs_of, packed_positions
from firebox.modeling.tiny import make_tiny
from firebox.sampler.engine import Engine
from firebox.sampler.scheduler import Generation, Params

PAIRS = 7
NEW_TOKENS = 64


def run() -> list[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder) / "tiny"
        make_tiny(model_dir)
        bitwise, plain = load_causal_lm(model_dir, bitwise=True), load_causal_lm(model_dir)
    rng = random.Random(0)
    lengths = [rng.randint(16, 256) for _ in range(8)]
    rows = [torch.randint(1000, (length,)) for length in lengths]
    training = interleave(
        f"forward and backward, {len(rows)} rows of 16 to 256 tokens",
        "default mode",
        lambda: forward_backward(bitwise, rows),
        lambda: forward_backward(plain, rows),
        PAIRS,
    )
    return [training, *(decoding(bitwise, plain, num_prompts) for num_prompts in (1, 16))]


def forward_backward(lm: CausalLM, rows: list[torch.Tensor]) -> None:
    lengths = [len(row) for row in rows]
    tokens = torch.cat(rows)
    hidden = lm.hidden(tokens, packed_positions(lengths), PackedCausal(lengths))
    logprobs_of(lm.logits(hidden), tokens.roll(-1)).mean().backward()
    lm.model.zero_grad()


def decoding(bitwise: CausalLM, plain: CausalLM, num_prompts: int) -> Comparison:
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(1000) for _ in range(32)) for _ in range(num_prompts)]

    async def start(lm: CausalLM) -> Engine:
        engine = Engine(lm, max_batch=64, decode=lambda ids: "")
        engine.start()
        return engine

    async def sample(engine: Engine) -> None:
        params = Params(max_tokens=NEW_TOKENS, temperature=0.0)
        generations = [Generation(prompt=prompt, params=params) for prompt in prompts]
        for generation in generations:
            engine.submit(generation)
        for generation in generations:
            await generation.updated.wait()

    with asyncio.Runner() as runner:
        ours, theirs = runner.run(start(bitwise)), runner.run(start(plain))
        done = interleave(
            f"decoding, {num_prompts} prompts of 32 tokens, {NEW_TOKENS} tokens each",
            "default mode",
            lambda: runner.run(sample(ours)),
            lambda: runner.run(sample(theirs)),
            PAIRS,
        )
        runner.run(ours.stop())
        runner.run(theirs.stop())
    return done
