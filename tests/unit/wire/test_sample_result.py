"""A sample result in JSON and as a message, read back with the installed client's own reader."""

from __future__ import annotations

import json

import numpy as np
from tinker.proto.response_conv import deserialize_sample_response

from firebox.wire.sample_result import to_proto

RESULT = {
    "sequences": [
        {
            "stop_reason": "length",
            "tokens": [5, 100000],
            "logprobs": [-0.25, -1.5],
            "topk_logprobs": [[[5, -0.25], [6, -2.0]], None],
        },
        {"stop_reason": "stop", "tokens": []},
    ],
    "prompt_logprobs": [None, -0.5, -0.125],
    "topk_prompt_logprobs": [None, [[1, -0.5], [2, -3.0]], [[3, -1.0]]],
    "prompt_cache_hit_tokens": 2,
}


def test_client_reads_what_the_sampler_said() -> None:
    message = to_proto(json.dumps(RESULT).encode())
    assert message is not None
    read = deserialize_sample_response(message)
    first, second = read.sequences
    assert (first.tokens, first.logprobs, first.stop_reason) == ([5, 100000], [-0.25, -1.5], "length")
    assert first.topk_logprobs == [[(5, -0.25), (6, -2.0)], None]
    assert (second.tokens, second.stop_reason) == ([], "stop")
    assert read.prompt_logprobs == [None, -0.5, -0.125]
    assert read.topk_prompt_logprobs == [None, [(1, -0.5), (2, -3.0)], [(3, -1.0)]]
    assert read.prompt_cache_hit_tokens == 2
    assert np.isnan(read.prompt_logprobs_np[0])


def test_failure_is_no_message() -> None:
    assert to_proto(b'{"error": "no", "category": "user"}') is None
