"""What one model trains: parameters, gradients, optimizer and counters, as one value that can be saved and restored.

Owns the names of the tensors in a checkpoint. Does not know files, requests or how gradients are computed.

Invariant: `load(tensors())` changes nothing, bit for bit; a state that does not fit is refused before anything is
copied.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from firebox.trainer.lora import Adapter
from firebox.trainer.optimizer import AdamW
from firebox.wire.errors import FailedPrecondition
from firebox.wire.training import AdamParams, Normalization


class ModelState:
    """Trainable state. `parameters` is empty for frozen weights; `adapter` is None for full-parameter training."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], adapter: Adapter | None = None) -> None:
        self.parameters = dict(parameters)
        self.adapter = adapter
        self.step = 0
        self.last_snapshot: str | None = None
        self._num_loss_tokens = 0
        self._num_sequences = 0
        self._optimizer = AdamW(self.parameters) if self.parameters else None

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside this block the shared base model computes as this model."""
        with self.adapter.active() if self.adapter else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Add the gradients made inside this block to those before it, or, when the block fails, none of them."""
        before = {name: parameter.grad for name, parameter in self.parameters.items()}
        with contextlib.ExitStack() as undo:
            undo.callback(self._set_gradients, before)
            self._set_gradients({})
            yield
            undo.pop_all()
        for name, parameter in self.parameters.items():
            earlier = before[name]
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)

    def count(self, num_loss_tokens: int, num_sequences: int) -> None:
        """Note what a backward pass contributed, for the normalization of the next step."""
        self._num_loss_tokens += num_loss_tokens
        self._num_sequences += num_sequences

    def optim_step(self, params: AdamParams, normalization: Normalization) -> dict[str, float]:
        """Apply and clear the accumulated gradients, then the counters; see `AdamW.step` for what it raises."""
        assert self._optimizer is not None
        divisors = {"none": 1, "num_loss_tokens": self._num_loss_tokens, "num_sequences": self._num_sequences}
        try:
            metrics = self._optimizer.step(params, max(1, divisors[normalization]))
        except FailedPrecondition:  # the gradients were dropped, so what was counted with them goes too
            self._num_loss_tokens = self._num_sequences = 0
            raise
        self._num_loss_tokens = self._num_sequences = 0
        self.step += 1
        return metrics

    def tensors(self) -> dict[str, Tensor]:
        """Everything that the next command's result depends on, by name; the tensors are the live ones."""
        assert self._optimizer is not None
        gradients = {n: p.grad for n, p in self.parameters.items() if p.grad is not None}
        return {
            "counters": torch.tensor([self.step, self._num_loss_tokens, self._num_sequences]),
            "rng": torch.get_rng_state(),
            **{f"weights/{name}": p.detach() for name, p in self.parameters.items()},
            **{f"optimizer/{name}": tensor for name, tensor in self._optimizer.state().items()},
            **{f"gradients/{name}": tensor for name, tensor in gradients.items()},
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], *, optimizer: bool) -> None:
        """Take over `tensors`; without `optimizer` only the weights, and moments, gradients and step start anew.

        Raises FailedPrecondition, and changes nothing, when the weights are those of another model.
        """
        assert self._optimizer is not None
        weights = _part(tensors, "weights/")
        self._check_fits(weights)
        for name, parameter in self.parameters.items():
            parameter.copy_(weights[name])
        if optimizer:
            self.step, self._num_loss_tokens, self._num_sequences = tensors["counters"].tolist()
            torch.set_rng_state(tensors["rng"])
            self._optimizer.load(self._to_device(_part(tensors, "optimizer/")))
            self._set_gradients(self._to_device(_part(tensors, "gradients/")))
        else:
            self.step = self._num_loss_tokens = self._num_sequences = 0
            self._optimizer.reset()
            self._set_gradients({})

    def _check_fits(self, weights: Mapping[str, Tensor]) -> None:
        shapes = {name: list(p.shape) for name, p in self.parameters.items()}
        saved = {name: list(t.shape) for name, t in weights.items()}
        for name in sorted(shapes.keys() | saved.keys()):
            if shapes.get(name) != saved.get(name):
                raise FailedPrecondition(
                    f"path: the checkpoint is of another model: {name} is {saved.get(name, 'missing')} there and "
                    f"{shapes.get(name, 'missing')} here; load it into a model with the same base and LoRA settings",
                    reason="CHECKPOINT_MISMATCH",
                )

    def _set_gradients(self, gradients: Mapping[str, Tensor | None]) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = gradients.get(name)

    def _to_device(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        device = next(iter(self.parameters.values())).device
        return {name: tensor.to(device) for name, tensor in tensors.items()}


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
