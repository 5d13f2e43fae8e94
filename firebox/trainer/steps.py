"""Work that pauses: a generator that yields between its steps and returns its result at the end.

Invariant: what a context sets up holds inside a step only, never while others are at work.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from typing import Any, TypeVar

T = TypeVar("T")
Steps = Generator[None, None, T]


def at_one_go(steps: Steps[T]) -> T:
    """All steps, without a pause, and their result."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def in_each_step(context: Callable[[], contextlib.AbstractContextManager[Any]], steps: Steps[T]) -> Steps[T]:
    """`steps`, each of them inside a `context` of its own."""
    while True:
        with context():
            try:
                next(steps)
            except StopIteration as end:
                return end.value
        yield
