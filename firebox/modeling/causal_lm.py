"""Load a Hugging Face causal language model and run it on packed tokens.

Owns the way from token ids to log-probabilities, for trainer and sampler alike. Does not know about batches,
losses, caches or adapters.

Invariant: a model that loads here computes the same numbers as plain `transformers` does; `load_causal_lm` checks
it on the spot and refuses the architecture otherwise.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from firebox.modeling.attention import ATTENTION_NAME, AttentionContext, PackedCausal
from firebox.modeling.bitwise import RowInvariant, check_row_invariance
from firebox.wire.errors import FailedPrecondition

_CHECK_TOKENS: Final = 24
_CHECK_TOLERANCE: Final = {torch.float32: 1e-4, torch.bfloat16: 0.25}


class CausalLM:
    """A loaded model: `model` is the Hugging Face module, in evaluation mode (no dropout), on one device.

    With `bitwise`, a token's numbers do not depend on what is computed beside it, to the last bit.
    """

    def __init__(self, model: PreTrainedModel, *, bitwise: bool = False) -> None:
        self.model = model
        self._kernels = RowInvariant if bitwise else contextlib.nullcontext
        self.backbone: nn.Module = getattr(model, model.base_model_prefix)
        self.head: nn.Module = model.get_output_embeddings()
        self.vocab_size: int = model.config.get_text_config().vocab_size

    @property
    def device(self) -> torch.device:
        return self.model.device

    def hidden(self, tokens: Tensor, positions: Tensor, context: AttentionContext) -> Tensor:
        """Final hidden states [T, D] of packed tokens [T] at `positions` [T] (both int64)."""
        with self._kernels():
            output = self.backbone(
                input_ids=tokens.unsqueeze(0), position_ids=positions.unsqueeze(0), use_cache=False, context=context
            )
        return output.last_hidden_state[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits [..., V] of hidden states [..., D]."""
        with self._kernels():
            return self.head(hidden).float()

    def score(self, tokens: Tensor) -> Tensor:
        """Log-probabilities [T-1] float32, in nats, of tokens 1..T-1 of one sequence `tokens` [T] (int64)."""
        lengths = [len(tokens)]
        hidden = self.hidden(tokens, packed_positions(lengths, self.device), PackedCausal(lengths))
        return logprobs_of(self.logits(hidden[:-1]), tokens[1:])


def logprobs_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probabilities in nats of `targets` [T] or [T, K] (int64) under `logits` [T, V]; same shape as targets.

    log p(y) = z_y - logsumexp(z). Used by the trainer's losses and by the sampler, so that both agree.
    """
    index = targets if targets.dim() == logits.dim() else targets.unsqueeze(-1)
    picked = logits.gather(-1, index) - logits.logsumexp(-1, keepdim=True)
    return picked if targets.dim() == logits.dim() else picked.squeeze(-1)


def packed_positions(lengths: list[int], device: torch.device | None = None) -> Tensor:
    """Position ids [T] int64 that restart at 0 for each of the packed sequences."""
    return torch.cat([torch.arange(n, device=device) for n in lengths])


def load_causal_lm(
    model_dir: Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    bitwise: bool = False,
) -> CausalLM:
    """Load the model in `model_dir` (config.json, safetensors) and check it against its own plain forward.

    Raises FailedPrecondition when the directory wants custom code, or when packed log-probs differ from plain
    `transformers` by more than 1e-4 nats (float32) on a short probe; with `bitwise`, also when that mode's own probe
    finds a bit that depends on company.
    """
    config = json.loads((model_dir / "config.json").read_text())
    if "auto_map" in config:
        raise FailedPrecondition(
            f"{model_dir.name}: config.json has 'auto_map', which runs code of the model's author; "
            "convert the model to an architecture that transformers ships",
            reason="CUSTOM_CODE_REFUSED",
        )
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=dtype,
        attn_implementation=ATTENTION_NAME,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
    )
    lm = CausalLM(model.to(device).eval(), bitwise=bitwise)
    _check_against_plain_forward(lm, dtype)
    if bitwise:
        check_row_invariance(lm)
    return lm


@torch.inference_mode()
def _check_against_plain_forward(lm: CausalLM, dtype: torch.dtype) -> None:
    tokens = torch.arange(_CHECK_TOKENS, device=lm.device) * 7919 % lm.vocab_size
    lengths = [_CHECK_TOKENS // 2, _CHECK_TOKENS - _CHECK_TOKENS // 2]
    packed = lm.logits(lm.hidden(tokens, packed_positions(lengths, lm.device), PackedCausal(lengths))).log_softmax(-1)
    lm.model.set_attn_implementation("sdpa")
    try:
        plain = torch.cat([lm.model(input_ids=part[None]).logits[0] for part in tokens.split(lengths)])
    finally:
        lm.model.set_attn_implementation(ATTENTION_NAME)
    difference = (packed - plain.float().log_softmax(-1)).abs().max().item()
    if not difference <= _CHECK_TOLERANCE[dtype]:
        raise FailedPrecondition(
            f"{lm.model.config.model_type}: packed log-probs differ from plain transformers by {difference:.2e} nats; "
            "this architecture is not supported",
            reason="UNSUPPORTED_ARCHITECTURE",
        )
