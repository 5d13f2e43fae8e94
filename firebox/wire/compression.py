"""Compressed request bodies.

Owns the way from a body as it was sent to the bytes a codec reads. Invariant: nothing larger than the limit is ever
held, however small the body that asks for it.
"""

from __future__ import annotations

from typing import Final

import zstandard

from firebox.wire.errors import InvalidArgument, TooLarge

_MAX_WINDOW: Final = 2**27
"""The widest window any zstd level asks for without its long-distance mode, in bytes."""


def decompress(body: bytes, encoding: str | None, limit: int) -> bytes:
    """Undo a `Content-Encoding`, either none or zstd.

    Raises InvalidArgument for another encoding or a broken frame, TooLarge when the result would pass `limit` bytes.
    """
    if encoding in (None, "", "identity"):
        return body
    if encoding != "zstd":
        raise InvalidArgument(f"Content-Encoding: {encoding!r} is not supported; send zstd or leave it out")
    try:
        size = zstandard.frame_content_size(body)  # -1 where the frame does not tell
        if size > limit:
            raise TooLarge(f"body: {size} bytes decompressed are more than {limit}; send fewer datums per request")
        decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
        return decompressor.decompress(body, max_output_size=limit, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise InvalidArgument(f"body: not one zstd frame of at most {limit} bytes decompressed ({error})") from error
