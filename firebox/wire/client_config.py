"""What a training client asks a server before anything else: how to send its data.

Owns both answers: the one per SDK version, and the one that running clients ask for again. Tinker clients of 0.25
and above always write protobuf and may compress it, which costs a local client a few milliseconds and a distant one
saves most of the upload; everyone else writes plain JSON.
"""

from __future__ import annotations

import re
from typing import Final

DYNAMIC_CONFIG: Final = {"refresh_interval_sec": 300, "sample_cancel_enabled": False}
_FIRST_PROTOBUF_SDK: Final = (0, 25)


def client_config(sdk_version: str) -> dict[str, bool]:
    """The flags for a client that calls itself `sdk_version`; one whose version is no number gets the JSON ones."""
    numbers = re.match(r"(\d{1,4})\.(\d{1,4})", sdk_version)
    speaks_protobuf = numbers is not None and (int(numbers[1]), int(numbers[2])) >= _FIRST_PROTOBUF_SDK
    return {
        "parallel_fwdbwd_chunks": True,
        "proto_write_fwdbwd": speaks_protobuf,
        "proto_compress_fwdbwd": speaks_protobuf,
    }
