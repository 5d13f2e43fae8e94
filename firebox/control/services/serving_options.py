"""What a deployment's extraArgs and extraValues may say, and what they mean to a sampler.

Invariant: an option that is not understood is refused, never passed over.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from firebox.wire.errors import InvalidArgument

MAX_BATCH: Final = "max-batch-size"
MAX_CONTEXT: Final = "max-context-length"

_LIMITS: Final = {MAX_BATCH: 256, MAX_CONTEXT: 2**20}


def parse(args: Sequence[str] | None, values: Mapping[str, str] | None) -> dict[str, int]:
    """Options by name, from `--name=value` or `--name value` in `args` and from `values`.

    Raises InvalidArgument for an unknown option, one given twice, and a value that is not a number in its range.
    """
    found: dict[str, int] = {}
    given = [*_pairs(args or ()), *(("extraValues", name, value) for name, value in (values or {}).items())]
    for field, name, value in given:
        if name not in _LIMITS:
            raise InvalidArgument(f"{field}: {name!r} is not an option of this server; known: {', '.join(_LIMITS)}")
        if name in found:
            raise InvalidArgument(f"{field}: {name!r} is given twice; keep one")
        if not value.isascii() or not value.isdecimal() or not 1 <= int(value) <= _LIMITS[name]:
            raise InvalidArgument(f"{field}: {name}={value!r} must be a number from 1 to {_LIMITS[name]}")
        found[name] = int(value)
    return found


def _pairs(args: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    rest = iter(args)
    for arg in rest:
        if not arg.startswith("--"):
            raise InvalidArgument(f"extraArgs: {arg!r} is not an option; write --name=value")
        name, is_whole, value = arg.removeprefix("--").partition("=")
        yield "extraArgs", name, value if is_whole else next(rest, "")
