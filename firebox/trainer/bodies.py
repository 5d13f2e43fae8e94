"""From an HTTP request to decoded values.

Owns the size limit, and where decoding and encoding happen: at once when small, else on a few threads beside the event
loop, so that a large body does not hold up the others. Does not know what the bodies mean.

Invariant: no request, compressed or not, ever occupies more than `MAX_BODY` bytes before it is decoded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

import msgspec
from starlette.requests import Request

from firebox.wire.compression import decompress
from firebox.wire.errors import InvalidArgument, TooLarge

MAX_BODY: Final = 64 * 2**20
"""Clients split their data at 5 MB; one datum of a long context may need several times that."""

CODEC_THREADS: Final = 2
"""Decoding holds the interpreter's lock most of the time, so more threads would only hold more bodies."""

_AT_ONCE: Final = 256 * 1024

_T = TypeVar("_T")


async def decoded(request: Request, decode: Callable[[bytes], _T]) -> _T:
    """What `decode` makes of the body; raises what it raises, and InvalidArgument or TooLarge before that."""
    body = await _receive(request)
    encoding = request.headers.get("content-encoding")

    def run() -> _T:
        return decode(decompress(body, encoding, MAX_BODY))

    return await _beside(request, run) if encoding or len(body) > _AT_ONCE else run()


async def read_json(request: Request, kind: type[_T]) -> _T:
    """The body as a small JSON value of type `kind`; raises InvalidArgument naming the field."""

    def decode(body: bytes) -> _T:
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidArgument(f"body: {error}") from error

    return await decoded(request, decode)


async def encoded(request: Request, encode: Callable[[], bytes]) -> bytes:
    """What `encode` makes, which may be large."""
    return await _beside(request, encode)


async def _receive(request: Request) -> bytes:
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > MAX_BODY:
            raise TooLarge(f"body: more than {MAX_BODY} bytes; send fewer datums per request")
        parts.append(part)
    return b"".join(parts)


async def _beside(request: Request, work: Callable[[], _T]) -> _T:
    threads: ThreadPoolExecutor = request.state.codec
    return await asyncio.get_running_loop().run_in_executor(threads, work)
