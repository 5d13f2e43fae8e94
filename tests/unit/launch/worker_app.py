"""A worker without a model: `worker_app.py trainer|sampler --spec FILE`, served as real workers are; or `export`.

What it does wrong is written in the name of its job or deployment: `broken` cannot start, `slow` takes its
time, `stubborn` ignores SIGTERM.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from firebox.launch.child import end_with_parent
from firebox.launch.host import serve
from firebox.wire.errors import FailedPrecondition
from firebox.wire.worker import ExportReport, ExportRequest, HotloadCommand, ReplicaStatus, SamplerSpec, TrainerSpec


class FakeReplica:
    """Loads whatever it is told to, except a delta whose parent is not loaded."""

    def __init__(self, base_model: str) -> None:
        self.status = ReplicaStatus(current_snapshot_identity=None, stage="serving", base_model=base_model)

    async def show(self, request: Request) -> Response:
        return Response(msgspec.json.encode(self.status), media_type="application/json")

    async def hotload(self, request: Request) -> Response:
        command = msgspec.json.decode(await request.body(), type=HotloadCommand)
        loaded = self.status.current_snapshot_identity
        if command.previous not in (None, loaded):
            error = f"builds on {command.previous!r}, loaded is {loaded!r}"
            self.status = ReplicaStatus(
                current_snapshot_identity=loaded,
                stage="serving",
                target_snapshot_identity=command.identity,
                error=error,
            )
        else:
            self.status = ReplicaStatus(current_snapshot_identity=command.identity, stage="serving")
        return await self.show(request)


async def echo(request: Request) -> Response:
    body = await request.body()
    shown = {
        "path": request.url.path,
        "query": str(request.url.query),
        "body": body.decode(errors="replace"),
        "headers": dict(request.headers),
        "pid": os.getpid(),
        "threads": os.environ["OMP_NUM_THREADS"],
        "devices": os.environ["CUDA_VISIBLE_DEVICES"],
    }
    return JSONResponse(shown, headers={"x-from-worker": "yes"})


async def stream(request: Request) -> Response:
    async def lines():  # type: ignore[no-untyped-def]
        for number in range(3):
            yield f"data: {number}\n\n"
            await asyncio.sleep(0.2)

    return StreamingResponse(lines(), media_type="text/event-stream")


async def chat(request: Request) -> Response:
    """Says the last message again, word by word."""
    words = json.loads(await request.body())["messages"][-1]["content"].split(" ")

    async def events():  # type: ignore[no-untyped-def]
        for number, word in enumerate(words):
            delta = {"content": word if number == 0 else f" {word}"}
            yield f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n"
        yield "data: [DONE]\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def save_all(request: Request) -> Response:
    if "full" in request.app.state.name:
        return PlainTextResponse("no space left", 500)
    return JSONResponse({"checkpoints": ["silent-1"]})


async def die(request: Request) -> Response:
    os.kill(os.getpid(), signal.SIGKILL)
    return PlainTextResponse("unreachable")


def build(spec: TrainerSpec | SamplerSpec) -> Starlette:
    name = spec.job if isinstance(spec, TrainerSpec) else spec.deployment
    if "broken" in name:
        raise FailedPrecondition("the weights are not there")
    if "slow" in name:
        time.sleep(2)
    replica = FakeReplica(spec.base_model)
    app = Starlette(
        routes=[
            Route("/worker/status", replica.show),
            Route("/worker/hotload", replica.hotload, methods=["POST"]),
            Route("/worker/save_all", save_all, methods=["POST"]),
            Route("/api/v1/healthz", lambda request: JSONResponse({"status": "ok"})),
            Route("/api/v1/stream", stream),
            Route("/api/v1/die", die, methods=["POST"]),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/{path:path}", echo, methods=["GET", "POST"]),
        ]
    )
    app.state.name = name
    return app


def export() -> None:
    """Takes its time to make a directory, as exports do."""
    end_with_parent()
    out_dir = Path(msgspec.json.decode(sys.stdin.buffer.read(), type=ExportRequest).out_dir)
    out_dir.mkdir()
    time.sleep(0.05)
    (out_dir / "config.json").write_text("{}")
    sys.stdout.buffer.write(msgspec.json.encode(ExportReport(ok=True)))


def main() -> None:
    if sys.argv[1] == "export":
        export()
        return
    kind = TrainerSpec if sys.argv[1] == "trainer" else SamplerSpec
    spec = msgspec.json.decode(Path(sys.argv[3]).read_bytes(), type=kind)
    print("worker is starting", flush=True)
    if kind is TrainerSpec and "stubborn" in spec.job:
        # What an engine thread in native code does to a graceful end: this process never finishes one.
        threading.Thread(target=threading.Event().wait).start()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    serve(lambda: build(spec), spec.runtime)


if __name__ == "__main__":
    main()
