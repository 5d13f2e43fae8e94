"""One training life through whichever client is installed; runs in that client's own environment.

    python life.py tinker|fireworks URL BASE_MODEL

Prints one JSON object on the last line: endpoint -> "ok", or what went wrong. Uses only what every generation offers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch

TIMEOUT_S = 60
RANK = 4


def settled(value: Any) -> Any:
    """What a call gives in the end: newer clients answer with a future where older ones waited."""
    return value.result(timeout=TIMEOUT_S) if hasattr(value, "result") else value


def mean_logprob(data: list[Any], logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
    loss = -torch.cat([row.reshape(-1) for row in logprobs]).mean()
    return loss, {"mine:sum": loss.item()}


def datum(types: Any, *names: str) -> Any:
    tokens = list(range(5, 26))
    inputs = {"target_tokens": types.TensorData(data=tokens[1:], dtype="int64", shape=[20])}
    for name in names:
        inputs[name] = types.TensorData(data=[-1.0] * 20, dtype="float32", shape=[20])
    return types.Datum(model_input=types.ModelInput.from_ints(tokens[:-1]), loss_fn_inputs=inputs)


def calls(client: Any, types: Any) -> dict[str, Callable[[], Any]]:
    """Endpoint -> the call that uses it, in the order of a life."""
    return {
        "forward": lambda: client.forward([datum(types)], "cross_entropy"),
        "forward_backward": lambda: client.forward_backward([datum(types)], "cross_entropy"),
        "forward_backward (ppo)": lambda: client.forward_backward([datum(types, "logprobs", "advantages")], "ppo"),
        "forward_backward (custom loss)": lambda: client.forward_backward_custom([datum(types)], mean_logprob),
        "optim_step": lambda: client.optim_step(types.AdamParams(learning_rate=1e-3)),
        "save_weights": lambda: client.save_state("saved"),
        "load_weights": lambda: client.load_state("saved"),
        "load_weights (optimizer)": lambda: client.load_state_with_optimizer("saved"),
        "save_weights_for_sampler": lambda: client.save_weights_for_sampler("sampled"),
        "optim_step after load": lambda: client.optim_step(types.AdamParams(learning_rate=1e-3)),
    }


def start_tinker(url: str, base_model: str) -> tuple[Any, Any, dict[str, Callable[[], Any]]]:
    import tinker

    service = tinker.ServiceClient(base_url=url, api_key="tml-any")
    client = settled(service.create_lora_training_client(base_model, rank=RANK, seed=1))
    more = {"get_info": lambda: client.get_info()}
    if hasattr(service, "close"):
        more["sessions/finish"] = lambda: service.close("success")
    return client, tinker.types, more


def start_fireworks(url: str, base_model: str) -> tuple[Any, Any, dict[str, Callable[[], Any]]]:
    from fireworks.training.sdk.client import FiretitanServiceClient

    try:
        from fireworks.training.sdk import types
    except ImportError:  # the generation that borrows them
        from tinker import types
    service = FiretitanServiceClient(base_url=url, api_key="any")
    client = service.create_training_client(base_model, lora_rank=RANK)
    more = {"list_checkpoints": client.list_checkpoints}
    if hasattr(client, "unload_model"):
        more["unload_model"] = client.unload_model
    return client, types, more


def main() -> None:
    sdk, url, base_model = sys.argv[1:]
    told: dict[str, str] = {}
    start = {"tinker": start_tinker, "fireworks": start_fireworks}[sdk]
    try:
        client, types, more = start(url, base_model)
        told["create_session, create_model"] = "ok"
    except Exception as error:  # noqa: BLE001  this script reports what a client makes of the server
        told["create_session, create_model"] = f"{type(error).__name__}: {error}"
    else:
        for endpoint, call in (calls(client, types) | more).items():
            try:
                settled(call())
                told[endpoint] = "ok"
            except Exception as error:  # noqa: BLE001  as above
                told[endpoint] = f"{type(error).__name__}: {error}"
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
