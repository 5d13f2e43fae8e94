"""The server's composition root: which objects a server is made of, and in which order they start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import os
import socket
from collections.abc import AsyncIterator, Sequence
from functools import partial
from pathlib import Path

import uvicorn

from firebox.cli import logs
from firebox.control.app import ControlPlane, clear_staging
from firebox.control.layout import Layout
from firebox.control.services import (
    api_keys,
    deployments,
    model_dir,
    models,
    run_checkpoints,
    samplers,
    trainer_jobs,
    training_runs,
)
from firebox.control.services.context import Control
from firebox.control.services.retention import Limits
from firebox.gateway.app import build_app
from firebox.gateway.guard import allowed_hosts
from firebox.gateway.proxy import LookUps
from firebox.gateway.tinker import RootCalls
from firebox.launch.host import KEEP_ALIVE_S
from firebox.launch.lease import ServerLock
from firebox.launch.local import LocalLauncher
from firebox.launch.machine import Machine
from firebox.wire.control import CreateModel
from firebox.wire.errors import FailedPrecondition
from firebox.wire.names import DEFAULT_ACCOUNT
from firebox.wire.worker import ComputeMode

_BACKLOG = 2048
_SHUTDOWN_S = 2


def run(
    data_dir: Path,
    host: str,
    port: int,
    model_dirs: Sequence[Path],
    idle_s: float = 600.0,
    allow_dirs: Sequence[Path] = (),
    *,
    mode: ComputeMode = "exact",
    log_json: bool = False,
    memory: int | None = None,
    limits: Limits = Limits(),
    host_names: Sequence[str] = (),
) -> None:
    """Serve until SIGINT or SIGTERM. Raises FailedPrecondition when the directory or the port is taken.

    After `idle_s` seconds of silence a session of the root API is put to sleep, and a worker without one is stopped.
    Trainers may read adapters beneath `allow_dirs`. All workers compute in `mode` and have `memory` bytes together.
    What jobs save is kept within `limits`. Requests may name the server by `host_names`, besides its own addresses.
    """
    logs.configure(as_json=log_json)
    layout = Layout(data_dir)
    layout.create()
    lock = ServerLock(layout.lock)
    try:
        launcher = LocalLauncher(layout.run, layout.lock, mode=mode)
        control = ControlPlane(layout, launcher, Machine.here(memory), idle_s, allow_dirs, limits)
        with _listen(host, port) as listener, contextlib.suppress(KeyboardInterrupt):
            asyncio.run(_serve(layout, listener, host, host_names, model_dirs, control))
    finally:
        lock.release()


async def _serve(
    layout: Layout,
    listener: socket.socket,
    host: str,
    host_names: Sequence[str],
    model_dirs: Sequence[Path],
    control: ControlPlane,
) -> None:
    clear_staging(layout)
    context = control.context
    new_key = await api_keys.start(context)
    for directory in model_dirs:
        await _register(control, directory)

    @contextlib.asynccontextmanager
    async def life() -> AsyncIterator[None]:
        await control.start()
        _announce(layout, listener, host, new_key)
        yield
        await control.stop()
        layout.server_file.unlink(missing_ok=True)

    app = build_app(
        control.app,
        LookUps(partial(trainer_jobs.address, context), partial(deployments.replicas, context)),
        _root_calls(context),
        partial(api_keys.use, context),
        context.downloads.account_of,
        allowed_hosts(host, host_names),
        life,
    )
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=_SHUTDOWN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
    )
    await uvicorn.Server(config).serve(sockets=[listener])


def _root_calls(context: Control) -> RootCalls:
    return RootCalls(
        trainer=partial(trainer_jobs.address, context),
        home=partial(training_runs.place, context),
        create=partial(training_runs.create, context),
        create_from=partial(training_runs.create_from, context),
        unload=partial(training_runs.unload, context),
        state_ref=partial(training_runs.state_ref, context),
        announce=partial(run_checkpoints.announce, context),
        sampler_of_run=partial(samplers.of_run, context),
        sampling=partial(samplers.target, context),
    )


async def _register(control: ControlPlane, directory: Path) -> None:
    context, name = control.context, directory.resolve().name.lower()
    if name in [row.id for row in await models.listing(context, DEFAULT_ACCOUNT)]:
        return
    staged = await asyncio.to_thread(model_dir.stage, directory, context.layout.staging)
    await models.create(context, DEFAULT_ACCOUNT, CreateModel(model_id=name, staged_dir=staged))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as error:
        raise FailedPrecondition(f"--host {host} --port {port}: {error.strerror}; choose another port") from error
    # asyncio does this only for sockets it made itself; without it, each small answer waits 40 ms for an ACK.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _announce(layout: Layout, listener: socket.socket, host: str, new_key: str | None) -> None:
    """Tell people and programs where the server is; the key is shown once, when it is new."""
    port = listener.getsockname()[1]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}.get(host, host)
    url = f"http://{reachable}:{port}"
    draft = layout.server_file.with_suffix(".new")
    draft.write_text(json.dumps({"url": url, "pid": os.getpid()}))
    draft.rename(layout.server_file)
    print(f"Firebox is up at {url}, data in {layout.root}")
    print(f"  export FIREWORKS_BASE_URL={url}")
    print(f"  export FIREWORKS_API_KEY={new_key or f'$(cat {layout.api_key})'}")
    print(f"  export TINKER_BASE_URL={url} TINKER_API_KEY=tml-$FIREWORKS_API_KEY", flush=True)
    if not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        print("  Keys and data travel unencrypted: put a TLS proxy in front of this before others use it.", flush=True)
