"""Requests no client would send: hostile bodies for every call of the trainer's plane, made from a seed."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import zstandard

from firebox.wire.proto import training_pb2 as pb

PROTO = {"Content-Type": "application/x-protobuf"}
ZSTD = PROTO | {"Content-Encoding": "zstd"}
NAMES = ["../../etc/passwd", "/etc/passwd", "a/../../b", "..", "", "A B", "x" * 300, "\x00", "cross_job://../x", "ü"]
VALUES: list[Any] = [
    *(None, True, "x", "", [], {}, [[]], -1, 0.5, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e308, -1e308),
    *(float("nan"), float("inf"), "x" * 100_000, "😀", *NAMES),
]


class Hostile(NamedTuple):
    """One request; `in_order` says that it takes the next place in its model's sequence."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    in_order: bool = False


class Maker:
    """Makes hostile requests about a model with a small vocabulary and a short context."""

    def __init__(self, model_id: str, session_id: str, seed: int) -> None:
        self._model_id, self._session_id = model_id, session_id
        self._random = random.Random(seed)
        self._kinds: list[Callable[[int], Hostile]] = [
            *(self._mutated, self._mutated, self._mutated, self._cut_off, self._noise, self._deep),
            *(self._message, self._message, self._broken_message, self._broken_zstd, self._path, self._place),
        ]

    def make(self, seq_id: int) -> Hostile:
        """A request that may take place `seq_id`, the next one."""
        return self._random.choice(self._kinds)(seq_id)

    def _bodies(self, seq_id: int) -> dict[str, dict[str, Any]]:
        target = {"data": [1, 2, 3], "dtype": "int64", "shape": [3]}
        weights = {"data": [1.0, 1.0, 1.0], "dtype": "float32"}
        sparse = {"sparse_crow_indices": [0, 1, 1, 2], "sparse_col_indices": [0, 1], "shape": [3, 2]}
        data = [
            {"model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2, 3]}]}, "loss_fn_inputs": inputs}
            for inputs in (
                {"target_tokens": target, "weights": weights},
                {"target_tokens": {"data": [1, 2], "dtype": "int64", **sparse}},
            )
        ]
        asked = {"data": data, "loss_fn": "cross_entropy", "loss_fn_config": {}}
        place = {"model_id": self._model_id, "seq_id": seq_id}
        lora = {"rank": 2, "alpha": 4.0, "seed": 1, "train_mlp": True, "train_attn": True, "train_unembed": False}
        create = {"session_id": self._session_id, "model_seq_id": 1, "base_model": "tiny", "lora_config": lora}
        return {
            "forward": place | {"forward_input": asked},
            "forward_backward": place | {"forward_backward_input": asked},
            "optim_step": place | {"adam_params": {"learning_rate": 1e-4, "beta1": 0.9, "eps": 1e-8}},
            "save_weights": place | {"path": "name", "overwrite": False},
            "load_weights": place | {"path": "name", "optimizer": True},
            "save_weights_for_sampler": place | {"path": "name", "checkpoint_type": "base"},
            "load_adapter": place | {"adapter_path": "name"},
            "create_model": create,
            "unload_model": {"model_id": "x"},
            "get_info": {"model_id": self._model_id},
            "retrieve_future": {"request_id": "x"},
            "create_session": {"tags": [], "sdk_version": "0.1"},
            "session_heartbeat": {"session_id": self._session_id},
            "client/config": {"sdk_version": "0.38.0"},
            "tokenizer/encode": {"text": "hello"},
            "telemetry": {"events": []},
        }

    def _pick(self, seq_id: int) -> tuple[str, dict[str, Any]]:
        return self._random.choice(list(self._bodies(seq_id).items()))

    def _post(self, route: str, body: bytes, headers: dict[str, str] | None = None, in_order: bool = False) -> Hostile:
        return Hostile("POST", route, headers or {"Content-Type": "application/json"}, body, in_order)

    def _mutated(self, seq_id: int) -> Hostile:
        """A right body with one value replaced, anywhere but in its address."""
        route, body = self._pick(seq_id)
        in_order = "seq_id" in body
        fields = [name for name in body if name not in ("model_id", "seq_id")] or list(body)
        holder: Any = body
        key: Any = self._random.choice(fields)
        while isinstance(holder[key], dict | list) and holder[key] and self._random.random() < 0.85:
            holder = holder[key]
            key = self._random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[key] = copy.deepcopy(self._random.choice(VALUES))
        return self._post(route, json.dumps(body).encode(), in_order=in_order)

    def _cut_off(self, seq_id: int) -> Hostile:
        route, body = self._pick(seq_id)
        whole = json.dumps(body).encode()
        return self._post(route, whole[: self._random.randrange(len(whole))])

    def _noise(self, seq_id: int) -> Hostile:
        route, _ = self._pick(seq_id)
        headers = self._random.choice([{}, PROTO, ZSTD, {"Content-Encoding": "gzip"}, {"Content-Type": "x" * 500}])
        return self._post(route, self._random.randbytes(self._random.randrange(2000)), headers)

    def _deep(self, seq_id: int) -> Hostile:
        route, body = self._pick(seq_id)
        opening, closing = self._random.choice([(b"[", b"]"), (b'{"a":', b"}"), (b'{"model_id":[', b"]}")])
        depth = self._random.choice([50, 2000, 200_000])
        nested = opening * depth + b"1" + closing * depth
        whole = json.dumps(body | {"extra": 0}).encode().replace(b'"extra": 0', b'"extra": ' + nested)
        return self._post(route, self._random.choice([nested, nested[: depth // 2], whole]), in_order=False)

    def _message(self, seq_id: int) -> Hostile:
        """A whole protobuf message with impossible content."""
        message = pb.ForwardBackwardRequest(model_id=self._model_id, seq_id=seq_id, loss_fn="cross_entropy")
        datum = message.data.add()
        datum.model_input.add().encoded_text.tokens = np.array([1, 2, 3], np.int32).tobytes()
        target = datum.loss_fn_inputs["target_tokens"]
        target.dense, target.dtype = np.array([1, 2, 3]).tobytes(), pb.DTYPE_INT64
        weights = datum.loss_fn_inputs["weights"]
        weights.dense, weights.dtype = np.array([np.nan, 1, 1], np.float32).tobytes(), pb.DTYPE_FLOAT32
        self._random.choice(MESSAGE_CHANGES)(message, datum, target)
        body = message.SerializeToString()
        if self._random.random() < 0.3:
            return self._post("forward_backward", zstandard.compress(body), ZSTD, in_order=True)
        return self._post("forward_backward", body, PROTO, in_order=True)

    def _broken_message(self, seq_id: int) -> Hostile:
        body = bytearray(self._message(seq_id).body)
        for _ in range(self._random.randint(1, 8)):
            body[self._random.randrange(len(body))] = self._random.randrange(256)
        cut = self._random.choice([len(body), self._random.randrange(len(body))])
        # What is left may still name another place: never this model's.
        return self._post("forward_backward", bytes(body[:cut]).replace(self._model_id.encode(), b"?"), PROTO)

    def _broken_zstd(self, seq_id: int) -> Hostile:
        whole = zstandard.compress(bytes(1000) + self._random.randbytes(100))
        bomb = zstandard.compress(bytes(2**27))
        silent = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(2**27))
        body = self._random.choice([whole[:-5], whole + b"x", whole, bomb, silent, whole[:6]])
        return self._post("forward_backward", body, ZSTD)

    def _path(self, seq_id: int) -> Hostile:
        path = self._random.choice(
            [
                "../../etc/passwd",
                "%2e%2e/%2e%2e/etc/passwd",
                "no/such/call",
                "%00",
                "sessions/%2e%2e/finish",
                "x" * 9000,
            ]
        )
        method = self._random.choice(["GET", "POST", "PUT", "DELETE"])
        return Hostile(method, path, {}, b"{}" if method == "POST" else b"")

    def _place(self, seq_id: int) -> Hostile:
        """A sound body at a place that is taken, negative or out of all reach."""
        body = self._bodies(seq_id)["forward"]
        body["seq_id"] = self._random.choice([0, -1, max(seq_id - 1, 0), seq_id + 10**5, 2**63, 10**300, None])
        return self._post("forward", json.dumps(body).encode())


def _shape(*sizes: int) -> Callable[..., None]:
    return lambda message, datum, target: target.shape.extend(sizes)


def _tokens(*ids: int) -> Callable[..., None]:
    def change(message: Any, datum: Any, target: Any) -> None:
        datum.model_input[0].encoded_text.tokens = np.array(ids, np.int32).tobytes()
        target.dense = np.zeros(len(ids), np.int64).tobytes()

    return change


def _csr(crow: list[int], col: list[int], *shape: int) -> Callable[..., None]:
    def change(message: Any, datum: Any, target: Any) -> None:
        target.sparse_csr.values = np.ones(len(col), np.int64).tobytes()
        target.sparse_csr.crow_indices = np.array(crow, np.int64).tobytes()
        target.sparse_csr.col_indices = np.array(col, np.int64).tobytes()
        target.shape.extend(shape)

    return change


MESSAGE_CHANGES: list[Callable[..., None]] = [
    lambda message, datum, target: None,  # a NaN weight is hostile enough
    *(_shape(-3), _shape(2**62, 2**62), _shape(2**32, 2**32), _shape(0), _shape(3, 1, 1)),
    *(_tokens(-1), _tokens(2**31 - 1), _tokens(*range(1, 300)), _tokens()),
    *(_csr([0, 1, 1, 2], [0, 1], 3, 2**40), _csr([0, -5, 1, 2], [0, 1], 3, 2), _csr([], [], 3, 2), _csr([0], [], 0, 9)),
    lambda message, datum, target: target.ClearField("dense"),
    lambda message, datum, target: setattr(target, "dtype", 9),
    lambda message, datum, target: setattr(message, "loss_fn", "../ppo"),
    lambda message, datum, target: message.loss_fn_config.update({"top_k": float("nan")}),
    lambda message, datum, target: message.loss_fn_config.update({"x" * 100_000: 1.0}),
    lambda message, datum, target: message.ClearField("data"),
    lambda message, datum, target: datum.model_input.add().dmel.MergeFromString(b""),
    lambda message, datum, target: setattr(datum.model_input[0].image, "format", "png"),
]
