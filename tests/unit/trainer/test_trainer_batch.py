"""Checks and packing, without a model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from firebox.trainer.batch import check_datums, pack, to_array, token_budget
from firebox.wire.errors import InvalidArgument
from firebox.wire.training import Chunk, Datum, ModelInput, TensorData

CPU = torch.device("cpu")


def datum(length: int, width: int | None = None, **inputs: TensorData) -> Datum:
    shape = [length] if width is None else [length, width]
    targets = TensorData(data=[1] * (length * (width or 1)), dtype="int64", shape=shape)
    return Datum(
        model_input=ModelInput(chunks=[Chunk(tokens=list(range(length)))]),
        loss_fn_inputs={"target_tokens": targets, **inputs},
    )


def check(*data: Datum, required: tuple[str, ...] = ()):
    return check_datums(data, required, vocab_size=100, max_length=50)


def test_every_datum_is_packed_once_within_the_budget():
    lengths = [7, 3, 20, 3, 12, 1, 9, 20]
    batches = list(pack(check(*map(datum, lengths)), budget=21, device=CPU))
    assert sorted(i for batch in batches for i in batch.indices) == list(range(len(lengths)))
    for batch in batches:
        assert batch.lengths == [lengths[i] for i in batch.indices]
        assert len(batch.tokens) == len(batch.targets) == sum(batch.lengths) <= 21


def test_a_datum_above_the_budget_goes_alone():
    assert [b.lengths for b in pack(check(datum(3), datum(40)), budget=10, device=CPU)] == [[3], [40]]


def test_widths_and_input_sets_are_not_mixed():
    weights = TensorData(data=[1.0] * 4, dtype="float32")
    data = check(datum(4), datum(4, width=3), datum(4, weights=weights), datum(4))
    batches = list(pack(data, budget=100, device=CPU))
    assert sorted(sorted(b.indices) for b in batches) == [[0, 3], [1], [2]]
    assert {tuple(b.targets.shape) for b in batches} == {(8,), (4, 3), (4,)}


def test_sparse_rows_become_dense():
    tensor = TensorData(
        data=[5, 6, 7], dtype="int64", shape=[3, 4], sparse_crow_indices=[0, 2, 2, 3], sparse_col_indices=[0, 3, 1]
    )
    expected = np.array([[5, 0, 0, 6], [0, 0, 0, 0], [0, 7, 0, 0]])
    np.testing.assert_array_equal(to_array("x", tensor), expected)


@pytest.mark.parametrize(
    ("crow", "col"), [([0, 2, 2], [0, 3, 1]), ([0, 2, 1, 3], [0, 3, 1]), ([0, 2, 2, 3], [0, 4, 1]), ([], [])]
)
def test_broken_sparse_indices_are_refused(crow, col):
    tensor = TensorData(data=[5, 6, 7], dtype="int64", shape=[3, 4], sparse_crow_indices=crow, sparse_col_indices=col)
    with pytest.raises(InvalidArgument, match="CSR"):
        to_array("x", tensor)


@pytest.mark.parametrize(
    ("bad", "told"),
    [
        (datum(0), "no tokens"),
        (datum(51), "context of 50"),
        (datum(4, weights=TensorData(data=[1.0], dtype="float32")), "weights"),
        (datum(4, weights=TensorData(data=[float("inf")] * 4, dtype="float32")), "infinity"),
        (datum(4, weights=TensorData(data=[1.0] * 4, dtype="float32", shape=[2**40, 2**40])), "at most"),
        (datum(4, weigths=TensorData(data=[1.0] * 4, dtype="float32")), "'weigths' is not known"),
        (Datum(model_input=ModelInput(chunks=[Chunk(tokens=[1])])), "target_tokens"),
        (Datum(model_input=ModelInput(chunks=[Chunk(tokens=[-1])])), "-1 is outside"),
        (Datum(model_input=ModelInput(chunks=[Chunk(type="image", tokens=[])])), "image"),
    ],
)
def test_mistakes_name_the_datum_and_the_field(bad: Datum, told: str):
    with pytest.raises(InvalidArgument, match=told) as caught:
        check(datum(4), bad)
    assert "data[1]" in caught.value.message


def test_missing_inputs_and_empty_requests_are_refused():
    with pytest.raises(InvalidArgument, match="'advantages' is missing"):
        check(datum(4), required=("advantages",))
    with pytest.raises(InvalidArgument, match="empty"):
        check()


def test_budget_shrinks_with_the_vocabulary():
    assert token_budget(4096) == 8192
    assert token_budget(152_000) * 152_000 <= 2**27
