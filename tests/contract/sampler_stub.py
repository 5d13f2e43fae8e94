"""A worker command whose trainers are the real ones and whose samplers answer at once, without a model.

`sampler_stub.py trainer|sampler --spec FILE`. A sample's only token is the step of the snapshot it was asked for,
0 for the base model: enough to see whose weights the server asks. A prompt that begins with 9 is refused.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from firebox.launch.host import serve
from firebox.weights.manifest import read_snapshot
from firebox.wire.errors import InvalidArgument, envelope
from firebox.wire.worker import ReplicaStatus, SamplerSpec


async def status(request: Request) -> Response:
    shown = ReplicaStatus(current_snapshot_identity=None, stage="serving")
    return Response(msgspec.json.encode(shown), media_type="application/json")


async def sample(request: Request) -> Response:
    body: dict[str, Any] = await request.json()
    asked, step = body["request"], 0
    if body["snapshot"] is not None:
        manifest = read_snapshot(Path(body["snapshot"]["dir"]))
        assert manifest is not None
        assert manifest.identity == body["snapshot"]["identity"]
        step = manifest.step
    prompt = [token for chunk in asked["prompt"]["chunks"] for token in chunk["tokens"]]
    if prompt[0] == 9:
        return JSONResponse(envelope(InvalidArgument("prompt: 9 is not my number")), status_code=400)
    sequence = {"stop_reason": "stop", "tokens": [step], "logprobs": [-0.5]}
    answer: dict[str, Any] = {"sequences": [sequence] * asked["num_samples"]}
    if asked.get("prompt_logprobs"):
        answer["prompt_logprobs"] = [None, *(-float(token) for token in prompt[1:])]
    if asked.get("topk_prompt_logprobs"):
        answer["topk_prompt_logprobs"] = [None, *([[token, -0.25]] for token in prompt[1:])]
    return JSONResponse(answer)


def build(spec: SamplerSpec) -> Starlette:
    return Starlette(routes=[Route("/worker/status", status), Route("/worker/sample", sample, methods=["POST"])])


if __name__ == "__main__":
    if sys.argv[1] == "sampler":
        spec = msgspec.json.decode(Path(sys.argv[3]).read_bytes(), type=SamplerSpec)
        serve(lambda: build(spec), spec.runtime)
    else:
        from firebox.cli import main

        main()
