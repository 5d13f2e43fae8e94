"""Kernels whose result for one token does not depend on the tokens computed beside it: float32 on a CPU.

Owns the replacements and the probe that shows whether they hold on this machine. Does not know trainer or sampler.

Invariant: inside `RowInvariant()` a token's hidden state and logits have the same bits, whether it is computed alone,
with its sequence, or with others. That rests on how the CPU's matrix library splits its work, which nobody promises:
hence the probe, and `check_row_invariance` refuses what fails it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from firebox.modeling.attention import PackedCausal
from firebox.wire.errors import FailedPrecondition

if TYPE_CHECKING:
    from firebox.modeling.causal_lm import CausalLM

_MIN_ROWS: Final = 16
"""Matrix products of fewer rows go to kernels that sum in another order."""
_KEY_BLOCK: Final = 64
"""Keys are summed over in blocks of this many, so that their number does not change the order of the sum."""

_PROBE_LENGTHS: Final = (1, 3, 17, 29, 65, 130, 200)


class RowInvariant(TorchFunctionMode):
    """While entered, this thread's linear layers, SiLU, sigmoid and attention are the row-invariant ones."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _REPLACED.get(func, func)(*args, **kwargs or {})


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    out = F.linear(_at_least_min_rows(rows), weight, bias)[: len(rows)]
    return out.view(*x.shape[:-1], -1)


def _sigmoid(x: Tensor) -> Tensor:
    # The library's own one computes the last few numbers of an array by other code than the rest.
    return 1 / (1 + torch.exp(-x))


def _silu(x: Tensor, inplace: bool = False) -> Tensor:
    return x / (1 + torch.exp(-x))


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention of query [B, H, T, D] over key and value [B, Hk, S, D]; `attn_mask` is boolean, [B, 1, 1, S]."""
    length = query.shape[2]
    kv_heads, size = key.shape[1:3]
    # Query heads that share a key head are rows of one product: [B * Hk, heads per key head * T, D].
    rows = query.unflatten(1, (kv_heads, -1)).flatten(2, 3).flatten(0, 1) * (scale or query.shape[-1] ** -0.5)
    num_rows = rows.shape[1]
    rows = _at_least_min_rows(rows)
    seen = _seen(rows, length, size, attn_mask, is_causal, kv_heads)
    padding = -size % _KEY_BLOCK
    blocks = [F.pad(t.flatten(0, 1), (0, 0, 0, padding)).split(_KEY_BLOCK, dim=1) for t in (key, value)]
    hidden = ~F.pad(seen, (0, padding))
    scores = [
        (rows @ k.transpose(1, 2)).masked_fill(h, -torch.inf)
        for k, h in zip(blocks[0], hidden.split(_KEY_BLOCK, dim=-1), strict=True)
    ]
    highest = torch.stack([s.detach().amax(-1) for s in scores]).amax(0).unsqueeze(-1)
    total, out = torch.zeros(()), torch.zeros(())
    # A block that a row does not see adds exact zeros to it: nothing changes when there are more of them.
    for score, v in zip(scores, blocks[1], strict=True):
        weights = torch.exp(score - highest)
        total = total + weights.sum(-1, keepdim=True)
        out = out + weights @ v
    out = (out / total)[:, :num_rows]
    return out.unflatten(0, (-1, kv_heads)).unflatten(2, (-1, length)).flatten(1, 2)


def _seen(rows: Tensor, length: int, size: int, mask: Tensor | None, is_causal: bool, kv_heads: int) -> Tensor:
    """Which keys each row sees, broadcastable to [B * Hk, rows, S]."""
    if is_causal:
        position = torch.arange(rows.shape[1], device=rows.device) % length
        return torch.arange(size, device=rows.device) <= position.unsqueeze(-1)
    if mask is None:
        return torch.ones(1, size, dtype=torch.bool, device=rows.device)
    return mask[:, 0].repeat_interleave(kv_heads, dim=0)


def _at_least_min_rows(x: Tensor) -> Tensor:
    """`x` [..., rows, K] with rows of zeros below, where there are too few."""
    missing = _MIN_ROWS - x.shape[-2]
    return F.pad(x, (0, 0, 0, missing)) if missing > 0 else x


_REPLACED: Final[dict[Callable[..., Any], Callable[..., Any]]] = {
    F.linear: _linear,
    F.silu: _silu,
    F.sigmoid: _sigmoid,
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    F.scaled_dot_product_attention: _attend,
}


class _Growing:
    """Attention of one token at a time: each sees itself and all before it."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        before = self._layers.get(layer, (key[:0], value[:0]))
        keys, values = self._layers[layer] = torch.cat([before[0], key]), torch.cat([before[1], value])
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (query, keys, values))
        return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)[0].transpose(0, 1)


@torch.inference_mode()
def check_row_invariance(lm: CausalLM) -> None:
    """Compare the bits of logits: sequences side by side, one by one, and token by token.

    Raises FailedPrecondition when the model is not float32 on a CPU, or one bit differs.
    """
    if lm.device.type != "cpu" or lm.model.dtype != torch.float32:
        raise _refused(f"the model is {lm.model.dtype} on {lm.device.type}; it needs float32 on a CPU")
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(lm.vocab_size, (n,), generator=generator) for n in _PROBE_LENGTHS]

    def run(parts: list[Tensor]) -> Tensor:
        lengths = [len(part) for part in parts]
        positions = torch.cat([torch.arange(n) for n in lengths])
        return lm.logits(lm.hidden(torch.cat(parts), positions, PackedCausal(lengths)))

    together = run(sequences)
    growing = _Growing()
    steps = [lm.hidden(t, torch.tensor([n]), growing) for n, t in enumerate(sequences[-1].split(1))]
    ways = {
        "alone": torch.cat([run([sequence]) for sequence in sequences]),
        "in another order": torch.cat(run(sequences[::-1]).split(_PROBE_LENGTHS[::-1])[::-1]),
        "token by token": torch.cat([together[: -len(steps)], *(lm.logits(step) for step in steps)]),
    }
    for way, logits in ways.items():
        if not torch.equal(logits, together):
            largest = (logits - together).abs().max().item()
            raise _refused(f"logits of sequences computed {way} differ from those computed together by {largest:.1e}")


def _refused(why: str) -> FailedPrecondition:
    return FailedPrecondition(f"bitwise mode does not work here: {why}; start without it", reason="BITWISE_UNAVAILABLE")
