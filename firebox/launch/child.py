"""One-shot children: JSON in on stdin, JSON out on stdout, a deadline. Knows nothing of what they compute.

Invariant: a child ends with whoever runs it, however that ends, because the kernel closes a pipe between them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Final

from firebox.launch.lease import ORPHAN_EXIT_CODE
from firebox.wire.errors import Internal, Unavailable

FIREBOX: Final = (sys.executable, "-m", "firebox")
_TAIL_BYTES: Final = 2000
_PARENT_FD: Final = "FIREBOX_PARENT_FD"


async def run_child(args: Sequence[str], stdin: bytes, deadline_s: float, *, command: Sequence[str] = FIREBOX) -> bytes:
    """Run `command` with `args` and return its stdout, also when it answers a failure there.

    Raises Unavailable when the deadline passes (the whole group is killed) and Internal, with the end of its
    stderr, when it ends without an answer.
    """
    child_end, own_end = os.pipe()
    with open(own_end, "wb"):  # closed by the kernel when this process is killed, and by us when the child has answered
        try:
            process = await _start([*command, *args], child_end)
        finally:
            os.close(child_end)
        try:
            out, err = await asyncio.wait_for(process.communicate(stdin), deadline_s)
        except TimeoutError:
            raise Unavailable(f"firebox {args[0]} did not finish within {deadline_s:.0f} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if not out.strip():
        tail = err[-_TAIL_BYTES:].decode(errors="replace").strip()
        raise Internal(f"firebox {args[0]} gave no answer, status {process.returncode}: {tail}")
    return out


def end_with_parent() -> None:
    """For a child: from now on it ends at once when the process that runs it does. No effect for one run by hand."""

    def watch(parent: int) -> None:
        os.read(parent, 1)
        os._exit(ORPHAN_EXIT_CODE)

    if _PARENT_FD in os.environ:
        threading.Thread(target=watch, args=(int(os.environ[_PARENT_FD]),), name="parent", daemon=True).start()


async def _start(command: Sequence[str], child_end: int) -> asyncio.subprocess.Process:
    environment = os.environ | {
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        _PARENT_FD: str(child_end),
    }
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        start_new_session=True,
        pass_fds=(child_end,),
    )
