"""The user's own functions: rewards and environments, found by name and called without holding up the sampling.

Knows neither tokens nor trainers. Invariant: every call has a deadline, runs off the event loop, and what it returns is
checked before anything is computed from it.
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from training.utils.client import in_thread
from training.utils.data import Row
from training.utils.errors import ConfigError, DataError
from training.utils.rl.config import NamedFunction, RolloutConfig

if TYPE_CHECKING:
    from training.utils.rl.trajectory import Trajectory

Message = dict[str, Any]


def _load(field: str, spec: NamedFunction) -> Callable[..., Any]:
    """The function itself, or what "module:name" names. Raises ConfigError naming `field` when there is none."""
    if callable(spec):
        return spec
    module, _, name = spec.partition(":")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as exc:
        raise ConfigError(field, spec, f"expected 'module:name' that can be imported ({exc})") from exc
    if not callable(function):
        raise ConfigError(field, spec, "does not name something that can be called")
    return function  # type: ignore[no-any-return]


Respond = Callable[[str], Awaitable[list[Message]]]


class Task:
    """What the model is asked to do: the reward function, and the environment that answers it, if there is one.

    A reward is `(completion, row) -> float` or, of a whole trajectory, `(trajectory) -> float`. An environment is
    `(row) -> respond`, once per rollout, and `respond(completion) -> messages` after each turn, no messages at the end.
    All may be asynchronous. Raises ConfigError for what cannot be found or called like that.
    """

    def __init__(self, reward: NamedFunction, settings: RolloutConfig) -> None:
        self._reward, self._timeout_s = _load("reward", reward), settings.call_timeout_s
        self._of_text = _accepts(self._reward, 2)
        if not (self._of_text or _accepts(self._reward, 1)):
            raise ConfigError("reward", reward, "must take (completion, row) or (trajectory)")
        self._environment = None
        if settings.environment is not None:
            self._environment = _load("rollout.environment", settings.environment)
            if not _accepts(self._environment, 1):
                raise ConfigError("rollout.environment", settings.environment, "must take (row)")

    async def reward(self, trajectory: Trajectory) -> float:
        """What the trajectory earned. Raises DataError for anything but a finite number."""
        row = trajectory.prompt.row
        arguments = (trajectory.text, row.fields) if self._of_text else (trajectory,)
        value = await self._call(f"{row.origin}: the reward", self._reward, *arguments)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise DataError(f"{row.origin}: the reward function returned {value!r}; it must return a finite number")
        return float(value)

    async def begin(self, row: Row) -> Respond:
        """What answers the model in one rollout: the messages that follow a completion, none at the end."""
        if self._environment is None:
            return _silence
        what = f"{row.origin}: the environment"
        respond = await self._call(what, self._environment, row.fields)

        async def answer(completion: str) -> list[Message]:
            messages = list(await self._call(what, respond, completion) or [])
            for message in messages:
                if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                    raise DataError(f"{what} returned {message!r}; 'role' and 'content' of a message must be text")
            return messages

        return answer

    async def _call(self, what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s) as limit:
                value = await asyncio.wrap_future(in_thread("call", lambda: function(*arguments)))
                return await value if inspect.isawaitable(value) else value
        except TimeoutError as exc:
            if not limit.expired():
                raise
            fix = "mend it or raise rollout.call_timeout_s"
            raise DataError(f"{what} gave no answer in {self._timeout_s:g} s; {fix}") from exc


async def _silence(completion: str) -> list[Message]:
    return []


def _accepts(function: Callable[..., Any], num_arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * num_arguments)
    except (TypeError, ValueError):
        return False
    return True
