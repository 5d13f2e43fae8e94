"""Tokens and values per token to the datums that a trainer takes. The one place where targets are shifted.

Knows no loss and no recipe. Invariant: position t of a datum reads token t and scores token t+1, and every value that
belongs to a token travels with the position that scores it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fireworks.training.sdk.types import Datum


def build_datum(tokens: Sequence[int], **per_token: Sequence[float]) -> Datum:
    """A datum of length T-1 from T tokens; each keyword is a loss input with one float per token [T].

    The first token is scored by nobody, so the first value of each input is dropped. Raises ValueError on lengths that
    differ and on fewer than two tokens.
    """
    from fireworks.training.sdk.types import Datum, ModelInput, TensorData

    if len(tokens) < 2:
        raise ValueError(f"a datum needs at least two tokens, got {len(tokens)}")
    inputs = {"target_tokens": TensorData.from_numpy(np.asarray(tokens[1:], dtype=np.int64))}
    for name, values in per_token.items():
        if len(values) != len(tokens):
            raise ValueError(f"{name} has {len(values)} values for {len(tokens)} tokens")
        inputs[name] = TensorData.from_numpy(np.asarray(values[1:], dtype=np.float32))
    return Datum(model_input=ModelInput.from_ints(list(tokens[:-1])), loss_fn_inputs=inputs)
