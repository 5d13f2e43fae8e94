"""Our protobuf messages and those of the installed clients, field by field; names are not part of this wire."""

from __future__ import annotations

import pytest
from fireworks.training.sdk._core.proto import tinker_public_pb2 as fireworks_pb
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from tinker.proto import tinker_public_pb2 as tinker_pb

from firebox.wire.proto import training_pb2 as ours


def shape(field: FieldDescriptor) -> tuple[object, ...]:
    """What decides about the bytes of a field."""
    return (field.number, field.type, field.is_repeated, field.has_presence)


def differences(mine: Descriptor, theirs: Descriptor, seen: set[str]) -> list[str]:
    """Where a message, and what it contains, lacks or contradicts a field of another."""
    if theirs.full_name in seen:
        return []
    seen.add(theirs.full_name)
    found = []
    for number, field in theirs.fields_by_number.items():
        where, twin = f"{theirs.name}.{field.name}", mine.fields_by_number.get(number)
        if twin is None or shape(twin) != shape(field):
            found.append(f"{where}: {shape(field)} there, {twin and shape(twin)} here")
        elif field.message_type is not None:
            found += differences(twin.message_type, field.message_type, seen)
        elif field.enum_type is not None:
            values = {value.name: value.number for value in field.enum_type.values}
            if {value.name: value.number for value in twin.enum_type.values} != values:
                found.append(f"{where}: {values} there")
    return found


@pytest.mark.parametrize("name", ["ForwardBackwardRequest", "ForwardBackwardOutput", "SampleResponse"])
@pytest.mark.parametrize("sdk", [tinker_pb, fireworks_pb], ids=["tinker", "fireworks"])
def test_every_field_of_the_sdk_is_ours_too(sdk, name: str) -> None:
    theirs, seen = getattr(sdk, name).DESCRIPTOR, set[str]()
    assert differences(getattr(ours, name).DESCRIPTOR, theirs, seen) == []
    assert len(seen) > 2


@pytest.mark.parametrize("name", ["ForwardBackwardRequest", "ForwardBackwardOutput", "SampleResponse"])
def test_we_invent_no_fields(name: str) -> None:
    theirs = getattr(tinker_pb, name).DESCRIPTOR
    assert differences(theirs, getattr(ours, name).DESCRIPTOR, set()) == []


def test_a_wrong_number_would_be_noticed() -> None:
    assert differences(ours.PromptProvenanceSpan.DESCRIPTOR, ours.TopkLogprobs.DESCRIPTOR, set()) != []
