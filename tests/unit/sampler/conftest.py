"""A real sampler on a TCP port, serving a tiny model; torch runs on one thread."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.routing import Mount

from firebox.modeling.causal_lm import CausalLM, load_causal_lm
from firebox.modeling.tiny import make_tiny
from firebox.sampler.server import build_app
from firebox.wire.worker import SamplerSpec, WorkerRuntime

BASE_MODEL = "accounts/local/models/tiny"


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sampler") / "tiny"
    make_tiny(path, seed=0)
    return path


@pytest.fixture(scope="session")
def lm(model_dir: Path) -> CausalLM:
    torch.set_num_threads(1)
    return load_causal_lm(model_dir)


def make_spec(model_dir: Path, **changes: object) -> SamplerSpec:
    fields = {
        "deployment": "accounts/local/deployments/d",
        "base_model": BASE_MODEL,
        "model_dir": str(model_dir),
        "max_context_length": 256,
        "max_batch": 8,
        "runtime": WorkerRuntime(socket="", token=""),
    }
    return SamplerSpec(**(fields | changes))


@contextlib.contextmanager
def serving(spec: SamplerSpec, **options: float) -> Iterator[httpx.Client]:
    """Serve `spec` at `/` and below `/inference`, as a gateway maps it."""
    app = build_app(spec, **options)
    outer = Starlette(
        routes=[Mount("/inference", app), Mount("/", app)], lifespan=lambda _: app.router.lifespan_context(app)
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(outer, log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        with httpx.Client(base_url=f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=60) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture(scope="module")
def client(model_dir: Path) -> Iterator[httpx.Client]:
    with serving(make_spec(model_dir)) as client:
        yield client
