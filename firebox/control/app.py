"""The control plane as one FastAPI app, and the life of what stands behind it.

Owns the order of start and stop. Knows neither sockets nor keys: the gateway in front has checked the caller and
says in `scope["account"]` who it is.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import msgspec
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader, HTTPBasic, HTTPBearer
from starlette.exceptions import HTTPException

from firebox import __version__
from firebox.control.catalogue import load_templates
from firebox.control.changes import Changes
from firebox.control.database import Database
from firebox.control.layout import Layout
from firebox.control.reconcile.checkpoints import Promotions
from firebox.control.reconcile.deployments import Deployments
from firebox.control.reconcile.retention import retaining
from firebox.control.reconcile.tombstones import tombstones
from firebox.control.reconcile.trainer_jobs import TrainerJobs
from firebox.control.reconcile.training_runs import TrainingRuns
from firebox.control.routes import (
    accounts,
    api_keys,
    checkpoints,
    deployments,
    metrics,
    models,
    operations,
    run_checkpoints,
    samplers,
    sessions,
    trainer_jobs,
    training_runs,
    training_sessions,
    training_shapes,
)
from firebox.control.services.capacity import Capacity
from firebox.control.services.context import Control
from firebox.control.services.presence import Presence
from firebox.control.services.retention import Limits
from firebox.launch.api import Launcher
from firebox.launch.machine import Machine
from firebox.launch.probe import ask
from firebox.wire.errors import FireboxError, Internal, InvalidArgument, NotFound, envelope
from firebox.wire.worker import ReplicaStatus, WorkerAddress

_PROBE_S = 20.0
_ASK_S = 600.0


# The gateway checks the key; these say in the document where it goes, for its readers and for the tools they use.
_KEYS = [
    Depends(APIKeyHeader(name="X-Api-Key", auto_error=False)),
    Depends(HTTPBearer(auto_error=False)),
    Depends(HTTPBasic(auto_error=False)),
]
_ABOUT = """The control plane. Every request carries an API key. Training operations go to
`/training/v1/rlorTrainerJobs/{account}/{job}/api/v1/*`, those of root sessions to `/api/v1/*`, and samples to
`/inference/v1/completions` and `/inference/v1/chat/completions`: workers answer those, as the SDKs speak them."""


class ControlPlane:
    """The database, the reconcilers and the routes of one data directory. `start` needs a running event loop.

    After `idle_s` seconds without a request, sessions are put to sleep and pools are stopped. Trainers may read
    adapters beneath `allow_dirs`. Workers get what `machine` has. What jobs save is kept within `limits`.
    """

    def __init__(
        self,
        layout: Layout,
        launcher: Launcher,
        machine: Machine,
        idle_s: float,
        allow_dirs: Sequence[Path] = (),
        limits: Limits = Limits(),
    ) -> None:
        changes = Changes()
        self.context = Control(
            db=Database(layout.database),
            layout=layout,
            templates=load_templates(layout.shapes),
            probe=_replica_status,
            ask=_post,
            changes=changes,
            capacity=Capacity(machine, changes.notify),
            presence=Presence(idle_s),
            allow_dirs=allow_dirs,
        )
        self.app = _build_app(self.context)
        self._launcher = launcher
        self._jobs = TrainerJobs(self.context, launcher)
        self._deployments = Deployments(self.context, launcher)
        self._promotions = Promotions(self.context)
        self._runs = TrainingRuns(self.context)
        self._cleaners = [tombstones(self.context), retaining(self.context, limits)]

    async def start(self) -> None:
        """Take up where an earlier server stopped: adopt its workers, end those that belong to nobody."""
        await self._jobs.recover()
        await self._deployments.recover()
        await self._promotions.recover()
        self._launcher.sweep()
        for driver in (self._jobs.driver, self._deployments.driver, self._promotions.driver):
            driver.start()
        await self._runs.recover()
        for cleaner in self._cleaners:
            cleaner.start()

    async def stop(self) -> None:
        """Stop reconciling, then every worker."""
        for cleaner in self._cleaners:
            await cleaner.close()
        await self._runs.close()
        await self._promotions.driver.close()
        await self._deployments.close()
        await self._jobs.driver.close()
        await self._launcher.close()
        await self.context.keyring.close()
        self.context.db.close()


def clear_staging(layout: Layout) -> None:
    """Remove what an earlier server or command left half done."""
    shutil.rmtree(layout.staging, ignore_errors=True)
    layout.create()


def _build_app(control: Control) -> FastAPI:
    app = FastAPI(title="Firebox", version=__version__, description=_ABOUT, dependencies=_KEYS)
    app.state.control = control
    for module in (accounts, api_keys, models, training_shapes, trainer_jobs, checkpoints, operations, deployments):
        app.include_router(module.router)
    for module in (sessions, training_runs, training_sessions, run_checkpoints, samplers):
        app.include_router(module.router)
    app.include_router(deployments.hot_load_router)
    app.include_router(metrics.router)
    app.add_exception_handler(FireboxError, _on_firebox_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_bug)
    return app


async def _on_firebox_error(_request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, FireboxError)
    return JSONResponse(envelope(error), status_code=error.status)


async def _on_invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    place = first["loc"][1:] if first["type"] != "json_invalid" else ()
    field = ".".join(str(part) for part in place)
    return await _on_firebox_error(request, InvalidArgument(f"{field or 'body'}: {first['msg']}"))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    shown: FireboxError = NotFound(f"{request.method} {request.url.path}: there is no such resource")
    if error.status_code != 404:
        shown = InvalidArgument(f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(envelope(shown), status_code=error.status_code, headers=error.headers)


async def _on_bug(_request: Request, error: Exception) -> JSONResponse:
    """The answer to a bug of ours; the framework raises the error again, for the gateway to log it."""
    return JSONResponse(envelope(Internal(f"the server failed on this request: {type(error).__name__}")), 500)


async def _post(address: WorkerAddress, path: str, body: bytes) -> bytes:
    return await ask(address, "POST", path, body, timeout_s=_ASK_S)


async def _replica_status(address: WorkerAddress) -> ReplicaStatus:
    answer = await ask(address, "GET", "/worker/status", None, timeout_s=_PROBE_S)
    return msgspec.json.decode(answer, type=ReplicaStatus)
