"""The filters and orders of list calls: `field=value` terms joined by AND, over the fields that the wire shows.

Field names are snake_case, dotted where objects nest. Knows no resource.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from firebox.wire.control import Camel
from firebox.wire.errors import InvalidArgument

R = TypeVar("R", bound=Camel)

_TERM: Final = re.compile(r'(?P<field>[\w.]+)\s*(?P<op>!=|>=|<=|=)\s*(?P<value>"[^"]*"|[\w.+-]+)')
_SORTABLE: Final = ("create_time", "name")


class _Term(NamedTuple):
    field: str
    op: str
    value: str


def search(
    items: Sequence[R], expression: str, order_by: str, canonical: Callable[[str], str] = lambda name: name
) -> list[R]:
    """The items that satisfy every term of `expression`, in the order `order_by` (`create_time desc`) if there is one.

    `canonical` turns the name of a resource, as a client may write it, into the one the items carry. Raises
    InvalidArgument naming the term.
    """
    terms = [_Term(term.field, term.op, canonical(term.value)) for term in _terms(expression)]
    found = [item for item in items if all(_holds(item, term) for term in terms)]
    field, _, direction = order_by.strip().partition(" ")
    if not field:
        return found
    if field not in _SORTABLE or direction.strip() not in ("", "asc", "desc"):
        raise InvalidArgument(f"orderBy: {order_by!r} is not supported; use create_time or name, with or without desc")
    return sorted(found, key=lambda item: str(getattr(item, field)), reverse=direction.strip() == "desc")


def _terms(expression: str) -> Iterator[_Term]:
    for text in re.split(r"\s+AND\s+", expression.strip()) if expression.strip() else ():
        match = _TERM.fullmatch(text.strip())
        if match is None:
            raise InvalidArgument(f"filter: {text!r} is not understood; write field=value terms joined by AND")
        yield _Term(match["field"], match["op"], match["value"].strip('"'))


def _holds(item: Camel, term: _Term) -> bool:
    actual = _read(item, term.field)
    if actual is None:
        return term.op == "!="
    text = str(actual).lower() if isinstance(actual, bool) else str(actual)
    if term.op in ("=", "!="):
        return (text == term.value) is (term.op == "=")
    try:
        return float(text) >= float(term.value) if term.op == ">=" else float(text) <= float(term.value)
    except ValueError:
        raise InvalidArgument(f"filter: {term.field} {term.op} {term.value}: both sides must be numbers") from None


def _read(item: Camel, field: str) -> Any:
    value: Any = item
    for name in field.split("."):
        if value is None:
            return None
        if not isinstance(value, Camel) or name not in type(value).model_fields:
            raise InvalidArgument(f"filter: {field!r} is not a field of this resource")
        value = getattr(value, name)
    return value
