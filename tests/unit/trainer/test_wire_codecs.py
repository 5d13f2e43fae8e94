"""Two codecs, one operation: what the genuine clients write means the same on either wire."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch
import zstandard
from tinker import types
from tinker.proto.request_conv import forward_backward_request_to_proto
from tinker.proto.response_conv import deserialize_forward_backward_output

from firebox.wire import training_json, training_proto
from firebox.wire.client_config import client_config
from firebox.wire.compression import decompress
from firebox.wire.errors import InvalidArgument, TooLarge
from firebox.wire.training import Failed, Forward, ForwardOutput, Operation, TensorData, output_tensor

CONFIG = {"clip_low_threshold": 0.8, "kind": "mean"}


def request(datums: list[types.Datum], config: dict | None = None) -> types.ForwardBackwardRequest:
    given = types.ForwardBackwardInput(data=datums, loss_fn="cross_entropy", loss_fn_config=config)
    return types.ForwardBackwardRequest(forward_backward_input=given, model_id="m", seq_id=3)


def random_datum(rng: random.Random) -> types.Datum:
    length, width = rng.randint(1, 9), rng.randint(2, 4)
    shape = (length,) if rng.random() < 0.6 else (length, width)
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(rng.randrange(10**6)))
    weights *= torch.rand(shape) < rng.choice([0.2, 1.0])  # thin ones are sent as CSR where that is shorter
    chunks = [types.EncodedTextChunk(tokens=[rng.randrange(2**31) for _ in range(length)])]
    inputs = {"target_tokens": types.TensorData.from_torch(torch.ones(shape, dtype=torch.int64)), "weights": weights}
    return types.Datum(model_input=types.ModelInput(chunks=chunks), loss_fn_inputs=inputs)


def as_json(request: types.ForwardBackwardRequest) -> bytes:
    def tensor(data: types.TensorData) -> dict:
        fields = ("data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices")
        given = {name: getattr(data, name) for name in fields if getattr(data, name) is not None}
        return given | {"data": list(given["data"])}

    given = request.forward_backward_input
    data = [
        {
            "model_input": {
                "chunks": [{"type": "encoded_text", "tokens": list(c.tokens)} for c in d.model_input.chunks]
            },
            "loss_fn_inputs": {name: tensor(t) for name, t in d.loss_fn_inputs.items()},
        }
        for d in given.data
    ]
    body = {"data": data, "loss_fn": given.loss_fn, "loss_fn_config": given.loss_fn_config}
    return json.dumps({"model_id": "m", "seq_id": 3, "forward_backward_input": body}, default=float).encode()


def plain(operation: Operation | Failed) -> object:
    """A value that compares: arrays become their type and bytes."""
    assert isinstance(operation, Forward), operation

    def tensor(data: TensorData) -> object:
        arrays = (data.data, data.sparse_crow_indices, data.sparse_col_indices)
        return data.dtype, data.shape, [a if a is None else (a.dtype.str, a.tobytes()) for a in arrays]

    datums = [
        (
            [(chunk.type, chunk.tokens.dtype.str, chunk.tokens.tobytes()) for chunk in datum.model_input.chunks],
            {name: tensor(data) for name, data in datum.loss_fn_inputs.items()},
        )
        for datum in operation.data
    ]
    return operation.loss_fn, operation.loss_fn_config, operation.backward, datums


def test_both_wires_give_the_same_operation_bit_for_bit() -> None:
    rng = random.Random(0)
    sparse = 0
    for _ in range(50):
        asked = request([random_datum(rng) for _ in range(rng.randint(1, 4))], CONFIG)
        message = forward_backward_request_to_proto(asked)
        by_proto = training_proto.decode_forward_backward(message.SerializeToString())
        by_json = training_json.decode_operation("forward_backward", as_json(asked))
        assert by_proto.address == by_json.address
        assert plain(by_proto.operation) == plain(by_json.operation)
        sparse += sum(
            t.sparse_crow_indices is not None for d in by_json.operation.data for t in d.loss_fn_inputs.values()
        )
    assert sparse > 5


def test_forward_only_and_the_second_config_map_are_honoured() -> None:
    message = forward_backward_request_to_proto(request([random_datum(random.Random(1))], {"top_k": 5}))
    message.forward_only = True
    message.loss_fn_config["top_k"] = 9
    operation = training_proto.decode_forward_backward(message.SerializeToString()).operation
    assert isinstance(operation, Forward)
    assert (operation.backward, operation.loss_fn_config) == (False, {"top_k": 5.0})
    message.ClearField("loss_fn_config_v2")
    assert training_proto.decode_forward_backward(message.SerializeToString()).operation.loss_fn_config == {"top_k": 9}


def test_equal_messages_have_equal_canonical_bytes() -> None:
    asked = request([random_datum(random.Random(2))], dict.fromkeys("abcdefgh", 1.0))
    first = forward_backward_request_to_proto(asked)
    again = forward_backward_request_to_proto(asked)
    for name in reversed("abcdefgh"):
        del again.loss_fn_config[name]
        again.loss_fn_config[name] = 1.0
    decode = training_proto.decode_forward_backward
    assert decode(first.SerializeToString()).canonical == decode(again.SerializeToString()).canonical
    again.seq_id += 1
    assert decode(first.SerializeToString()).canonical != decode(again.SerializeToString()).canonical


def test_results_read_the_same_on_both_wires() -> None:
    widths = [3, 3, 5, 3]  # candidates per position differ between datums, so several records are needed
    outputs = [
        {
            "logprobs": output_tensor(np.random.default_rng(i).normal(size=(i + 1, width)).astype(np.float32)),
            "top_k_indices": output_tensor(np.arange((i + 1) * width).reshape(i + 1, width)),
        }
        for i, width in enumerate(widths)
    ]
    result = ForwardOutput(loss_fn_output_type="x", loss_fn_outputs=outputs, metrics={"loss:sum": 0.1})
    by_proto = deserialize_forward_backward_output(training_proto.encode_output(result))
    by_json = json.loads(training_json.encode_result(result))
    assert by_proto.metrics == by_json["metrics"]
    assert by_proto.loss_fn_output_type == by_json["loss_fn_output_type"]
    assert len(by_proto.loss_fn_outputs) == len(widths)
    for datum, told in zip(by_proto.loss_fn_outputs, by_json["loss_fn_outputs"], strict=True):
        for name, tensor in datum.items():
            assert (tensor.dtype, tensor.shape) == (told[name]["dtype"], told[name]["shape"])
            assert list(tensor.data) == told[name]["data"]


def test_broken_data_fails_its_future_and_names_the_field() -> None:
    def broken(change) -> str:
        message = forward_backward_request_to_proto(request([random_datum(random.Random(3))]))
        change(message)
        decoded = training_proto.decode_forward_backward(message.SerializeToString())
        assert decoded.address.seq_id == 3
        assert isinstance(decoded.operation, Failed), decoded.operation
        return decoded.operation.error

    def tokens(message) -> None:
        message.data[0].model_input[0].encoded_text.tokens = b"12345"

    def dtype(message) -> None:
        message.data[0].loss_fn_inputs["weights"].dtype = 4

    assert "data[0].model_input[0].tokens: 5 bytes" in broken(tokens)
    assert "weights: dtype 4" in broken(dtype)
    assert "chunk is empty" in broken(lambda m: m.data[0].model_input.add())
    assert "loss_fn_config.beta: nan" in broken(lambda m: m.loss_fn_config.update({"beta": float("nan")}))
    with pytest.raises(InvalidArgument, match="not a ForwardBackwardRequest"):
        training_proto.decode_forward_backward(b"\xff" * 30)


def test_json_numbers_are_checked_where_they_become_arrays() -> None:
    def error(**tensor: object) -> str:
        datum = {"model_input": {"chunks": [{"tokens": [1]}]}, "loss_fn_inputs": {"x": {"dtype": "int64"} | tensor}}
        body = {"model_id": "m", "seq_id": 1, "forward_backward_input": {"data": [datum], "loss_fn": "cross_entropy"}}
        operation = training_json.decode_operation("forward_backward", json.dumps(body).encode()).operation
        assert isinstance(operation, Failed)
        return operation.error

    assert "data[0].loss_fn_inputs.x: dtype 'int64' holds whole numbers" in error(data=[1.5])
    assert "x: a value does not fit int64" in error(data=[2**63])
    assert "fit" in error(data=[10**400], dtype="float32")
    assert "loss_fn_inputs" in error(data=[True])
    assert "sparse_crow_indices: a value does not fit" in error(data=[1], sparse_crow_indices=[2**70])


def test_compression_is_bounded_however_small_the_body() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(50_000_000))
    assert len(bomb) < 10_000
    with pytest.raises(TooLarge, match="50000000 bytes decompressed are more than 1000"):
        decompress(bomb, "zstd", 1000)
    untold = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(50_000_000))
    with pytest.raises(InvalidArgument, match="at most 1000"):
        decompress(untold, "zstd", 1000)
    with pytest.raises(InvalidArgument, match="zstd frame"):
        decompress(bomb[:-5], "zstd", 2**30)
    with pytest.raises(InvalidArgument, match="'gzip'"):
        decompress(b"", "gzip", 10)
    assert decompress(b"as it is", None, 1) == b"as it is"


@pytest.mark.parametrize(
    ("version", "protobuf"),
    [
        ("0.23.0", False),
        ("0.25.0", True),
        ("0.38.0", True),
        ("1.2", True),
        ("0.25rc1", True),
        ("", False),
        ("x", False),
    ],
)
def test_the_config_follows_the_version(version: str, protobuf: bool) -> None:
    config = client_config(version)
    assert config["proto_write_fwdbwd"] is config["proto_compress_fwdbwd"] is protobuf
