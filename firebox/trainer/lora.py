"""Low-rank adapters on the linear layers of a shared base model.

Owns which layers are adapted, the initial values and the arithmetic y + (alpha / rank) B A x. The base model is never
rewritten: an adapter is switched on by hooks for the length of one pass, so many adapters share one model.

Invariant: a fresh adapter changes nothing (B is zero), and the same seed gives the same adapter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firebox.modeling.causal_lm import CausalLM
from firebox.weights.manifest import AdapterInfo
from firebox.weights.peft import PeftAdapter
from firebox.wire.errors import FailedPrecondition, InvalidArgument
from firebox.wire.training import LoraConfig

_DOWN: Final = ".lora_A.weight"
_UP: Final = ".lora_B.weight"
_ATTENTION: Final = ("attn", "attention")
_MLP: Final = ("mlp", "feed_forward")

Hook = Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]


class Adapter:
    """One adapter: `parameters` maps `<layer>.lora_A.weight` [r, in] and `<layer>.lora_B.weight` [out, r], float32."""

    def __init__(self, lm: CausalLM, config: LoraConfig) -> None:
        """Raises InvalidArgument when the configuration is impossible or adapts no layer of this model."""
        _check(config)
        self.layers = _target_layers(lm, config)
        self._scale = config.effective_alpha / config.rank
        self.info = AdapterInfo(
            rank=config.rank,
            alpha=config.effective_alpha,
            target_modules=sorted({name.rpartition(".")[2] for name in self.layers}),
        )
        self.parameters = _initial_values(self.layers, config)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside this block the base model computes with this adapter."""

        def hook(name: str) -> Hook:
            return lambda layer, inputs, output: output + self.update(name, inputs[0])

        with _hooked(self.layers, hook):
            yield

    @property
    def changes_nothing(self) -> bool:
        return not any(up.count_nonzero() for name, up in self.parameters.items() if name.endswith(_UP))

    @torch.no_grad()
    def merged(self) -> dict[str, Tensor]:
        """W + (alpha / rank) B A of each adapted layer, in float32, by the name of its weight."""
        weights = {}
        for name, layer in self.layers.items():
            with torch.autocast(layer.weight.device.type, enabled=False):
                update = self.parameters[name + _UP] @ self.parameters[name + _DOWN]
                weights[f"{name}.weight"] = layer.weight + self._scale * update
        return weights

    def values_of(self, saved: PeftAdapter) -> Mapping[str, Tensor]:
        """The values of `parameters` with which this adapter computes what `saved` does.

        Another alpha is folded into B. Layers that `saved` leaves alone get B = 0 and keep their A. Raises
        FailedPrecondition when the rank differs, or a layer or shape is one that this adapter does not have.
        """
        if saved.rank != self.info.rank:
            raise _unfit(f"its rank is {saved.rank}, this model's {self.info.rank}; create one with rank {saved.rank}")
        for name in saved.factors.keys() - self.layers.keys():
            raise _unfit(f"it adapts {name}, which this model leaves alone; create one that trains this layer")
        values = {name: torch.zeros_like(p) if name.endswith(_UP) else p for name, p in self.parameters.items()}
        for name, (down, up) in saved.factors.items():
            found = {name + _DOWN: down.float(), name + _UP: up.float() * (saved.scale / self._scale)}
            for key, tensor in found.items():
                if tensor.shape != values[key].shape:
                    raise _unfit(f"{key} is {list(tensor.shape)}, here {list(values[key].shape)}")
                if not tensor.isfinite().all():
                    raise _unfit(f"{key} holds NaN or infinity")
            values |= found
        return values

    def update(self, name: str, inputs: Tensor) -> Tensor:
        """(alpha / rank) B A x [..., out] of an adapted layer for its inputs x [..., in]."""
        down, up = self.parameters[name + _DOWN], self.parameters[name + _UP]
        return F.linear(F.linear(inputs, down), up) * self._scale


@contextlib.contextmanager
def active_by_rows(rows: Sequence[tuple[Adapter, int]]) -> Iterator[None]:
    """Inside this block the base model computes the first so many packed rows with the first adapter, and so on."""
    layers = {name: layer for adapter, _ in rows for name, layer in adapter.layers.items()}
    sizes = [size for _, size in rows]

    def hook(name: str) -> Hook:
        def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            parts = zip(rows, inputs[0].split(sizes, -2), output.split(sizes, -2), strict=True)
            return torch.cat([y + a.update(name, x) if name in a.layers else y for (a, _), x, y in parts], -2)

        return add

    with _hooked(layers, hook):
        yield


@contextlib.contextmanager
def _hooked(layers: Mapping[str, nn.Linear], hook: Callable[[str], Hook]) -> Iterator[None]:
    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_hook(hook(name)).remove)
        yield


def _check(config: LoraConfig) -> None:
    if config.init_method not in (None, "kaiming"):
        raise InvalidArgument(f"lora_config.init_method: {config.init_method!r} is not supported; use 'kaiming'")
    if not (math.isfinite(config.effective_alpha) and config.effective_alpha > 0):
        raise InvalidArgument(f"lora_config.alpha: {config.alpha} must be a finite number above 0")
    if config.seed is not None and not -(2**63) <= config.seed < 2**63:
        raise InvalidArgument(f"lora_config.seed: {config.seed} does not fit 64 bits")


def _target_layers(lm: CausalLM, config: LoraConfig) -> dict[str, nn.Linear]:
    def wanted(name: str, layer: nn.Module) -> bool:
        if layer is lm.head:
            return config.train_unembed
        if any(part in name for part in _ATTENTION):
            return config.train_attn
        return config.train_mlp and any(part in name for part in _MLP)

    layers = {n: m for n, m in lm.model.named_modules() if isinstance(m, nn.Linear) and wanted(n, m)}
    if not layers:
        raise InvalidArgument(
            "lora_config: no layer is adapted; set train_attn, train_mlp or train_unembed to one this model has"
        )
    return layers


def _initial_values(layers: dict[str, nn.Linear], config: LoraConfig) -> dict[str, nn.Parameter]:
    generator = torch.Generator()
    if config.seed is None:
        generator.seed()
    else:
        generator.manual_seed(config.seed)
    parameters: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        down = torch.empty(config.rank, layer.in_features)
        nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
        up = torch.zeros(layer.out_features, config.rank)
        device = layer.weight.device
        parameters[name + _DOWN] = nn.Parameter(down.to(device))
        parameters[name + _UP] = nn.Parameter(up.to(device))
    return parameters


def _unfit(what: str) -> FailedPrecondition:
    return FailedPrecondition(f"adapter_path: the adapter does not fit: {what}", reason="ADAPTER_MISMATCH")
