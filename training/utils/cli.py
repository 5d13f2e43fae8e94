"""The command line of a recipe: dataclass to options, errors to one screen. Knows nothing of training.

Invariant: options are parsed before anything heavy is imported, so that `--help` is instant.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from training.utils.errors import CookbookError

C = TypeVar("C")


def run(config_type: type[C], main: Callable[[C], dict[str, Any] | None]) -> None:
    """Parse the command line into `config_type`, run `main`, print its result, if there is one, as JSON.

    Exits with 2 and the bare message for what the user can mend, 130 or 143 when told to stop. What the recipe
    created is removed in every case, because a termination request unwinds like an exception.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        module = sys.modules[config_type.__module__]
        prog = f"python -m {module.__spec__.name}" if module.__spec__ else None
        config = tyro.cli(config_type, prog=prog, description=module.__doc__)
        result = main(config)
    except CookbookError as exc:
        print(f"error: {exc}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    if result is not None:
        print(json.dumps(result, indent=2))
