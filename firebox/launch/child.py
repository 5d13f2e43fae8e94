"""One-shot children: JSON in on stdin, JSON out on stdout, a deadline. Knows nothing of what they compute."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Sequence

from firebox.wire.errors import Internal, Unavailable

_TAIL_BYTES = 2000


async def run_child(args: Sequence[str], stdin: bytes, deadline_s: float) -> bytes:
    """Run `python -m firebox <args>` and return its stdout, also when it answers a failure there.

    Raises Unavailable when the deadline passes (the whole group is killed) and Internal, with the end of its
    stderr, when it ends without an answer.
    """
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "firebox", *args),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"},
        start_new_session=True,
    )
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
