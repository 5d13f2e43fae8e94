"""Every error the cookbook raises for something its user can mend. Knows no recipe and no SDK.

    CookbookError
    ├── ConfigError       a setting has the wrong type or range, is missing, or contradicts another
    ├── DataError         a row, a chat template or a reward function cannot be used
    ├── PlatformError     the server, the key, the shape or a resource on it
    ├── CheckpointError   a checkpoint cannot be found or loaded
    ├── ReconnectedError  the trainer's process was replaced; its message says from which step to go on
    └── MismatchError     sampler and trainer disagree too much to go on

Invariant: the message alone says what was wrong and what to do. A command line prints it without a traceback, so
nothing that hides a bug of ours may be turned into one of these.
"""


class CookbookError(Exception):
    """Base of all errors with a remedy in the message."""


class ConfigError(CookbookError, ValueError):
    """A setting that cannot be used. Names the field, its value and the fix."""

    def __init__(self, field: str, value: object, fix: str) -> None:
        self.field, self.value, self.fix = field, value, fix
        super().__init__(f"{field} = {value!r}: {fix}")


class DataError(CookbookError, ValueError):
    """Data that cannot be trained on. Names file and line where there is one."""


class PlatformError(CookbookError, RuntimeError):
    """The training service refused or cannot be reached."""


class CheckpointError(CookbookError, RuntimeError):
    """A checkpoint that was asked for is missing or does not fit. Never answered with a fresh start."""


class ReconnectedError(CookbookError, RuntimeError):
    """The trainer has a new process, so every step behind the last saved state is lost.

    `checkpoint` is the state that was loaded into it, None when there was none; `step` counts the optimizer steps
    that the client had taken when it saved that state.
    """

    def __init__(self, message: str, checkpoint: str | None, step: int) -> None:
        self.checkpoint, self.step = checkpoint, step
        super().__init__(message)


class MismatchError(CookbookError, RuntimeError):
    """What is sampled does not come from the policy that is trained."""
