"""Our sampler's engine against `generate` of Hugging Face: the same prompts, the same number of greedy tokens.

The tokens must agree before anything is timed.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.harness import Comparison, interleave
from firebox.modeling.causal_lm import load_causal_lm
from firebox.modeling.tiny import make_tiny
from firebox.sampler.engine import Engine
from firebox.sampler.scheduler import Generation, Params

PAIRS = 7


def run() -> list[Comparison]:
    with tempfile.TemporaryDirectory() as folder:
        model_dir = Path(folder) / "tiny"
        make_tiny(model_dir)
        return [
            compare(model_dir, "16 prompts of 32 tokens, 64 tokens each", 16, 32, 64),
            compare(model_dir, "1 prompt of 32 tokens, 64 tokens", 1, 32, 64),
        ]


def compare(model_dir: Path, what: str, num_prompts: int, prompt_tokens: int, new_tokens: int) -> Comparison:
    rng = random.Random(0)
    prompts = [[rng.randrange(1000) for _ in range(prompt_tokens)] for _ in range(num_prompts)]
    lm = load_causal_lm(model_dir)
    plain = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="sdpa").eval()

    async def answers(engine: Engine) -> list[list[int]]:
        params = Params(max_tokens=new_tokens, temperature=0.0)
        generations = [Generation(prompt=tuple(prompt), params=params) for prompt in prompts]
        for generation in generations:
            engine.submit(generation)
        for generation in generations:
            await generation.updated.wait()
        return [[token.id for token in generation.sequences[0].tokens] for generation in generations]

    @torch.inference_mode()
    def generate() -> list[list[int]]:
        batch = torch.tensor(prompts)
        out = plain.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
        )
        return out[:, prompt_tokens:].tolist()

    with asyncio.Runner() as runner:
        engine = Engine(lm, max_batch=64, decode=lambda ids: "")

        async def begin() -> None:
            engine.start()

        runner.run(begin())
        ours, theirs = runner.run(answers(engine)), generate()
        # min_new_tokens forbids the end token to `generate`; ours may draw it, and goes on as well.
        agree = sum(a == b for a, b in zip(ours, theirs, strict=True))
        assert agree >= len(prompts) - 1, f"only {agree} of {len(prompts)} answers agree"
        done = interleave(what, "transformers generate", lambda: runner.run(answers(engine)), generate, PAIRS)
        runner.run(engine.stop())
    return done
